"""The decoder layer of LLaMA and its relatives, as plain functions over one layer's weights.

Shapes are in the names of tensors:
  T tokens of this pass, of one sequence or of several packed one after the other
  D hidden size              F width of the feed-forward block
  H query heads              G key-value heads
  E width of a head
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..weights.weights import StepWeights
from .config import ModelConfig
from .feed_forward import feed_forward
from .rope import rotate_both

Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer_idx, q_HTE, k_GTE, v_GTE) -> mixed_HTE. Gets one layer's new queries, keys and values,
normed and, where the layer was given a table, rotated; stores the keys and values, and knows which
tokens each query sees."""


def decoder_layer(
    x_TD: torch.Tensor,
    weights: StepWeights,
    config: ModelConfig,
    table_2TE: torch.Tensor | None,
    attention: Attention,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """One layer: attention and feed-forward, each over a norm and added to its input.

    ``table_2TE`` are the rows of ``Rotary`` for this layer and these tokens; None: attention
    rotates by itself. The result is written to ``out``, if given, which may be x_TD; else x_TD is
    not changed.
    """
    qkv = attention_inputs(x_TD, weights, config, table_2TE)
    mixed_HTE = attention(weights.layer_idx, *qkv)
    return attended(x_TD, mixed_HTE, weights, config, out=out)


BLOCK_NORMS = {
    False: ("input_layernorm", "post_attention_layernorm"),
    True: ("input_layernorm", "pre_feedforward_layernorm"),
}
"""The norms before attention and feed-forward. What LLaMA calls after its place, after attention,
Gemma 3 calls after its place before the feed-forward block: there, attention's output has one."""


def attention_inputs(
    x_TD: torch.Tensor,
    weights: StepWeights,
    config: ModelConfig,
    table_2TE: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer up to its attention: queries (H, T, E), keys and values (G, T, E)."""
    norm = weights.norm(BLOCK_NORMS[config.family.output_norms][0])
    normed_TD = weights.arithmetic.rms_norm(x_TD, norm, config.norm_eps)

    def heads(name: str, *, normed: bool = False) -> torch.Tensor:
        y = weights.linear(normed_TD, f"self_attn.{name}_proj")
        if normed:
            weight = weights.norm(f"self_attn.{name}_norm")
            y = weights.arithmetic.rms_norm(y.view(-1, len(weight)), weight, config.norm_eps)
        if config.clip_qkv is not None:
            y = y.clamp_(-config.clip_qkv, config.clip_qkv)
        return y.view(len(x_TD), -1, config.head_dim).transpose(0, 1)

    normed = config.family.head_norms or config.family.width_norms
    q_HTE, k_GTE = (heads(name, normed=normed) for name in "qk")
    if table_2TE is not None:
        interleaved = weights.interleaved_rope
        q_HTE, k_GTE = rotate_both(q_HTE, k_GTE, table_2TE, interleaved=interleaved)
    return q_HTE, k_GTE, heads("v")


def attended(
    x_TD: torch.Tensor,
    mixed_HTE: torch.Tensor,
    weights: StepWeights,
    config: ModelConfig,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """A layer from its attention's mixed values on. What ``out`` gets is written last."""
    x_TD, normed_TD = attention_added(x_TD, mixed_HTE, weights, config)
    return fed(x_TD, feed_forward(normed_TD, weights, config), weights, config, out=out)


def attention_added(
    x_TD: torch.Tensor, mixed_HTE: torch.Tensor, weights: StepWeights, config: ModelConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """x with what attention adds, and what the feed-forward block gets of it."""
    arithmetic, eps = weights.arithmetic, config.norm_eps
    added = weights.linear(mixed_HTE.transpose(0, 1).flatten(1), "self_attn.o_proj")
    if config.family.output_norms:
        added = arithmetic.rms_norm(added, weights.norm("post_attention_layernorm"), eps)
    norm = weights.norm(BLOCK_NORMS[config.family.output_norms][1])
    return arithmetic.add_rms_norm(x_TD, added, norm, eps)


def fed(
    x_TD: torch.Tensor,
    added: torch.Tensor,
    weights: StepWeights,
    config: ModelConfig,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x with what the feed-forward block adds. ``out`` is written last."""
    if config.family.output_norms:
        norm = weights.norm("post_feedforward_layernorm")
        added = weights.arithmetic.rms_norm(added, norm, config.norm_eps)
    return torch.add(x_TD, added, out=out)
