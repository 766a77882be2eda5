"""One device of a pipeline: the threads that bring its steps into its slots."""

from __future__ import annotations

from ..planning.settings import Settings
from .copier import Copier, Memcpy
from .files import OpenFiles
from .lane_memory import LaneMemory
from .reader import Feeder, Reader
from .schedule import Schedule
from .stage import Bell, Control, LaneRun, Post, Progress, Run, Stage


class Lane:
    """Threads and streams of one device, over its slots.

    Ownership: built by the pipeline; its stages own what their classes say.
    """

    def __init__(
        self,
        lane_idx: int,
        memory: LaneMemory,
        schedule: Schedule,
        files: OpenFiles,
        settings: Settings,
        ends: tuple[Control, Bell],
    ) -> None:
        """``ends``: what every thread of the pipeline looks at, and the caller's bell."""
        self.memory = memory
        self.device = memory.device
        self._num_readers = settings.num_readers
        control, caller_bell = ends
        on_copy, reads = settings.asked["on_copy"], any(memory.parts.counts.values())
        moves = any(memory.layouts[i].copies for i in memory.passes)
        idle = memory.in_place and on_copy is None and not moves
        there: dict[type[Stage], bool] = {
            Feeder: reads,
            Memcpy: len(memory.host_pools) == 2,
            Copier: len(memory.passes) > 0 and not idle,
        }
        kinds = [kind for kind, needed in there.items() if needed]
        bells = [Bell(), *(Bell() for _ in kinds), caller_bell]
        """Of each stage, between those of nobody and the caller."""
        posts = {
            kind: Post(control, lane_idx, schedule, bells[i : i + 3], bells[1])
            for i, kind in enumerate(kinds)
        }
        self.reader: Reader | None = None
        self.copier: Copier | None = None
        self.stages: list[Stage] = []
        """In the order that steps pass through them."""
        if Memcpy in posts:
            self.stages.append(Memcpy(posts[Memcpy], memory))
        if Copier in posts:
            self.copier = Copier(posts[Copier], memory, on_copy)
            self.stages.append(self.copier)
        if Feeder in posts:
            self.reader = Reader(posts[Feeder], memory, files)
            feeder = Feeder(posts[Feeder], memory, self.reader, tuple(self.stages))
            self.stages.insert(0, feeder)
        self.filler_bell = bells[1] if posts else bells[0]
        """Rung when the caller gives a slot back: of the stage that fills it."""
        if self.copier is not None and not memory.in_place:
            self.filler_bell = self.copier.bell

    def new_run(self, run: Run) -> LaneRun:
        """The lane's part of a run that begins."""
        orders, batches = self.memory.orders(run.heading), self.memory.batches
        read = Progress(batches.read, orders.read)
        # A stage that is left out shows the progress of the one before it.
        two_pools = len(self.memory.host_pools) == 2
        staged = Progress(batches.staged, orders.read) if two_pools else read
        copied = staged
        if self.copier is not None:
            copied = Progress(batches.copied, orders.copied)
        return LaneRun(run, orders, read, staged, copied)

    def start(self) -> None:
        """Start the threads; they wait for a run."""
        if self.reader is not None:
            self.reader.start(self._num_readers)
        for stage in self.stages:
            stage.start()

    def wait_device(self) -> None:
        """No copy and no compute uses the slots or the resident layers any more."""
        with self.device.guard():
            if self.copier is not None:
                self.copier.stream.synchronize()
            self.memory.wait_unused()
