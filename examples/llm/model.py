"""The LLaMA-family decoder layer, as plain functions over one layer's weights.

Shapes are in the names of tensors:
  T tokens of this pass      D hidden size        F width of the feed-forward block
  P positions in the cache   H query heads        G key-value heads
  E width of a head          R query heads per key-value head (H = G * R)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .config import ModelConfig
from .kv_cache import KVCache
from .rope import rotate
from .weights import StepWeights


def decoder_layer(
    x_TD: torch.Tensor,
    weights: StepWeights,
    config: ModelConfig,
    cache: KVCache,
    table_2TE: torch.Tensor,
) -> torch.Tensor:
    """One layer: attention and feed-forward, each over a norm and added to its input."""
    normed = rms_norm(x_TD, weights.vector("input_layernorm.weight"), config.norm_eps)
    x_TD = x_TD + self_attention(normed, weights, config, cache, table_2TE)
    normed = rms_norm(x_TD, weights.vector("post_attention_layernorm.weight"), config.norm_eps)
    return x_TD + feed_forward(normed, weights)


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale each token to a mean square of 1, in float32, then by the weight."""
    x = x_TD.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x.to(x_TD.dtype) * weight_D


def feed_forward(x_TD: torch.Tensor, weights: StepWeights) -> torch.Tensor:
    """SwiGLU: down(silu(gate(x)) * up(x))."""
    gate_TF = F.silu(weights.linear(x_TD, "mlp.gate_proj"))
    return weights.linear(gate_TF.mul_(weights.linear(x_TD, "mlp.up_proj")), "mlp.down_proj")


def self_attention(
    x_TD: torch.Tensor,
    weights: StepWeights,
    config: ModelConfig,
    cache: KVCache,
    table_2TE: torch.Tensor,
) -> torch.Tensor:
    """Grouped-query attention of T new tokens over all positions up to each of them."""

    def heads(name: str) -> torch.Tensor:
        y = weights.linear(x_TD, f"self_attn.{name}_proj")
        return y.view(len(y), -1, config.head_dim).transpose(0, 1)

    interleaved = weights.interleaved_rope
    q_HTE = rotate(heads("q"), table_2TE, interleaved=interleaved)
    k_GTE = rotate(heads("k"), table_2TE, interleaved=interleaved)
    k_GPE, v_GPE = cache.append(weights.layer_idx, k_GTE, heads("v"))
    mixed_HTE = attend(q_HTE, k_GPE, v_GPE)
    return weights.linear(mixed_HTE.transpose(0, 1).flatten(1), "self_attn.o_proj")


def attend(q_HTE: torch.Tensor, k_GPE: torch.Tensor, v_GPE: torch.Tensor) -> torch.Tensor:
    """Softmax attention in which the T queries are the last T of the P positions."""
    tokens, positions = q_HTE.shape[1], k_GPE.shape[1]
    if tokens == 1:
        return _attend_one(q_HTE, k_GPE, v_GPE)
    group = q_HTE.shape[0] // k_GPE.shape[0]
    keys, values = (x.repeat_interleave(group, 0)[None] for x in (k_GPE, v_GPE))
    mask = None
    if tokens < positions:  # is_causal would align the queries with the first positions
        mask = torch.ones(tokens, positions, dtype=torch.bool, device=q_HTE.device)
        mask = mask.tril(positions - tokens)
    mixed = F.scaled_dot_product_attention(
        q_HTE[None], keys, values, attn_mask=mask, is_causal=mask is None
    )
    return mixed[0]


def _attend_one(q_H1E: torch.Tensor, k_GPE: torch.Tensor, v_GPE: torch.Tensor) -> torch.Tensor:
    """One query token. A batched product per group reads each key once; SDPA's own grouping
    is about ten times slower on a CPU."""
    heads, _, width = q_H1E.shape
    q_GRE = q_H1E.reshape(k_GPE.shape[0], -1, width)
    scores_GRP = torch.bmm(q_GRE, k_GPE.transpose(1, 2)).float() / math.sqrt(width)
    mixed_GRE = torch.bmm(scores_GRP.softmax(-1).to(v_GPE.dtype), v_GPE)
    return mixed_GRE.reshape(heads, 1, width)
