"""What a streamed model has as ``.layer_streamer``: plans, reports, and its end."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from torch import nn

from ..errors import ClosedError
from ..passes.expert_report import ExpertReport
from ..planning.budget import format_bytes
from ..planning.plan import Plan
from ..streamer import LayerStreamer, store_of
from ..transport.stats import PassReport
from .blocks import Block
from .ends.choice import Division
from .mixtures.slots import ExpertSlots, slots_of
from .resident import AnyRunner, ResidentRunner


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """Where a model's weights live. ``str()`` of it is a table for each sequence of blocks."""

    sequences: Mapping[str, Plan]
    """By name of the first list of its blocks: "model.layers"; of a head that streams, by its own
    name, last: its layers are chunks of rows."""
    outside_nbytes: int
    """Bytes on the first device of what is in no block, and of what is made by arithmetic."""
    reserve_nbytes: int
    """Bytes of the budget that are left to activations and caches."""
    head: str | None
    """Name of the output head, if it streams."""
    tables: Mapping[str, int]
    """By name, bytes of the embeddings whose rows are taken from host memory."""
    adapter_nbytes: int
    """Bytes of parameters that the model has got since it was opened (adapters): resident, and no
    part of the budget."""
    detours: Mapping[str, int]
    """By sequence, how many passes a forward takes that comes to its blocks in another order; with
    ``stacks=`` of :attr:`ModuleStreamer.order` it takes one."""
    experts: Mapping[str, ExpertSlots]
    """By sequence, the slots of experts that are brought on demand."""

    def __str__(self) -> str:
        by_rows = {self.head: " (its rows stream, in chunks)"}
        lines = [f"{name}{by_rows.get(name, '')}:\n{plan}" for name, plan in self.sequences.items()]
        for name, slots in self.experts.items():
            lines.append(f"{name}: experts on demand: {slots}")
        lines.append(f"outside the blocks, resident: {format_bytes(self.outside_nbytes)}")
        for name, nbytes in self.tables.items():
            lines.append(f"rows from host memory: {name}, {format_bytes(nbytes)}")
        if self.adapter_nbytes:
            lines.append(f"adapters, resident: {format_bytes(self.adapter_nbytes)}")
        for name, passes in self.detours.items():
            lines.append(
                f"{name}: a forward comes to its blocks in another order and takes {passes} passes:"
                " open it with stacks=model.layer_streamer.order, and it takes one"
            )
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
        model: nn.Module,
        streamers: Mapping[str, LayerStreamer],
        runners: Mapping[str, AnyRunner],
        blocks: Iterable[Block],
        division: Division,
        reserve_nbytes: int,
    ) -> None:
        self._streamers = dict(streamers)
        self._runners = dict(runners)
        # The model holds this, and not the other way round.
        self._blocks = [(block.name, weakref.ref(block.module)) for block in blocks]
        self._model = weakref.ref(model)
        self._own = weakref.WeakValueDictionary({id(p): p for p in model.parameters()})
        self._outside_nbytes = division.kept[0]
        self._head = next((m.head.name for m in division.away if m.head is not None), None)
        self._tables = {m.name: m.nbytes for m in division.away if m.tables}
        self._reserve_nbytes = reserve_nbytes
        stores = {name: store_of(streamer) for name, streamer in streamers.items()}
        self._experts = {n: slots_of(store) for n, store in stores.items() if store is not None}

    @property
    def plan(self) -> ModulePlan:
        """Where the weights live, how they are read, predicted seconds; also after close."""
        plans = {name: streamer.plan for name, streamer in self._streamers.items()}
        return ModulePlan(
            sequences=plans,
            outside_nbytes=self._outside_nbytes,
            reserve_nbytes=self._reserve_nbytes,
            head=self._head,
            tables=self._tables,
            adapter_nbytes=self._adapter_nbytes(),
            detours={n: r.detours for n, r in self._runners.items() if r.detours > 1},
            experts=self._experts,
        )

    @property
    def order(self) -> tuple[str, ...]:
        """Names of all blocks, in the order in which the first forward came to those of each
        sequence, for ``stream(stacks=)``: in that order each forward takes one pass of each."""
        return tuple(name for runner in self._runners.values() for name in runner.names_in_order())

    @property
    def last_pass(self) -> dict[str, PassReport]:
        """By sequence, where the time of its last finished pass went; without those that had none:
        of blocks that all stay on a GPU none is made.

        Waits until the device has done these passes.
        """
        reports = {
            name: streamer.last_pass
            for name, streamer in self._streamers.items()
            if not isinstance(self._runners.get(name), ResidentRunner)
        }
        return {name: report for name, report in reports.items() if report is not None}

    @property
    def last_experts(self) -> dict[str, ExpertReport]:
        """By sequence whose experts are brought on demand, what became of those that its last
        finished pass asked for. ClosedError after ``close``."""
        reports = {name: self._streamers[name].last_experts for name in self._experts}
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

    def _adapter_nbytes(self) -> int:
        """Of what is real in the model, does not stream and was not there when it was opened."""
        model = self._model()
        streamed = {i for runner in self._runners.values() for i in runner.binder.tensor_ids()}
        found = model.parameters() if model is not None else ()
        return sum(
            p.nbytes
            for p in found
            if not p.is_meta and id(p) not in streamed and self._own.get(id(p)) is not p
        )

    def __repr__(self) -> str:
        state = "closed" if self.closed else ", ".join(self._streamers)
        return f"<ModuleStreamer ({state})>"


def _refuse(name: str, module: nn.Module, args: object) -> NoReturn:
    raise ClosedError(f"{name}: its weights do not stream any more: layer_streamer was closed")
