"""What a streamed model has as ``.layer_streamer``: plans, reports, and its end."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from torch import nn

from ..errors import ClosedError
from ..planning.budget import format_bytes
from ..planning.plan import Plan
from ..streamer import LayerStreamer
from ..transport.stats import PassReport
from .blocks import Block
from .runner import Runner


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """Where a model's weights live. ``str()`` of it is a table for each sequence of blocks."""

    sequences: Mapping[str, Plan]
    """By name of the first list of its blocks: "model.layers"."""
    outside_nbytes: int
    """Bytes on the first device of what is in no block, and of what is made by arithmetic."""
    reserve_nbytes: int
    """Bytes of the budget that are left to activations and caches."""

    def __str__(self) -> str:
        lines = [f"{name}:\n{plan}" for name, plan in self.sequences.items()]
        lines.append(f"outside the blocks, resident: {format_bytes(self.outside_nbytes)}")
        if self.reserve_nbytes:
            left = format_bytes(self.reserve_nbytes)
            lines.append(f"left to activations and caches: {left} (reserve_bytes)")
        return "\n".join(lines)


class ModuleStreamer:
    """Streams the blocks of one model. Closed when the model goes, if not before.

    Thread rules: those of the model, one forward at a time; ``close`` from any thread.
    """

    def __init__(
        self,
        streamers: Mapping[str, LayerStreamer],
        runners: Mapping[str, Runner],
        blocks: Iterable[Block],
        outside_nbytes: int,
        reserve_nbytes: int,
    ) -> None:
        self._streamers = dict(streamers)
        self._runners = dict(runners)
        # The model holds this, and not the other way round.
        self._blocks = [(block.name, weakref.ref(block.module)) for block in blocks]
        self._outside_nbytes = outside_nbytes
        self._reserve_nbytes = reserve_nbytes

    @property
    def plan(self) -> ModulePlan:
        """Where the weights live, how they are read, predicted seconds; also after close."""
        plans = {name: streamer.plan for name, streamer in self._streamers.items()}
        return ModulePlan(plans, self._outside_nbytes, self._reserve_nbytes)

    @property
    def last_pass(self) -> dict[str, PassReport]:
        """By sequence, where the time of its last finished pass went; without those that had none.

        Waits until the device has done these passes.
        """
        reports = {name: streamer.last_pass for name, streamer in self._streamers.items()}
        return {name: report for name, report in reports.items() if report is not None}

    @property
    def closed(self) -> bool:
        """True after ``close``. Thread rules: any thread."""
        return all(streamer.closed for streamer in self._streamers.values())

    def close(self) -> None:
        """Stop streaming, and return slots, threads and descriptors: blocks have no weights then.

        What is outside of them stays. Idempotent, any thread.
        """
        if not self.closed:
            for name, known in self._blocks:
                if (module := known()) is not None:
                    module.register_forward_pre_hook(partial(_refuse, name), prepend=True)
        for runner in self._runners.values():
            runner.close()
        for streamer in self._streamers.values():
            streamer.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else ", ".join(self._streamers)
        return f"<ModuleStreamer ({state})>"


def _refuse(name: str, module: nn.Module, args: object) -> NoReturn:
    raise ClosedError(f"{name}: its weights do not stream any more: layer_streamer was closed")
