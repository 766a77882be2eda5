"""Builds what a plan says, and takes it down again: resident layers, lanes, the schedule.

Knows no LayerStreamer: the threads keep the pipeline alive, and the streamer owns the pipeline, so
that a streamer nobody holds any more can be collected and close it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from ..devices.device import Device
from ..errors import ClosedError, StreamerError
from ..planning.layout import Layout, Step
from ..planning.plan import Plan
from ..planning.settings import Settings
from ..progress import ProgressBar
from .clock import Routes
from .files import OpenFiles
from .lane import Lane
from .lane_memory import LaneMemory
from .memory import MemoryUse
from .residents import Loader, Residents
from .schedule import Schedule
from .stage import Bell, Control, Run
from .tasks import join_all, noted_on
from .weights import show_weights_to_pytree

logger = logging.getLogger(__name__)

JOIN_SECONDS = 30.0
"""How long close() waits for threads that are inside a system call before it says so."""


class Pipeline:
    """Threads, slots and streams of one streamer.

    What the collector does not free (descriptors, page locks) is given back by an owner that goes:
    a pipeline whose threads have not been started may be dropped at any point.
    Ownership: ``control.run`` is published by the caller's thread (:meth:`publish`). Closing may be
    done by any, twice, by two at once, and again after an interrupt: each part of it may.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        layouts: Sequence[Layout],
        files: OpenFiles,
        devices: Sequence[Device],
        settings: Settings,
        plan: Plan,
    ) -> None:
        self.devices = tuple(devices)
        self.files = files
        self.plan = plan
        self.control = Control()
        self.caller_bell = Bell()
        self.control.on_fatal = self.caller_bell.ring
        self._memories: list[LaneMemory] = []
        self._settings = settings.but(
            read_mode=plan.read_mode,
            read_threads=plan.read_threads,
            read_chunk=plan.read_chunk,
        )
        self.loader = Loader(files, self._settings.chunk_nbytes, self._settings.num_readers)
        self._steps = tuple(steps)
        self._layouts = list(layouts)
        self._pid = os.getpid()
        self._residents = [Residents() for _ in devices]
        show_weights_to_pytree()
        try:
            if plan.read_mode == "direct":
                files.use_direct()
            self._load()
            self.lanes = self._build_lanes()
        except BaseException:
            self._free()
            raise

    @property
    def memory(self) -> MemoryUse:
        """What slots and resident layers take."""
        pools = [pool for memory in self._memories for pool in memory.host_pools]
        residents = self._residents
        return MemoryUse(
            host_bytes=sum(p.arena.nbytes for p in pools) + sum(r.host_nbytes for r in residents),
            pinned_bytes=sum(p.arena.nbytes for p in pools if p.arena.pinned)
            + sum(r.pinned_nbytes for r in residents),
            device_bytes=sum(memory.device_nbytes for memory in self._memories)
            + sum(r.device_nbytes for r in residents),
        )

    def start(self) -> None:
        """Start the threads; they wait for a run. If that fails, or is interrupted, close."""
        try:
            for lane in self.lanes:
                lane.start()
        except BaseException as error:
            with noted_on(error):
                self.close()
            raise

    @property
    def forked(self) -> bool:
        """True in a forked child, which has none of the threads."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """ClosedError in a forked child."""
        if self.forked:
            raise ClosedError(
                f"the streamer was opened in process {self._pid}, this is {os.getpid()}: "
                "a forked child has to open its own"
            )

    def publish(self, base_pass: int) -> None:
        """Start over at the first step of pass ``base_pass``; the run before must be aborted."""
        run = Run(base_pass)
        run.lanes = tuple(lane.new_run(run) for lane in self.lanes)
        self.control.run = run
        self.wake()

    def wake(self) -> None:
        """Have every stage look at what there is to do: an interrupt may have eaten a ring."""
        for lane in self.lanes:
            for stage in lane.stages:
                stage.bell.ring()

    def close(self) -> None:
        """Stop the threads and free what they used. Nothing is done in a forked child."""
        if self.forked:
            return
        self._stop()
        alive = join_all(self.control.threads, JOIN_SECONDS)
        if alive:
            raise StreamerError(
                f"close: {', '.join(alive)} did not stop within {JOIN_SECONDS:.0f} s "
                "(a read that hangs?); its memory is kept until it does"
            )
        try:
            self._wait_device()
        except Exception:
            self._free()  # a device that has failed does nothing with it any more
            raise
        self._free()

    def close_unheld(self) -> None:
        """As :meth:`close`, for a finalizer, which runs on any thread between any two bytecodes.

        A thread of the pipeline may hold what the others wait for: it closes when it has left its
        loop. What goes wrong is logged, since a finalizer has nobody to raise it to.
        """
        if self.forked:
            return
        self.control.on_leave.append(self._close_and_log)
        self._stop()
        if not self.control.on_own_thread():
            self._close_and_log()

    def _close_and_log(self) -> None:
        try:
            self.close()
        except Exception as error:
            logger.warning("a streamer that nobody holds: %s", error)
        self.control.on_leave.clear()

    def _stop(self) -> None:
        """Have the threads end after what they are at. Never blocks."""
        self.control.closing = True
        self.caller_bell.ring()
        self.wake()
        for lane in self.lanes:
            if lane.reader is not None:
                lane.reader.stop()

    def _wait_device(self) -> None:
        """No copy and no compute uses the slots any more."""
        for lane in self.lanes:
            lane.wait_device()

    def _free(self) -> None:
        """Give back what is not the collector's; an error keeps nothing else from being freed."""
        with ExitStack() as owned:
            parts = [r.close for r in self._residents] + [m.free for m in self._memories]
            for give_back in (self.files.close, *parts):
                owned.callback(give_back)
        self.control.forget_errors()

    def _load(self) -> None:
        """Bring what is resident into memory, with a progress bar."""
        tiers, sizes = self.plan.tiers, self.plan.sizes
        nbytes = sum(
            size.read_nbytes for size, tier in zip(sizes, tiers, strict=True) if tier != "disk"
        )
        shown = nbytes > 0 and self._settings.asked["track_progress"]
        style: dict[str, Any] = {"unit": "B", "unit_scale": True, "leave": False}
        with ProgressBar(total=nbytes, desc="loading", disable=not shown, **style) as bar:
            loader = replace(self.loader, on_loaded=bar.update)
            self._load_devices(loader)
            self._load_host(loader)

    def _load_devices(self, loader: Loader) -> None:
        for lane_idx, device in enumerate(self.devices):
            indices = self._indices(lane_idx, "device")
            if indices:
                into = self._residents[lane_idx]
                steps = {i: self._steps[i] for i in indices}
                with device.guard():
                    loader.load_device(into, steps, device, self._settings.asked["dtype"])
            for i in indices:
                # Nothing of it is read or copied any more.
                self._layouts[i] = replace(self._layouts[i], reads=(), copies=())

    def _load_host(self, loader: Loader) -> None:
        """Host-resident steps: mapped, or in an arena; shared by the devices, freed as one."""
        first, device = self._residents[0], self.devices[0]
        if device.unified:
            if self.plan.read_mode == "mapped":
                self._view_mapped(loader)
            return
        indices = [i for i, tier in enumerate(self.plan.tiers) if tier == "host"]
        if not indices:
            return
        layouts = {i: self._layouts[i] for i in indices}
        if self.plan.read_mode != "mapped" or not loader.map_host(first, layouts, device):
            if self.plan.read_mode == "mapped":
                self.plan = self.plan.unmapped("mapping or page-locking was refused")
            loader.load_host(first, layouts, device)
        for residents in self._residents[1:]:
            residents.sources = first.sources
        for i in indices:
            self._layouts[i] = replace(self._layouts[i], reads=())

    def _view_mapped(self, loader: Loader) -> None:
        """CPU: hand out views of the mapped files, of every step that lies there aligned."""
        indices = [
            i
            for i, tier in enumerate(self.plan.tiers)
            if tier == "disk" and self._layouts[i].reads and not self._layouts[i].copies
        ]
        layouts = {i: self._layouts[i] for i in indices}
        steps = {i: self._steps[i] for i in indices}
        if not loader.view_mapped(self._residents[0], steps, layouts):
            self.plan = self.plan.unmapped("mapping or populating was refused")
            return
        for residents in self._residents[1:]:
            residents.view_mapped(self._residents[0])

    def _indices(self, lane_idx: int, tier: str | None = None) -> list[int]:
        """The steps of a lane (of one tier)."""
        return [
            i
            for i in range(lane_idx, len(self._steps), len(self.devices))
            if tier is None or self.plan.tiers[i] == tier
        ]

    def _build_lanes(self) -> list[Lane]:
        for lane_idx, device in enumerate(self.devices):
            indices, residents = self._indices(lane_idx), self._residents[lane_idx]
            slots = self.plan.placement.slots_of(lane_idx)
            what = (self._layouts, indices, residents, self._settings, slots)
            with device.guard():
                self._memories.append(memory := LaneMemory(device, *what))
            if len(self.devices) > 1:
                memory.name_pools(f"{lane_idx} ")
        self.schedule = self._build_schedule()
        lanes, ends = [], (self.control, self.caller_bell)
        for lane_idx, memory in enumerate(self._memories):
            with memory.device.guard():
                lane = Lane(lane_idx, memory, self.schedule, self.files, self._settings, ends)
            lanes.append(lane)
        return lanes

    def _build_schedule(self) -> Schedule:
        routes = Routes.of(
            self._layouts,
            self.devices,
            viewed=self._residents[0].mapped,
            two_pools=any(len(memory.host_pools) == 2 for memory in self._memories),
            limits=partial(_limits_of, self.plan, self.files),
        )
        counts: dict[str, int] = {}
        for memory in self._memories:
            counts |= memory.slot_counts
        ahead = max(memory.passes_ahead for memory in self._memories)
        return Schedule(self._steps, self._layouts, routes, counts, ahead)


def _limits_of(plan: Plan, files: OpenFiles) -> dict[str, float]:
    """The plan's limits, less that of reads which it took to be direct and which are not."""
    limits = plan.limits
    if plan.read_mode == "direct" and files.direct_refused:
        limits.pop("read", None)
    return limits
