"""Has the modules of experts of a streamed model compute with what is brought on demand."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from ...errors import StreamerError
from ...passes.layer_experts import LayerExperts
from ...streamer import LayerStreamer, store_of
from ..blocks import Block
from ..resident import AnyRunner
from ..runner import Runner
from ..unbound import OF_BLOCK, OF_EXPERTS, as_unbound, is_brought
from .forward import IMPLEMENTATION, LENDER, NO_GRADIENTS, register
from .places import Place, find_places


class Lender:
    """Lends one module its experts. Thread rules: those of the model's forward."""

    def __init__(self, runner: Runner, i: int, place: Place) -> None:
        """``i``: the number of the module's block."""
        self.blocks = runner.names
        self.banks = dict(zip(place.leaves, place.keys, strict=True))
        self._runner, self._i = runner, i
        self._name = f"{runner.names[i]}.{place.name}"

    def lend(self, module: nn.Module) -> LayerExperts:
        """The experts for ``module``, until the hand-out of the block's layer ends. StreamerError
        if it is not handed out, where gradients of experts are asked for, and where something has
        taken a parameter's place, which would go unseen."""
        for leaf in self.banks:
            whole = module._parameters.get(leaf)
            if whole is None or not is_brought(whole):
                raise StreamerError(
                    f"{self._name}.{leaf} was replaced or wrapped: experts that are brought on "
                    "demand have no adapters; experts='whole' streams them as parameters"
                )
            if torch.is_grad_enabled() and whole.requires_grad:
                raise StreamerError(NO_GRADIENTS)
        experts = self._runner.experts_of(self._i)
        if experts is None:
            raise StreamerError(f"{self._name} is used {OF_BLOCK}")
        return experts


def lend_experts(blocks: Sequence[Block], runner: AnyRunner, streamer: LayerStreamer) -> None:
    """Have the blocks' experts be those of the layers that ``runner`` hands out, if ``streamer``
    brings them on demand.

    Their parameters are on meta for good, and say so by name. The implementation is named in
    configurations that are the modules' own: the model's, which other models may share, stays.
    """
    if not isinstance(runner, Runner) or store_of(streamer) is None:
        return
    register()
    configs = dict[int, tuple[Any, Any]]()
    for i, block in enumerate(blocks):
        for place in find_places(block.module):
            module: Any = place.module
            for leaf in place.leaves:
                whole, name = module._parameters[leaf], f"{block.name}.{place.name}.{leaf}"
                module._parameters[leaf] = as_unbound(whole, name, streamer.device, OF_EXPERTS)
            shared = module.config
            if id(shared) not in configs:
                configs[id(shared)] = shared, deepcopy(shared)
            module.config = configs[id(shared)][1]
            module.config._experts_implementation = IMPLEMENTATION
            module.__dict__[LENDER] = Lender(runner, i, place)
