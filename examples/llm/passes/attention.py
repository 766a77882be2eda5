"""Attention of new tokens over the keys and values of all positions up to each of them.

Shapes, beside those of model.py:
  P positions of a row       R rows that decode together
  S query heads that share a key-value head (H = G * S)

A sink is a score that each query of a head has beside those of positions: it takes its share of the
softmax and adds no values.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SPARE = 8
"""Numbers that a head is widened by for its sink: as few as kernels like."""
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def fast_kernels(device: torch.device) -> AbstractContextManager[object]:
    """Context for attention on a device: without cuDNN, which prepares anew for every length.

    It holds for all threads of the process, as torch has it.
    """
    if device.type != "cuda":
        return nullcontext()
    kernels: AbstractContextManager[object] = sdpa_kernel(KERNELS)
    return kernels


def attend(
    q_HTE: torch.Tensor,
    k_GPE: torch.Tensor,
    v_GPE: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention in which the T queries are the last T of the P positions.

    With ``window``, a query sees itself and the ``window`` - 1 positions before it.
    """
    tokens, positions = q_HTE.shape[1], k_GPE.shape[1]
    if tokens == 1:
        first = 0 if window is None else max(0, positions - window)
        k_GPE, v_GPE = k_GPE[:, first:], v_GPE[:, first:]
        if sinks_H is not None:
            q_1HE = q_HTE.transpose(0, 1)
            one = attend_rows(q_1HE, k_GPE[None], v_GPE[None], scale=scale, sinks_H=sinks_H)
            return one.transpose(0, 1)
        # In float16 a product goes beyond its range before it is scaled; SDPA sums up in float32.
        if q_HTE.device.type == "cpu" and q_HTE.dtype != torch.float16:
            return _attend_one(q_HTE, k_GPE, v_GPE, scale)
        one = attend_rows(q_HTE.transpose(0, 1), k_GPE[None], v_GPE[None], scale=scale)
        return _not_hidden(one[0][:, None], q_HTE, k_GPE)
    if window is not None and window < positions:
        mask = window_mask(tokens, positions, window, q_HTE.device)
        return attend_masked(q_HTE, k_GPE, v_GPE, mask, scale=scale, sinks_H=sinks_H)
    if sinks_H is not None:
        width = q_HTE.shape[2]
        widened = _with_sinks(q_HTE, k_GPE, v_GPE, sinks_H, scale)
        return attend(*widened, scale=scale)[..., :width]
    bias = None
    if tokens < positions:
        # is_causal would align the queries with the first positions; this keeps the fast kernels.
        # Imported here: it takes a second, and only prompts of several chunks need it.
        from torch.nn.attention.bias import causal_lower_right

        bias = causal_lower_right(tokens, positions)
    return _attend_many(q_HTE, k_GPE, v_GPE, scale, bias)


def attend_masked(
    q_HTE: torch.Tensor,
    k_GPE: torch.Tensor,
    v_GPE: torch.Tensor,
    mask_TP: torch.Tensor,
    *,
    scale: float,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention in which each query sees those positions where its mask is True, at least
    one."""
    width = q_HTE.shape[2]
    if sinks_H is not None:
        q_HTE, k_GPE, v_GPE = _with_sinks(q_HTE, k_GPE, v_GPE, sinks_H, scale)
        mask_TP = F.pad(mask_TP, (1, 0), value=True)
    return _by_group(q_HTE, k_GPE, v_GPE, scale, mask_TP)[..., :width]


def _with_sinks(
    q_HTE: torch.Tensor,
    k_GPE: torch.Tensor,
    v_GPE: torch.Tensor,
    sinks_H: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of heads that are SPARE wider, with a position before all others.

    Its score is the sink, whatever the query: kernels know no sinks, but all of them know this.
    Keys and values are copied, which is little beside the scores of several queries.
    """
    width = q_HTE.shape[2]
    queries = F.pad(q_HTE, (0, SPARE))
    queries[..., width] = (sinks_H.float() / scale).to(q_HTE.dtype)[:, None]
    keys, values = (F.pad(x, (0, SPARE, 1, 0)) for x in (k_GPE, v_GPE))
    keys[:, 0, width] = 1.0
    return queries, keys, values


def _attend_many(
    q_HTE: torch.Tensor,
    k_GPE: torch.Tensor,
    v_GPE: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention; ``bias`` None: of as many queries as positions."""
    if not has_flash(q_HTE):
        return _by_group(q_HTE, k_GPE, v_GPE, scale, bias)
    # Flash attention knows heads that share a key; other kernels do not.
    mixed = F.scaled_dot_product_attention(
        q_HTE[None], k_GPE[None], v_GPE[None],
        attn_mask=bias, is_causal=bias is None, scale=scale, enable_gqa=True,
    )  # fmt: skip
    return mixed[0]


def has_flash(q_HTE: torch.Tensor) -> bool:
    """True if flash attention takes such queries: half precision on a GPU since Ampere."""
    if q_HTE.device.type != "cuda" or q_HTE.dtype == torch.float32 or q_HTE.shape[-1] > 256:
        return False
    return torch.cuda.get_device_capability(q_HTE.device)[0] >= 8


def _by_group(
    q_HTE: torch.Tensor,
    k_GPE: torch.Tensor,
    v_GPE: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Groups as the batch, the heads of a group over one expanded key, which is no copy."""
    q_GSTE = q_HTE.unflatten(0, (k_GPE.shape[0], -1))
    keys, values = (x[:, None].expand(-1, q_GSTE.shape[1], -1, -1) for x in (k_GPE, v_GPE))
    mixed = F.scaled_dot_product_attention(
        q_GSTE, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return _not_hidden(mixed, q_GSTE, k_GPE).flatten(0, 1)


def _not_hidden(mixed: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The mixed values, nan if queries or keys are not finite: torch's kernel for CPUs takes scores
    of nan for masked ones, and gives zeros."""
    if mixed.device.type == "cpu":
        total = q.sum(dtype=torch.float32) + k.sum(dtype=torch.float32)
        if not torch.isfinite(total):
            mixed.fill_(torch.nan)
    return mixed


def window_mask(tokens: int, positions: int, window: int, device: torch.device) -> torch.Tensor:
    """Which of P positions each of the last T sees: (T, P), True where it does."""
    mask = torch.ones(tokens, positions, dtype=torch.bool, device=device)
    last = positions - tokens
    return mask.tril_(last).triu_(last - window + 1)


def _attend_one(
    q_H1E: torch.Tensor, k_GPE: torch.Tensor, v_GPE: torch.Tensor, scale: float
) -> torch.Tensor:
    """One query token on a CPU. A batched product per group reads each key once; SDPA's own
    grouping is about ten times slower."""
    heads, _, width = q_H1E.shape
    q_GSE = q_H1E.reshape(k_GPE.shape[0], -1, width)
    scores_GSP = torch.bmm(q_GSE, k_GPE.transpose(1, 2)).float() * scale
    mixed_GSE = torch.bmm(scores_GSP.softmax(-1).to(v_GPE.dtype), v_GPE)
    return mixed_GSE.reshape(heads, 1, width)


def attend_rows(
    q_RHE: torch.Tensor,
    k_RGPE: torch.Tensor,
    v_RGPE: torch.Tensor,
    mask_RP: torch.Tensor | None = None,
    *,
    scale: float,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query of each of R rows, over those of its P positions that the mask has: (R, H, E).

    A group's query heads stand where queries do, so that each key is read once.
    """
    q_RGSE = q_RHE.unflatten(1, (k_RGPE.shape[1], -1))
    mask = None if mask_RP is None else mask_RP[:, None, None, :]
    if sinks_H is not None:
        return _attend_to_sinks(q_RGSE, k_RGPE, v_RGPE, mask, scale, sinks_H).flatten(1, 2)
    mixed = F.scaled_dot_product_attention(q_RGSE, k_RGPE, v_RGPE, attn_mask=mask, scale=scale)
    return mixed.flatten(1, 2)


def _attend_to_sinks(
    q_RGSE: torch.Tensor,
    k_RGPE: torch.Tensor,
    v_RGPE: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sinks_H: torch.Tensor,
) -> torch.Tensor:
    """``attend_rows`` with sinks, (R, G, S, E): one query has few scores, so they are written out
    and keys need not be copied."""
    dtype = q_RGSE.dtype
    if dtype == torch.float16:  # a product goes beyond its range before it is scaled
        q_RGSE, k_RGPE, v_RGPE = q_RGSE.float(), k_RGPE.float(), v_RGPE.float()
    scores_RGSP = (q_RGSE @ k_RGPE.transpose(2, 3)).float() * scale
    if mask is not None:
        scores_RGSP.masked_fill_(~mask, -torch.inf)
    sinks_GS1 = sinks_H.float().view(*q_RGSE.shape[1:3], 1)
    all_of_them = torch.cat((sinks_GS1.expand(*q_RGSE.shape[:3], 1), scores_RGSP), -1)
    shares_RGSP = all_of_them.softmax(-1)[..., 1:]
    return (shares_RGSP.to(v_RGPE.dtype) @ v_RGPE).to(dtype)
