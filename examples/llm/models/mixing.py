"""What the experts that tokens have chosen make of them.

Shapes are in the names of tensors, as in ``feed_forward``, and:
  P pairs of a token and an expert that it passes: token by token, or sorted by experts
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from ..kernels import fused
from ..weights.packed import Packed
from ..weights.weights import StepWeights
from .config import ModelConfig
from .experts import Clamp
from .modules import MATRICES

Product = Callable[[torch.Tensor, str], torch.Tensor]
"""(x, one of MATRICES) -> x times that matrix of a block, transposed."""
FEW = 32
"""Tokens, of each of whose experts a program computes some rows, whoever else has chosen it. Of
more, those that pass one expert share its weights."""
CROWD = 16
"""Pairs of each expert, in the mean: of so many, nearly all experts have some, and nobody waits to
hear which."""


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
    if len(x_TD) <= FEW and goes_by_token(x_TD, weights):
        slots_P = weights.slots_of(ids_TK)
        if slots_P is not None:
            return mix_by_token(x_TD, slots_P, shares_TK, weights, config)
    experts = config.mixture(weights.layer_idx)
    assert experts is not None
    by_expert = _goes_by_expert(x_TD, weights)
    if by_expert and ids_TK.numel() >= CROWD * experts.count:
        slots_X = weights.all_slots()
        if slots_X is not None:
            return _mix_all(x_TD, ids_TK, slots_X, shares_TK, weights, config)
    sorted_P, order_P = ids_TK.flatten().sort(stable=True)  # and of each expert by tokens
    ends = torch.searchsorted(sorted_P, torch.arange(experts.count, device=x_TD.device), right=True)
    way = _mix_by_expert if by_expert else _mix_one_by_one
    # The only wait for the device.
    return way(x_TD, (order_P, ends.tolist()), shares_TK, weights, config)


def expect(x_TD: torch.Tensor, weights: StepWeights, config: ModelConfig) -> None:
    """Have the experts of a pass's first layer on their way before its attention is enqueued, as
    those of all others are, where these tokens pass nearly all of them."""
    experts = config.mixture(weights.layer_idx)
    if experts is None or not weights.on_demand:
        return
    if len(x_TD) * experts.per_token >= CROWD * experts.count:
        weights.bring_own_ahead()


def goes_by_token(x_TD: torch.Tensor, weights: StepWeights) -> bool:
    """True: ``mix_by_token`` can be called."""
    if not weights.on_demand or not weights.arithmetic.by_slot:
        return False
    banks = (weights.in_slots(matrix) for matrix in MATRICES)
    return all(fused.slots_multiply(bank, x_TD) or _in_tiles(bank, x_TD) for bank in banks)


def _goes_by_expert(x_TD: torch.Tensor, weights: StepWeights) -> bool:
    """True: ``_mix_by_expert`` can be called."""
    if not weights.on_demand or not weights.arithmetic.by_slot:
        return False
    return all(_in_tiles(weights.in_slots(matrix), x_TD) for matrix in MATRICES)


def _in_tiles(bank: Packed, x_TD: torch.Tensor) -> bool:
    kernels = fused.slot_kernels(x_TD.device)
    return kernels is not None and bool(kernels.multiplies(bank, x_TD))


def mix_by_token(
    x_TD: torch.Tensor,
    slots_P: torch.Tensor,
    shares_TK: torch.Tensor,
    weights: StepWeights,
    config: ModelConfig,
) -> torch.Tensor:
    """``mix`` where experts lie in these slots, token by token: it waits for nothing."""
    gate, up, down = (weights.in_slots(matrix) for matrix in MATRICES)
    each = shares_TK.shape[1]
    gate_PF, up_PF = _multiply_slots((gate, up), x_TD, slots_P, each)
    gated_PF = _gated(gate_PF, up_PF, weights, config)
    (down_PD,) = _multiply_slots((down,), gated_PF, slots_P, 1)
    return fused.combine(down_PD, shares_TK)


def _multiply_slots(
    banks: Sequence[Packed], x: torch.Tensor, slots_P: torch.Tensor, per_x: int
) -> torch.Tensor:
    """Of each pair, a row of x, which so many share, times its expert's matrices, which are of one
    shape: (banks, P, rows)."""
    if all(fused.slots_multiply(bank, x) for bank in banks):
        return fused.multiply_slots(banks, x, slots_P, per_x)
    kernels = fused.slot_kernels(x.device)
    y_BPN = x.new_empty(len(banks), len(slots_P), banks[0].rows)
    assert kernels is not None
    with fused.current(x):
        for bank, y_PN in zip(banks, y_BPN, strict=True):
            kernels.multiply(bank, x, kernels.one_by_one(slots_P), y_PN, per_token=per_x)
    return y_BPN


def _gated(
    gate_PF: torch.Tensor, up_PF: torch.Tensor, weights: StepWeights, config: ModelConfig
) -> torch.Tensor:
    """What the last matrices get, perhaps in the memory of ``gate``."""
    clamp = None if config.experts is None else config.experts.clamp
    if clamp is None:
        return weights.arithmetic.gated(gate_PF, up_PF, config.family.activation)
    return fused.clamped_gates(gate_PF, up_PF, clamp.alpha, clamp.limit)


Sorted = tuple[torch.Tensor, list[int]]
"""Which pair each of those sorted by experts was, token by token; where each expert's end."""


def _mix_all(
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    slots_X: torch.Tensor,
    shares_TK: torch.Tensor,
    weights: StepWeights,
    config: ModelConfig,
) -> torch.Tensor:
    """All experts of the layer, which are in these slots, over all tokens that pass them, while the
    next layer's come: it waits for nothing."""
    kernels = fused.slot_kernels(x_TD.device)
    assert kernels is not None
    y_PD = x_TD.new_empty(ids_TK.numel(), x_TD.shape[1])
    with fused.current(x_TD):
        routed = kernels.route_all(ids_TK, slots_X)
        _pass_through(x_TD, routed, y_PD, weights, config)
        weights.bring_ahead()
    return fused.combine(y_PD, shares_TK)


def _pass_through(
    x_TD: torch.Tensor,
    routed: fused.Pairs,
    y_PD: torch.Tensor,
    weights: StepWeights,
    config: ModelConfig,
) -> None:
    """Have y of the pairs that are routed, token by token."""
    kernels, each = fused.slot_kernels(x_TD.device), len(y_PD) // len(x_TD)
    assert kernels is not None
    gate, up, down = (weights.in_slots(matrix) for matrix in MATRICES)
    gate_PF, up_PF = x_TD.new_empty(2, len(routed.order_P), gate.rows)
    kernels.multiply(gate, x_TD, routed, gate_PF, per_token=each)
    kernels.multiply(up, x_TD, routed, up_PF, per_token=each)
    kernels.multiply(down, _gated(gate_PF, up_PF, weights, config), routed, y_PD)


def _mix_by_expert(
    x_TD: torch.Tensor,
    pairs: Sorted,
    shares_TK: torch.Tensor,
    weights: StepWeights,
    config: ModelConfig,
) -> torch.Tensor:
    """Experts in rounds, each over all tokens that pass it, while the next round's come, or the
    next layer's, where nearly all of them will be asked for."""
    kernels = fused.slot_kernels(x_TD.device)
    assert kernels is not None
    (order_P, ends), starts = pairs, [0, *pairs[1]]
    y_PD = x_TD.new_empty(len(order_P), x_TD.shape[1])
    with fused.current(x_TD):
        for where in weights.rounds(_needed(ends)):
            first, last = starts[min(where)], ends[max(where)]
            shifted = [end - first for end in ends]
            routed = kernels.route(order_P[first:last], shifted, sorted(where.items()))
            _pass_through(x_TD, routed, y_PD, weights, config)
        # Once the device has its work: what is on its way meanwhile takes longer than that.
        if len(order_P) > 2 * len(ends):
            weights.bring_ahead()
    return fused.combine(y_PD, shares_TK)


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
        product = partial(_expert, weights, expert)
        y_SD = block(x_TD[tokens_S], product, weights, config)
        total_TD.index_add_(0, tokens_S, y_SD.float().mul_(shares_P1[own]))
    return total_TD.to(x_TD.dtype)


def _expert(weights: StepWeights, expert: int, x_SD: torch.Tensor, matrix: str) -> torch.Tensor:
    return weights.expert(x_SD, expert, matrix)


def block(
    x_TD: torch.Tensor, product: Product, weights: StepWeights, config: ModelConfig
) -> torch.Tensor:
    """down(activation(gate(x)) * up(x))."""
    gate, up, down = MATRICES
    gate_TF, up_TF = product(x_TD, gate), product(x_TD, up)
    clamp = None if config.experts is None else config.experts.clamp
    if clamp is None:
        gated_TF = weights.arithmetic.gated(gate_TF, up_TF, config.family.activation)
    else:
        both_T2F = torch.cat((gate_TF, up_TF), 1)
        (gated_TF,) = weights.arithmetic.each(partial(clamped, clamp=clamp), both_T2F)
    return product(gated_TF, down)


def clamped(both_T2F: torch.Tensor, clamp: Clamp) -> tuple[torch.Tensor]:
    """(up + 1) * gate * sigmoid(alpha * gate) of gate and up side by side, both clamped."""
    gate_TF, up_TF = both_T2F.chunk(2, -1)
    gate_TF, up_TF = gate_TF.clamp(max=clamp.limit), up_TF.clamp(-clamp.limit, clamp.limit)
    return ((up_TF + 1) * (gate_TF * torch.sigmoid(gate_TF * clamp.alpha)),)


def _needed(ends: list[int]) -> list[int]:
    starts = [0, *ends]
    return [expert for expert, end in enumerate(ends) if starts[expert] < end]
