"""The feed-forward part of a layer: one block of three matrices, or a mixture of many.

Shapes are in the names of tensors, as in ``model``, and:
  X experts of a layer       K of them that a token passes
  S of T tokens, those that pass one expert
"""

from __future__ import annotations

from functools import partial

import torch

from ..kernels import fused
from ..weights.weights import StepWeights
from .config import ModelConfig
from .experts import Experts
from .mixing import Product, block, mix
from .modules import ROUTER, SHARED, SHARED_GATE


def feed_forward(x_TD: torch.Tensor, weights: StepWeights, config: ModelConfig) -> torch.Tensor:
    """What the layer has of the two, over tokens that are normed."""
    experts = config.mixture(weights.layer_idx)
    if experts is None:
        return block(x_TD, _of(weights, "mlp"), weights, config)
    mixed_TD = mix(x_TD, *choose(x_TD, weights, experts), weights, config)
    if not experts.shared_width:
        return mixed_TD
    return mixed_TD.add_(shared(x_TD, weights, config))


def shared(x_TD: torch.Tensor, weights: StepWeights, config: ModelConfig) -> torch.Tensor:
    """What the expert that every token passes makes of it, as its gate says."""
    gate_T1 = weights.linear(x_TD, SHARED_GATE)
    (gate_T1,) = weights.arithmetic.each(lambda gates: (gates.sigmoid(),), gate_T1)
    return block(x_TD, _of(weights, SHARED), weights, config).mul_(gate_T1)


def _of(weights: StepWeights, block: str) -> Product:
    return lambda x_TD, matrix: weights.linear(x_TD, f"{block}.{matrix}")


def choose(
    x_TD: torch.Tensor, weights: StepWeights, experts: Experts
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``route`` says of tokens, each one's experts in ascending order."""
    logits_TX = weights.linear(x_TD, ROUTER)
    if weights.arithmetic.by_slot and fused.kernel_chooses(logits_TX):
        each, normed = experts.per_token, experts.normed
        return fused.choose(
            logits_TX, each, normed=normed, rounded=experts.rounded, over_chosen=experts.of_chosen
        )
    ids_TK, shares_TK = weights.arithmetic.each(partial(route, experts=experts), logits_TX)
    ids_TK, order_TK = ids_TK.sort()
    return ids_TK, shares_TK.gather(1, order_TK)


def route(logits_TX: torch.Tensor, experts: Experts) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts with each token's largest logits, int64, and what each of them counts: its share
    in a softmax, float32, which may have been rounded to the logits' dtype."""
    if experts.of_chosen:
        chosen_TK, ids_TK = torch.topk(logits_TX, experts.per_token)
        shares_TK = torch.softmax(chosen_TK, -1, dtype=torch.float32)
    else:
        shares_TX = torch.softmax(logits_TX, -1, dtype=torch.float32)
        shares_TK, ids_TK = torch.topk(shares_TX, experts.per_token)
    if experts.normed and not experts.of_chosen:
        shares_TK /= shares_TK.sum(-1, keepdim=True)
    if experts.rounded:
        shares_TK = shares_TK.to(logits_TX.dtype).float()
    return ids_TK, shares_TK
