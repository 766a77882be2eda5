"""The feed-forward part of a layer: one block of three matrices, or a mixture of many.

Shapes are in the names of tensors, as in ``model``, and:
  X experts of a layer       K of them that a token passes
  S of T tokens, those that pass one expert
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..weights.weights import StepWeights
from .config import ModelConfig
from .experts import Experts
from .modules import MATRICES, ROUTER, SHARED, SHARED_GATE

Product = Callable[[torch.Tensor, str], torch.Tensor]
"""(x, one of MATRICES) -> x times that matrix of a block, transposed."""


def feed_forward(x_TD: torch.Tensor, weights: StepWeights, config: ModelConfig) -> torch.Tensor:
    """What the layer has of the two, over tokens that are normed."""
    experts = config.mixture(weights.layer_idx)
    if experts is None:
        return _block(x_TD, _of(weights, "mlp"), weights, config)
    mixed_TD = _mixture(x_TD, weights, config, experts)
    if not experts.shared_width:
        return mixed_TD
    gate_T1 = weights.linear(x_TD, SHARED_GATE)
    (gate_T1,) = weights.arithmetic.each(lambda gates: (gates.sigmoid(),), gate_T1)
    return mixed_TD.add_(_block(x_TD, _of(weights, SHARED), weights, config).mul_(gate_T1))


def _of(weights: StepWeights, block: str) -> Product:
    return lambda x_TD, matrix: weights.linear(x_TD, f"{block}.{matrix}")


def _block(
    x_TD: torch.Tensor, product: Product, weights: StepWeights, config: ModelConfig
) -> torch.Tensor:
    """down(activation(gate(x)) * up(x))."""
    gate, up, down = MATRICES
    gate_TF, up_TF = product(x_TD, gate), product(x_TD, up)
    gated_TF = weights.arithmetic.gated(gate_TF, up_TF, config.family.activation)
    return product(gated_TF, down)


def _mixture(
    x_TD: torch.Tensor, weights: StepWeights, config: ModelConfig, experts: Experts
) -> torch.Tensor:
    """What the chosen experts make of each token, by what each counts.

    Added up in float32, in the order of the experts' numbers: so it matters to no bit which tokens
    share a pass, nor where an expert was. transformers rounds each term to the layer's dtype
    before, and adds them up in another order.
    """
    logits_TX = weights.linear(x_TD, ROUTER)
    ids_TK, shares_TK = weights.arithmetic.each(partial(route, experts=experts), logits_TX)
    total_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    # Sorted by experts, and of each by tokens. The only wait for the device is for how many.
    sorted_N, order_N = ids_TK.flatten().sort(stable=True)
    tokens_N, shares_N1 = order_N // experts.per_token, shares_TK.flatten()[order_N, None]
    ends = torch.searchsorted(
        sorted_N, torch.arange(experts.count, device=x_TD.device), right=True
    ).tolist()
    starts = [0, *ends]
    needed = [expert for expert, end in enumerate(ends) if starts[expert] < end]
    for expert in weights.experts(needed):
        own = slice(starts[expert], ends[expert])
        tokens_S = tokens_N[own]
        y_SD = _block(x_TD[tokens_S], partial(_expert, weights, expert), weights, config)
        total_TD.index_add_(0, tokens_S, y_SD.float().mul_(shares_N1[own]))
    return total_TD.to(x_TD.dtype)


def route(logits_TX: torch.Tensor, experts: Experts) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts with each token's largest logits, int64, and what each of them counts: its share
    in a softmax over all, float32, which may have been rounded to the logits' dtype."""
    shares_TX = torch.softmax(logits_TX, -1, dtype=torch.float32)
    shares_TK, ids_TK = torch.topk(shares_TX, experts.per_token)
    if experts.normed:
        shares_TK /= shares_TK.sum(-1, keepdim=True)
    if experts.rounded:
        shares_TK = shares_TK.to(logits_TX.dtype).float()
    return ids_TK, shares_TK


def _expert(weights: StepWeights, expert: int, x_SD: torch.Tensor, matrix: str) -> torch.Tensor:
    return weights.expert(x_SD, expert, matrix)
