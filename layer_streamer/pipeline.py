"""Builds the stages, slots and clocks of a configuration, and takes them down again.

Knows no LayerStreamer: the threads keep the pipeline alive, and the streamer owns the pipeline, so
that a streamer nobody holds any more can be collected and close it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .config import OnCopy, PoolConfig, cap_batch, note_unused_batch
from .copier import Copier, DeviceTarget, Memcpy, Target, UnifiedTarget
from .device import Device
from .errors import ClosedError, StreamerError
from .files import OpenFiles
from .layout import Layout, Step
from .memory import HostArena, MemoryUse, allocate, device_slots
from .pool import DevicePool, HostPool, Scratch
from .reader import Feeder, Reader
from .schedule import Schedule, lay_out_all
from .worker import Bell, Control, Progress, Run, Stage

logger = logging.getLogger(__name__)

JOIN_SECONDS = 30.0
"""How long close() waits for a thread that is inside a system call before it says so."""


@dataclass(frozen=True, slots=True)
class Batches:
    """Steps that each stage hands on at a time."""

    read: int
    staged: int
    copied: int


class Pipeline:
    """Threads, slots and streams of one streamer.

    Ownership: built and closed by the streamer's threads; ``control.run`` is published by the
    caller's thread (:meth:`publish`). Closing may be done twice, by two threads at once, and again
    after an interrupt: each part of it may.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        files: OpenFiles,
        device: Device,
        config: PoolConfig,
        *,
        dtype: torch.dtype | None = None,
        on_copy: OnCopy | None = None,
    ) -> None:
        self.device = device
        self.files = files
        self.control = Control()
        self.caller_bell = Bell()
        self._pid = os.getpid()
        self.host_pools: list[HostPool] = []
        try:
            layouts = lay_out_all(steps, unified=device.unified, dtype=dtype)
            self._build_pools(layouts, config)
            self._wire(steps, layouts, config, on_copy)
        except BaseException:
            self._free()
            raise

    @property
    def memory(self) -> MemoryUse:
        """What the slots take."""
        scratch = self.scratch.memory.nbytes if self.scratch is not None else 0
        return MemoryUse(
            host_bytes=sum(pool.arena.nbytes for pool in self.host_pools),
            pinned_bytes=sum(p.arena.nbytes for p in self.host_pools if p.arena.pinned),
            device_bytes=scratch + (0 if self.device.unified else self.device_pool.nbytes),
        )

    def start(self) -> None:
        """Start the threads; they wait for a run."""
        self.reader.start()
        for stage in self.stages:
            stage.start()

    def check_process(self) -> None:
        """ClosedError in a forked child, which has none of the threads."""
        if os.getpid() != self._pid:
            raise ClosedError(
                f"the streamer was opened in process {self._pid}, this is {os.getpid()}: "
                "a forked child has to open its own"
            )

    def publish(self, base_pass: int) -> None:
        """Start over at the first step of pass ``base_pass``; the run before must be aborted."""
        length = self.schedule.length
        read = Progress(self.batches.read, length)
        # A stage that is left out shows the progress of the one before it.
        staged = Progress(self.batches.staged, length) if self.memcpy is not None else read
        copied = Progress(self.batches.copied, length) if self.copier is not None else staged
        self.control.run = Run(base_pass, read, staged, copied)
        self.wake()

    def wake(self) -> None:
        """Have every stage look at what there is to do: an interrupt may have eaten a ring."""
        for stage in self.stages:
            stage.bell.ring()

    def slot_released(self) -> None:
        """The caller has given a slot back: wake the stage that fills it."""
        self.filler.bell.ring()

    def close(self) -> None:
        """Stop the threads and free what they used. Nothing is done in a forked child."""
        if os.getpid() != self._pid:
            return
        self.control.closing = True
        self.caller_bell.ring()
        self.wake()
        alive = [s.name for s in self.stages if not s.join(JOIN_SECONDS)]
        alive += self.reader.close(JOIN_SECONDS)
        if alive:
            raise StreamerError(
                f"close: {', '.join(alive)} did not stop within {JOIN_SECONDS:.0f} s "
                "(a read that hangs?); its memory is kept until it does"
            )
        self._wait_device()
        self._free()

    def _wait_device(self) -> None:
        """No copy and no compute uses the slots any more."""
        with self.device.guard():
            if self.copier is not None:
                self.copier.stream.synchronize()
            self.device_pool.wait_all()
            if self.scratch is not None:
                self.scratch.wait_unused()

    def _free(self) -> None:
        for pool in self.host_pools:
            pool.arena.close()
        self.files.close()

    def _build_pools(self, layouts: Sequence[Layout], config: PoolConfig) -> None:
        device = self.device
        host_nbytes = max(layout.host_nbytes for layout in layouts)
        device_nbytes = max(layout.device_nbytes for layout in layouts)
        scratch_nbytes = max(layout.scratch_nbytes for layout in layouts)
        pinned, pageable = config.n_cpu_pinned or 0, config.n_cpu or 0
        if device.unified:
            # One pool: it holds as many layers ahead as the three would, and no byte moves twice.
            count = config.n_gpu + pinned + pageable + 1
            self._add_host_pool("device", count, max(host_nbytes, device_nbytes))
            memories = self.host_pools[0].arena.slots
        else:
            if pageable or not pinned:
                self._add_host_pool("host", pageable + 1, host_nbytes)
            if pinned:
                self._add_host_pool("pinned", pinned + 1, host_nbytes)
            memories = device_slots(config.n_gpu + 1, device_nbytes, device)
        self.device_pool = DevicePool(memories, device)
        self.scratch = Scratch(allocate(scratch_nbytes, device), device) if scratch_nbytes else None

    def _add_host_pool(self, name: str, count: int, slot_nbytes: int) -> None:
        arena = HostArena(count, slot_nbytes, self.device, pinned=name == "pinned")
        self.host_pools.append(HostPool(name, arena, self.device))

    def _wire(
        self,
        steps: Sequence[Step],
        layouts: Sequence[Layout],
        config: PoolConfig,
        on_copy: OnCopy | None,
    ) -> None:
        control, pools, unified = self.control, self.host_pools, self.device.unified
        counts = {pool.name: pool.count for pool in pools} | {"device": self.device_pool.count}
        schedule = self.schedule = Schedule(steps, layouts, self.device, counts)
        self.batches = plan_batches(config, counts, unified=unified)
        self.reader = Reader(schedule, self.files, control, config.num_readers, pools[0].count)
        self.memcpy = Memcpy(control, schedule, *pools) if len(pools) == 2 else None
        self.copier: Copier | None = None
        if not unified or on_copy is not None or any(layout.copies for layout in layouts):
            target: Target = UnifiedTarget(pools[0])
            if not unified:
                target = DeviceTarget(pools[-1], self.device_pool, self.device)
            self.copier = Copier(
                control, schedule, self.device, target, self.device_pool.slots, on_copy
            )
        self.feeder = Feeder(
            control, schedule, self.reader, pools[0], self._freed, config.chunk_nbytes
        )
        later = [stage for stage in (self.memcpy, self.copier) if stage is not None]
        self.stages: list[Stage] = [self.feeder, *later]
        self.feeder.others = later
        self.filler: Stage = self.feeder if unified or self.copier is None else self.copier
        self._connect_bells()

    def _connect_bells(self) -> None:
        """Each stage wakes the one whose output slot it frees and the one it hands on to."""
        self.control.on_adopted = self.feeder.bell.ring
        self.control.on_fatal = self.caller_bell.ring
        self.reader.drained_bell = self.feeder.bell
        after_read: Bell = self.caller_bell
        if self.copier is not None:
            before = self.memcpy if self.memcpy is not None else self.feeder
            self.copier.source_bell, self.copier.target_bell = before.bell, self.caller_bell
            after_read = self.copier.bell
        if self.memcpy is not None and self.copier is not None:
            self.memcpy.source_bell = self.feeder.bell
            self.memcpy.target_bell = self.copier.bell
            after_read = self.memcpy.bell
        self.reader.filled_bell = after_read

    def _freed(self, run: Run) -> int:
        """Steps that have been taken out of the pool that the readers fill."""
        if self.device.unified:
            return run.released
        return run.staged.done if self.memcpy is not None else run.copied.done


def plan_batches(config: PoolConfig, counts: dict[str, int], *, unified: bool) -> Batches:
    """How many steps each stage hands on at a time; what has no effect is logged."""
    if unified:
        # One pool, one hand-over: the readers'. A second batch could wait for slots that the
        # first one holds back.
        given = [b for b in (config.batch_cpu, config.batch_cpu_pinned, config.batch_gpu) if b]
        return Batches(cap_batch("batch", max(given, default=None), counts["device"]), 1, 1)
    read = staged = 1
    if "pinned" in counts:
        pinned = cap_batch("batch_cpu_pinned", config.batch_cpu_pinned, counts["pinned"])
        if "host" in counts:
            staged = pinned
        else:
            read = pinned
    else:
        note_unused_batch("batch_cpu_pinned", config.batch_cpu_pinned, "pinned pool")
    if "host" in counts:
        read = cap_batch("batch_cpu", config.batch_cpu, counts["host"])
    else:
        note_unused_batch("batch_cpu", config.batch_cpu, "pageable pool")
    return Batches(read, staged, cap_batch("batch_gpu", config.batch_gpu, counts["device"]))
