"""What the experts that tokens have chosen make of them.

Shapes are in the names of tensors, as in ``feed_forward``, and:
  P pairs of a token and an expert that it passes: token by token, or sorted by experts
"""

from __future__ import annotations

from functools import partial

import torch

from ..kernels import fused
from ..weights.weights import StepWeights
from .config import ModelConfig
from .modules import MATRICES

FEW = 32
"""Tokens, of each of whose experts a program computes some rows, whoever else has chosen it. Of
more, those that pass one expert share its weights."""


def mix(
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    shares_TK: torch.Tensor,
    weights: StepWeights,
    config: ModelConfig,
) -> torch.Tensor:
    """The sum of what each token's experts make of it, each times what it counts. ``ids_TK``: of
    each token, ascending.

    Added up in float32, in the order of the experts' numbers. transformers rounds each term to the
    layer's dtype before, and adds them up in another order.
    """
    by_slot = goes_by_slot(x_TD, weights)
    if by_slot and len(x_TD) <= FEW:
        slots_P = weights.slots_of(ids_TK)
        if slots_P is not None:
            return mix_by_token(x_TD, slots_P, shares_TK, weights, config)
    experts = config.mixture(weights.layer_idx)
    assert experts is not None
    sorted_P, order_P = ids_TK.flatten().sort(stable=True)  # and of each expert by tokens
    ends = torch.searchsorted(sorted_P, torch.arange(experts.count, device=x_TD.device), right=True)
    way = _mix_by_expert if by_slot else _mix_one_by_one
    # The only wait for the device.
    return way(x_TD, (order_P, ends.tolist()), shares_TK, weights, config)


def goes_by_slot(x_TD: torch.Tensor, weights: StepWeights) -> bool:
    """True: ``mix_by_token`` can be called."""
    if not weights.on_demand or not weights.arithmetic.by_slot:
        return False
    kernels = fused.slot_kernels(x_TD.device)
    return kernels is not None and all(
        kernels.multiplies(weights.in_slots(matrix), x_TD) for matrix in MATRICES
    )


def mix_by_token(
    x_TD: torch.Tensor,
    slots_P: torch.Tensor,
    shares_TK: torch.Tensor,
    weights: StepWeights,
    config: ModelConfig,
) -> torch.Tensor:
    """``mix`` where experts lie in these slots, token by token: it waits for nothing."""
    kernels = fused.slot_kernels(x_TD.device)
    assert kernels is not None
    with fused.current(x_TD):
        pairs = kernels.one_by_one(slots_P)
        y_PD = x_TD.new_empty(len(slots_P), x_TD.shape[1])
        _products(x_TD, y_PD, pairs, weights, config)
        return kernels.add_up(y_PD, shares_TK)  # type: ignore[no-any-return]


Sorted = tuple[torch.Tensor, list[int]]
"""Which pair each of those sorted by experts was, token by token; where each expert's end."""


def _mix_by_expert(
    x_TD: torch.Tensor,
    pairs: Sorted,
    shares_TK: torch.Tensor,
    weights: StepWeights,
    config: ModelConfig,
) -> torch.Tensor:
    """As many experts at a time as there are slots, each over all tokens that pass it; meanwhile
    the next layer's are brought, where nearly all of them will be asked for."""
    kernels = fused.slot_kernels(x_TD.device)
    assert kernels is not None
    order_P, ends = pairs
    y_PD = x_TD.new_empty(len(order_P), x_TD.shape[1])
    with fused.current(x_TD):
        for part in weights.parts(_needed(ends)):
            where = weights.bring(part)
            assert where is not None, "parts are no more than there are slots"
            if len(order_P) > 2 * len(ends):
                weights.bring_ahead()
            routed = kernels.route(order_P, ends, [(expert, where[expert]) for expert in part])
            _products(x_TD, y_PD, routed, weights, config)
        return kernels.add_up(y_PD, shares_TK)  # type: ignore[no-any-return]


def _products(
    x_TD: torch.Tensor,
    y_PD: torch.Tensor,
    pairs: fused.Pairs,
    weights: StepWeights,
    config: ModelConfig,
) -> None:
    """Of pairs, down(activation(gate(x)) * up(x)), written to where they were token by token."""
    kernels = fused.slot_kernels(x_TD.device)
    assert kernels is not None
    gate, up, down = (weights.in_slots(matrix) for matrix in MATRICES)
    per_token = len(y_PD) // len(x_TD)
    gate_PF, up_PF = (x_TD.new_empty(len(y_PD), gate.rows) for _ in range(2))
    kernels.multiply(gate, x_TD, pairs, gate_PF, per_token=per_token)
    kernels.multiply(up, x_TD, pairs, up_PF, per_token=per_token)
    gated_PF = weights.arithmetic.gated(gate_PF, up_PF, config.family.activation)
    kernels.multiply(down, gated_PF, pairs, y_PD)


def _mix_one_by_one(
    x_TD: torch.Tensor,
    pairs: Sorted,
    shares_TK: torch.Tensor,
    weights: StepWeights,
    config: ModelConfig,
) -> torch.Tensor:
    """One expert after the other, over all tokens that pass it."""
    order_P, ends = pairs
    total_TD, starts = torch.zeros_like(x_TD, dtype=torch.float32), [0, *ends]
    tokens_P, shares_P1 = order_P // shares_TK.shape[1], shares_TK.flatten()[order_P, None]
    for expert in weights.experts(_needed(ends)):
        own = slice(starts[expert], ends[expert])
        tokens_S = tokens_P[own]
        product = partial(weights.expert, expert=expert)
        gate, up, down = MATRICES
        x_SD = x_TD[tokens_S]
        gated_SF = weights.arithmetic.gated(
            product(x_SD, matrix=gate), product(x_SD, matrix=up), config.family.activation
        )
        y_SD = product(gated_SF, matrix=down)
        total_TD.index_add_(0, tokens_S, y_SD.float().mul_(shares_P1[own]))
    return total_TD.to(x_TD.dtype)


def _needed(ends: list[int]) -> list[int]:
    starts = [0, *ends]
    return [expert for expert, end in enumerate(ends) if starts[expert] < end]
