"""Attention of new tokens over the keys and values of all positions up to each of them."""

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
    group = q_HTE.shape[0] // k_GPE.shape[0]
    keys, values = (x.repeat_interleave(group, 0)[None] for x in (k_GPE, v_GPE))
    mask = None
    if tokens < positions or (window is not None and window < positions):
        # is_causal would align the queries with the first positions
        mask = torch.ones(tokens, positions, dtype=torch.bool, device=q_HTE.device)
        mask = mask.tril(positions - tokens)
        if window is not None:
            mask = mask.triu(positions - tokens - window + 1)
    mixed = F.scaled_dot_product_attention(
        q_HTE[None], keys, values, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return mixed[0]


def _attend_one(
    q_H1E: torch.Tensor, k_GPE: torch.Tensor, v_GPE: torch.Tensor, scale: float
) -> torch.Tensor:
    """One query token. A batched product per group reads each key once; SDPA's own grouping
    is about ten times slower on a CPU."""
    heads, _, width = q_H1E.shape
    q_GRE = q_H1E.reshape(k_GPE.shape[0], -1, width)
    scores_GRP = torch.bmm(q_GRE, k_GPE.transpose(1, 2)).float() * scale
    mixed_GRE = torch.bmm(scores_GRP.softmax(-1).to(v_GPE.dtype), v_GPE)
    return mixed_GRE.reshape(heads, 1, width)
