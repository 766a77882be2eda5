"""What experts compute where they are brought on demand: an implementation of transformers' own
interface, told the experts' module, hidden states, and the experts and weights of each token.

Experts come in ascending order, and each adds to its tokens alone; sums are in float32. So no bit
depends on which slots there are, what is in them, or in how many parts experts come. In float32 it
is the order of transformers' "eager" implementation, operation by operation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import StreamerError
from ...passes.layer_experts import LayerExperts
from ..refusals import name_block

IMPLEMENTATION = "layer_streamer"
"""Its name in transformers' registry."""
LENDER = "_layer_streamer_experts"
"""Attribute of a module of experts: who lends it some."""
NO_GRADIENTS = (
    "gradients are asked for through experts that are brought on demand: run the forward under "
    "torch.no_grad(), or stream with experts='whole'"
)


class Lends(Protocol):
    """Lends a module its experts while its block's layer is handed out."""

    banks: Mapping[str, str]
    """By name of the module's parameter, the bank's."""
    blocks: Sequence[str]
    """Names of all blocks, by number of their layers."""

    def lend(self, module: nn.Module) -> LayerExperts:
        """The experts for ``module``. StreamerError while the layer is not handed out."""


class Routes(NamedTuple):
    """Which tokens go to which expert. Tensors lie on the device of the hidden states."""

    experts: list[int]
    """Those that are asked for, ascending."""
    ends: list[int]
    """By number of an expert, whichever it is: where its part of what follows ends."""
    token_N: torch.Tensor
    """int64; for each expert in turn its tokens."""
    choice_N: torch.Tensor
    """int64; which of the token's choices the expert is."""


def register() -> None:
    """Let transformers know of the implementation, beside its own; none of these is touched."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(IMPLEMENTATION, compute_experts)


def compute_experts(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What the experts make of ``hidden_states`` (tokens, width): the same shape and dtype.

    ``top_k_index`` (tokens, choices): integers; numbers past the last expert ask for none.
    ``top_k_weights``: of the same shape. Waits for the choices, if they are on a device.
    StreamerError for a model that does not stream, where gradients are asked for or torch.compile
    traces, and outside of the forward of the module's block; what loading raises, with the block's
    name.
    """
    lender: Lends | None = vars(module).get(LENDER)
    if lender is None:
        raise StreamerError(
            f"experts_implementation={IMPLEMENTATION!r} is for models that layer_streamer.stream("
            "..., experts='demand') has opened"
        )
    if torch.compiler.is_compiling():
        raise StreamerError("experts that are brought on demand cannot be traced by torch.compile")
    if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
        raise StreamerError(NO_GRADIENTS)
    try:
        return _add_up(module, lender, (hidden_states, top_k_index, top_k_weights))
    except StreamerError as error:
        name_block(error, lender.blocks)
        raise


def _add_up(
    module: Any, lender: Lends, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    x_TH, choices_TK, weights_TK = inputs
    experts = lender.lend(module)
    banks = {leaf: experts.bank(name) for leaf, name in lender.banks.items()}
    routes = find_routes(choices_TK, len(experts), x_TH.device)
    total_TH = torch.zeros_like(x_TH, dtype=torch.promote_types(x_TH.dtype, torch.float32))
    for part, _ in experts.rounds(routes.experts):
        for expert in part:
            at = slice(routes.ends[expert - 1] if expert else 0, routes.ends[expert])
            token_N, choice_N = routes.token_N[at], routes.choice_N[at]
            own = {leaf: bank[experts.where[expert]] for leaf, bank in banks.items()}
            y_NH = _compute(module, own, x_TH[token_N]) * weights_TK[token_N, choice_N, None]
            total_TH.index_add_(0, token_N, y_NH.to(total_TH.dtype))
    return total_TH.to(x_TH.dtype)


def find_routes(choices_TK: torch.Tensor, num_experts: int, device: torch.device) -> Routes:
    """Sort choices by expert; those of one are by choice first, then by token, as transformers has
    them: kernels may look at the order of rows."""
    chosen = choices_TK.t().reshape(-1).cpu()
    order = chosen.argsort(stable=True)
    counts = chosen.bincount(minlength=num_experts)[:num_experts]
    experts: list[int] = counts.nonzero().flatten().tolist()
    ends: list[int] = counts.cumsum(0).tolist()
    if device.type == "cuda":  # else the host waits until experts on their way have been copied
        order = order.pin_memory()
    order = order.to(device, non_blocking=True)
    tokens = max(len(choices_TK), 1)
    return Routes(experts, ends, order % tokens, order // tokens)


def _compute(module: Any, own: Mapping[str, torch.Tensor], x_NH: torch.Tensor) -> torch.Tensor:
    """One expert's part: up, gate or activation, down."""
    if module.has_gate:
        x_NI = module._apply_gate(_project(module, own, "gate_up_proj", x_NH))
    else:
        x_NI = module.act_fn(_project(module, own, "up_proj", x_NH))
    y_NH = _project(module, own, "down_proj", x_NI)
    return module.post_expert_norm(y_NH) if getattr(module, "has_post_expert_norm", False) else y_NH


def _project(
    module: nn.Module, own: Mapping[str, torch.Tensor], leaf: str, x: torch.Tensor
) -> torch.Tensor:
    y = x @ own[leaf] if module.is_transposed else F.linear(x, own[leaf])
    bias = own.get(f"{leaf}_bias")
    return y if bias is None else y + bias
