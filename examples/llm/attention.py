"""Attention of new tokens over the keys and values of all positions up to each of them.

Shapes, beside those of model.py:
  P positions of a row       R rows that decode together
  S query heads that share a key-value head (H = G * S)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attend(
    q_HTE: torch.Tensor,
    k_GPE: torch.Tensor,
    v_GPE: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Softmax attention in which the T queries are the last T of the P positions.

    With ``window``, a query sees itself and the ``window`` - 1 positions before it.
    """
    tokens, positions = q_HTE.shape[1], k_GPE.shape[1]
    if tokens == 1:
        first = 0 if window is None else max(0, positions - window)
        return _attend_one(q_HTE, k_GPE[:, first:], v_GPE[:, first:], scale)
    groups = k_GPE.shape[0]
    # Groups as the batch, the heads of a group over one expanded key: no kernel needs a copy.
    q_GSTE = q_HTE.unflatten(0, (groups, -1))
    keys, values = (x[:, None].expand(-1, q_GSTE.shape[1], -1, -1) for x in (k_GPE, v_GPE))
    if window is not None and window < positions:
        mask = window_mask(tokens, positions, window, q_HTE.device)
        mixed = F.scaled_dot_product_attention(q_GSTE, keys, values, attn_mask=mask, scale=scale)
    elif tokens == positions:
        mixed = F.scaled_dot_product_attention(q_GSTE, keys, values, is_causal=True, scale=scale)
    else:
        # Imported here: it takes a second, and only prompts of several chunks need it.
        from torch.nn.attention.bias import causal_lower_right

        # is_causal would align the queries with the first positions; this keeps the fast kernels.
        bias = causal_lower_right(tokens, positions)
        mixed = F.scaled_dot_product_attention(q_GSTE, keys, values, attn_mask=bias, scale=scale)
    return mixed.flatten(0, 1)


def window_mask(tokens: int, positions: int, window: int, device: torch.device) -> torch.Tensor:
    """Which of P positions each of the last T sees: (T, P), True where it does."""
    mask = torch.ones(tokens, positions, dtype=torch.bool, device=device)
    last = positions - tokens
    return mask.tril_(last).triu_(last - window + 1)


def _attend_one(
    q_H1E: torch.Tensor, k_GPE: torch.Tensor, v_GPE: torch.Tensor, scale: float
) -> torch.Tensor:
    """One query token. A batched product per group reads each key once; SDPA's own grouping
    is about ten times slower on a CPU."""
    heads, _, width = q_H1E.shape
    q_GSE = q_H1E.reshape(k_GPE.shape[0], -1, width)
    scores_GSP = torch.bmm(q_GSE, k_GPE.transpose(1, 2)).float() * scale
    mixed_GSE = torch.bmm(scores_GSP.softmax(-1).to(v_GPE.dtype), v_GPE)
    return mixed_GSE.reshape(heads, 1, width)


def attend_rows(
    q_RHE: torch.Tensor, kv_RP2GE: torch.Tensor, mask_RP: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """One query of each of R rows, over those of its P positions that the mask has: (R, H, E).

    A group's query heads stand where queries do, so that each key is read once.
    """
    k_RGPE, v_RGPE = kv_RP2GE.permute(2, 0, 3, 1, 4)
    q_RGSE = q_RHE.unflatten(1, (k_RGPE.shape[1], -1))
    mask = mask_RP[:, None, None, :]
    mixed = F.scaled_dot_product_attention(q_RGSE, k_RGPE, v_RGPE, attn_mask=mask, scale=scale)
    return mixed.flatten(1, 2)
