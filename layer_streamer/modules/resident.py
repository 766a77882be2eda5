"""Blocks that all stay on one device: they have their weights for good, and no pass is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TypeAlias

from torch import nn

from ..streamer import LayerStreamer, store_of
from .binding import Binder, Source
from .blocks import Block
from .runner import Runner

AnyRunner: TypeAlias = "Runner | ResidentRunner"


def give_weights(
    streamer: LayerStreamer,
    blocks: Sequence[Block],
    sources: Mapping[str, Source],
    *,
    strict: bool = False,
) -> AnyRunner:
    """Have the blocks get their weights from the streamer: those of a :class:`Runner`, for as long
    as it hands them out, or, if all stay on one GPU as they are, once."""
    plan = streamer.plan
    stays = set(plan.tiers) == {"device"} and len(streamer.devices) == 1
    stays = stays and store_of(streamer) is None  # experts that are brought need a pass
    found = (
        sources.get(f"{block.name}.{key}")
        for block, layer in zip(blocks, streamer.manifest.layers, strict=True)
        for key in layer.tensors
    )
    as_they_are = all(source is None or source.convert is None for source in found)
    # A CPU's memory goes when the streamer does, whoever computes with it then.
    if stays and as_they_are and not strict and not plan.machine.unified:
        return ResidentRunner(streamer, blocks, sources)
    return Runner(streamer, blocks, sources, strict=strict)


class ResidentRunner:
    """Has blocks whose layers stay on one device have their weights, until it is closed.

    A forward costs a look at the block's modules as it is entered: whoever has changed them, or has
    asked for a state without values, gets the weights back in. Thread rules: forwards on any
    threads, several at once, too; ``close`` from any thread, not during a forward.
    """

    detours = 1
    """As of a :class:`Runner`."""

    def __init__(
        self, streamer: LayerStreamer, blocks: Sequence[Block], sources: Mapping[str, Source]
    ) -> None:
        """Parameters: as of a :class:`Runner`."""
        self._names = tuple(block.name for block in blocks)
        keys = [tuple(layer.tensors) for layer in streamer.manifest.layers]
        self.binder = Binder(blocks, keys, sources, streamer.devices)
        self._weights = dict(streamer.sweep(on_host=False))
        """By layer. Of a resident one nothing goes when its hand-out ends."""
        self._handles = [
            block.module.register_forward_pre_hook(partial(self._enter, i), prepend=True)
            for i, block in enumerate(blocks)
        ]

    def names_in_order(self) -> tuple[str, ...]:
        """The blocks' names, in the streamer's order."""
        return self._names

    def close(self) -> None:
        """Put the blocks' parameters on meta again. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self.binder.release()
        self._weights.clear()

    def _enter(self, i: int, module: nn.Module, args: object) -> None:
        self.binder.bind(i, module, self._weights[i])
