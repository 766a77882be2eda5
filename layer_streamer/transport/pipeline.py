"""Builds what a plan says, and takes it down again: resident layers, lanes, the schedule.

Knows no LayerStreamer: the threads keep the pipeline alive, and the streamer owns the pipeline, so
that a streamer nobody holds any more can be collected and close it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..devices.device import Device
from ..errors import ClosedError, StreamerError
from ..planning.layout import Layout, Step
from ..planning.placement import Tier
from ..planning.plan import Plan
from ..planning.settings import Settings
from ..progress import ProgressBar
from .clock import Routes
from .fetcher import Fetcher
from .files import OpenFiles
from .host_home import HostHome
from .lane import Lane
from .lane_memory import LaneMemory
from .loader import Loader
from .memory import MemoryUse
from .residents import Residents
from .schedule import Schedule
from .stage import Bell, Control, Heading, Run
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
        self.control = Control()
        self.caller_bell = Bell()
        self.control.on_fatal = self.caller_bell.ring
        self._pid = os.getpid()
        self._may_map = settings.read_mode in ("auto", "mapped")
        self._settings = settings.but(
            read_mode=plan.read_mode,
            read_threads=plan.read_threads,
            read_chunk=plan.read_chunk,
        )
        self.loader = Loader(files, self._settings.chunk_nbytes, self._settings.num_readers)
        self.residents = Residents()
        self._memories: list[LaneMemory] = []
        self._fetchers: list[Fetcher] = []
        show_weights_to_pytree()
        try:
            if plan.read_mode == "direct":
                files.use_direct()
            self.plan = self._load(steps, layouts, plan)
            streamed = tuple(map(_what_moves, layouts, plan.tiers))
            for lane_idx, device in enumerate(self.devices):
                where = (self.residents, self._settings, plan.placement)
                with device.guard():
                    self._memories.append(LaneMemory(lane_idx, device, streamed, *where))
            self.schedule = self._build_schedule(steps, streamed)
            self.lanes = [self._build_lane(*some) for some in enumerate(self._memories)]
        except BaseException:
            self._free()
            raise

    @property
    def memory(self) -> MemoryUse:
        """What slots and resident layers take."""
        slots = [pool.arena for memory in self._memories for pool in memory.host_pools]
        on_host = [*slots, *self.residents.owners]
        on_devices = sum(memory.device_nbytes for memory in self._memories)
        on_devices += self.residents.device_nbytes
        in_host = on_devices if self.devices[0].unified else 0
        return MemoryUse(
            host_bytes=sum(some.nbytes for some in on_host)
            + self.residents.scratch_nbytes
            + in_host,
            pinned_bytes=sum(some.nbytes for some in on_host if some.pinned),
            device_bytes=on_devices - in_host,
        )

    def open_fetcher(self, device: Device, chunk: int) -> Fetcher:
        """Threads that read what is asked for beside the layers; they end with the others. Raises
        StreamerError. What closes the pipeline closes them, but not the memory that they use."""
        threads = self.loader.threads
        fetcher = Fetcher(self.files, device, self.control, threads, chunk)
        self._fetchers.append(fetcher)
        fetcher.start()
        return fetcher

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

    def publish(self, base_pass: int, heading: Heading) -> None:
        """Start over at the first step of pass ``base_pass``; the run before must be aborted."""
        run = Run(base_pass, heading)
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
        for fetcher in self._fetchers:
            fetcher.stop()

    def _wait_device(self) -> None:
        """No copy and no compute uses the slots any more."""
        for lane in self.lanes:
            lane.wait_device()

    def _free(self) -> None:
        """Give back what is not the collector's; an error keeps nothing else from being freed."""
        with ExitStack() as owned:
            slots = [pool.arena for memory in self._memories for pool in memory.host_pools]
            for close in (self.files.close, *(o.close for o in (*self.residents.owners, *slots))):
                owned.callback(close)
        self.control.forget_errors()

    def _load(self, steps: Sequence[Step], layouts: Sequence[Layout], plan: Plan) -> Plan:
        """Bring what is resident into memory, with a progress bar; the plan as it could be kept."""
        on_device, in_host = (
            {i: layouts[i] for i, placed in enumerate(plan.tiers) if placed == tier}
            for tier in ("device", "host")
        )
        nbytes = sum(layout.read_nbytes for layout in (*on_device.values(), *in_host.values()))
        shown = nbytes > 0 and self._settings.asked["track_progress"]
        style: dict[str, Any] = {"unit": "B", "unit_scale": True, "leave": False}
        bar = ProgressBar(total=nbytes, desc="loading", disable=not shown, **style)
        with bar, torch.inference_mode(False):
            loader = replace(self.loader, on_loaded=bar.update)
            for lane_idx, device in enumerate(self.devices):
                own = (i for i in on_device if i % len(self.devices) == lane_idx)
                held: Mapping[int, Step] = {i: steps[i] for i in own}
                if device.unified and self._may_map:
                    held = loader.leave_in_pages(self.residents, held, layouts)
                with device.guard():
                    dtype = self._settings.asked["dtype"]
                    loader.load_device(self.residents, held, device, dtype)
            if self.devices[0].unified:
                return self._view_mapped(loader, steps, layouts, plan)
            computed = {i: steps[i] for i in sorted(plan.placement.on_host)}
            home = HostHome(loader, self.residents, self.devices[0])
            if home.hold(in_host, computed, mapped=plan.read_mode == "mapped"):
                return plan
            return plan.unmapped("mapping or page-locking was refused")

    def _view_mapped(
        self, loader: Loader, steps: Sequence[Step], layouts: Sequence[Layout], plan: Plan
    ) -> Plan:
        """CPU: hand out views of the mapped files, of every step that lies there aligned."""
        aligned = {
            i: layout
            for i, (layout, tier) in enumerate(zip(layouts, plan.tiers, strict=True))
            if tier == "disk" and layout.is_viewed
        }
        mapped, all_steps = plan.read_mode == "mapped", dict(enumerate(steps))
        if mapped and not loader.view_mapped(self.residents, aligned, all_steps, stay=False):
            return plan.unmapped("mapping or populating was refused")
        return plan

    def _build_schedule(self, steps: Sequence[Step], layouts: Sequence[Layout]) -> Schedule:
        routes = Routes(
            layouts,
            self.devices,
            viewed=self.residents.mapped,
            two_pools=any(len(memory.host_pools) == 2 for memory in self._memories),
            limits=partial(_limits_of, self.plan, self.files),
        )
        counts: dict[str, int] = {}
        for memory in self._memories:
            counts |= memory.slot_counts
        ahead = max(memory.passes_ahead for memory in self._memories)
        return Schedule(steps, layouts, routes, counts, ahead)

    def _build_lane(self, lane_idx: int, memory: LaneMemory) -> Lane:
        ends = (self.control, self.caller_bell)
        with memory.device.guard():
            return Lane(lane_idx, memory, self.schedule, self.files, self._settings, ends)


def _what_moves(layout: Layout, tier: Tier) -> Layout:
    """What of a step is read and copied in every pass, if it lives in ``tier``."""
    if tier == "disk":
        return layout
    return replace(layout, reads=(), copies=() if tier == "device" else layout.copies)


def _limits_of(plan: Plan, files: OpenFiles) -> dict[str, float]:
    """The plan's limits, less that of reads which it took to be direct and which are not."""
    limits = plan.limits
    if plan.read_mode == "direct" and files.direct_refused:
        limits.pop("read", None)
    return limits
