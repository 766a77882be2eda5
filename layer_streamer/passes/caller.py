"""The caller's side of a pipeline: take a step, use it, give it back; begin and abort passes.

Everything here runs on the thread that runs the pass, which an interrupt may leave at any point. So
there is no state beside the run's counters: the next pass begins from them.
"""

from __future__ import annotations

import time
from contextlib import suppress

from ..devices.device import Event, Stream
from ..errors import ClosedError, StreamerError
from ..transport.clock import PassClock
from ..transport.lane import Lane
from ..transport.pipeline import Pipeline
from ..transport.pool import DeviceSlot
from ..transport.stage import AHEAD, Heading, LaneRun, Run
from ..transport.stats import PassReport
from ..transport.weights import Weights
from .expert_store import ExpertStore
from .layer_experts import LayerExperts, LayerWeights


class Caller:
    """Hands steps out to layer_fn, in order, on the calling thread.

    Contract: one thread at a time (the streamer sees to that). ``take`` blocks until the step is
    on its way to the device, never until it is there: the caller's stream waits for that.
    """

    def __init__(self, pipeline: Pipeline, experts: ExpertStore | None = None) -> None:
        self._pipeline, self._experts = pipeline, experts
        self._handed: LayerExperts | None = None
        """Of the step that is handed out."""
        self._control = pipeline.control
        self._schedule = pipeline.schedule
        self._lanes = pipeline.lanes
        self._on_host = frozenset(pipeline.residents.host)
        # The last finished pass: a tuple of its own, for its clock is used again by later ones.
        self._finished: tuple[PassClock] | None = None
        self._asking: dict[int, list[PassReport]] = {}
        """By their ids, lists of threads that wait for reports made on the pass's own thread."""

    def begin(self, heading: Heading = AHEAD) -> None:
        """Begin a pass at its first step, starting over if the one before did not end.

        ``heading``: of a run that begins with it; one that goes on so is gone on with.
        """
        for lane in self._lanes:
            with lane.device.guard():
                lane.device.check_can_wait()
        self._pipeline.files.check_unchanged()
        if not self._leads_on(self._control.run, heading):
            self.abort(heading)
        self._pipeline.wake()
        for lane in self._lanes:
            if lane.copier is not None:
                lane.copier.avoid(lane.device.current_stream())
        run = self._control.run
        on_host = self._on_host if run.heading.on_host else ()
        self._schedule.clock(run, run.released).start(self._kept(run), on_host)
        if self._experts is not None:
            self._experts.begin()

    def take(self) -> tuple[int, Weights]:
        """The next step's layer index and weights, once its copies are enqueued.

        Raises the error that kept the step from being read or copied.
        """
        run = self._control.run
        number = run.released
        index = self._schedule.index(run, number)
        memory, lane_run = self._lane(index).memory, run.lanes[index % len(self._lanes)]
        stream, slot = memory.device.current_stream(), None
        n = lane_run.orders.copied.find(number)
        if n is not None:
            self._await(run, lane_run, n, number)
            if index in memory.residents.mapped:
                # Its pages were there when they were populated; a look at missing ones kills.
                self._pipeline.files.check_unchanged(self._schedule.paths[index])
            slot = memory.slots[lane_run.orders.slot(n)]
            if lane_run.orders.kept(number):
                self.order_after_uses(slot, stream)
            slot.handed_on = stream
            self.order_after_copy(slot.ready, stream)
        elif self._control.closing:
            raise self._closed()
        run.handed = number + 1
        clock = self._schedule.clock(run, number)
        clock.compute_begin[index].record(stream)
        clock.host_begin[index] = time.perf_counter()
        layer_idx = self._schedule.steps[index].layer_idx
        weights = memory.weights_of(index, slot, stream)
        if self._experts is None:
            return layer_idx, weights
        known = layer_idx in self._experts.layers
        self._handed = LayerExperts(self._experts, layer_idx) if known else None
        return layer_idx, LayerWeights(weights, self._handed)

    def order_after_copy(self, ready: Event, stream: Stream) -> None:
        """Let the caller's stream wait for the slot's copies."""
        ready.wait(stream)

    def order_after_uses(self, slot: DeviceSlot, stream: Stream) -> None:
        """Let the caller's stream wait for the work of the hand-out before, on whatever stream:
        what is filled next waits for the last hand-out alone."""
        slot.order_after_uses(stream)

    def give_back(self) -> None:
        """The caller's work on the step has been enqueued; once done, its slot is free.

        StreamerError if the caller has written to the step's tensors.
        """
        if self._control.closing:
            self._pipeline.check_process()
        self._give_up_experts()
        run = self._control.run
        number = run.released
        index = self._schedule.index(run, number)
        lane = self._lane(index)
        stream = lane.device.current_stream()
        written = lane.memory.release(index, self._slot(run, number, index), stream)
        clock = self._schedule.clock(run, number)
        clock.compute_end[index].record(stream)
        clock.host_end[index] = time.perf_counter()
        run.released = number + 1
        lane.filler_bell.ring()
        if written:
            layer_idx = self._schedule.steps[index].layer_idx
            raise StreamerError(
                f"layer {layer_idx}: its weights were written to, now or after an earlier hand-out "
                "of the same memory, which other layers and passes use: change a clone of them"
            )

    def _give_up_experts(self) -> None:
        """What the step has loaded may be overwritten, once its work is done."""
        if self._handed is not None:
            self._handed.end()
            self._handed = None
        if self._experts is not None:
            self._experts.give_up()

    def finish(self) -> None:
        """The pass's last step has been given back."""
        run = self._control.run
        clock = self._schedule.clock(run, run.released - 1)
        clock.stop()
        self._pipeline.files.check_unchanged()
        self._finished = (clock,)
        if self._experts is not None:
            self._experts.finish()
        if self._asking:
            report = clock.report()
            for answers in tuple(self._asking.values()):
                answers[:] = [report]

    def abort(self, heading: Heading | None = None) -> None:
        """Drop the pass that is under way and start prefetching the first layers again.

        ``heading``: of the new run; None: it begins ahead, and turns if the old one did. May be
        called, and interrupted, any number of times.
        """
        run = self._control.run
        run.abort()
        with suppress(StreamerError):  # of a write, which is found again when slots are filled
            self._give_up_experts()
        if run.handed > run.released:
            index = self._schedule.index(run, run.released)
            memory, slot = self._lane(index).memory, self._slot(run, run.released, index)
            memory.release(index, slot, memory.device.current_stream())
        for lane in self._lanes:
            lane.memory.start_over()
        # An error of it is raised, and there is no new run: the next pass tries again.
        self._pipeline.residents.restore_host()
        heading = run.heading._replace(back=False) if heading is None else heading
        self._pipeline.publish(run.base_pass + run.released // self._schedule.length, heading)

    def report(self) -> PassReport | None:
        """The report of the last finished pass; waits until the device has done it. Any thread.

        The clock of a pass is used again once the next one has finished. If passes are quicker
        than this, the thread that runs them is asked to make the report.
        """
        answers = list[PassReport]()
        try:
            while True:
                finished = self._finished
                if finished is None:
                    return None
                report = self._attempt(finished)
                if report is not None:
                    return report
                if answers:
                    return answers[-1]
                self._asking[id(answers)] = answers
        finally:
            self._asking.pop(id(answers), None)

    def _attempt(self, finished: tuple[PassClock]) -> PassReport | None:
        """The report of ``finished``; None if another pass has finished meanwhile."""
        try:
            report = finished[0].report()
        except Exception:
            # Events that are recorded again meanwhile may say that they cannot be compared.
            if self._finished is finished:
                raise
            return None
        return report if self._finished is finished else None

    def _closed(self) -> ClosedError:
        self._pipeline.check_process()
        return ClosedError("the streamer was closed during the pass")

    def _lane(self, index: int) -> Lane:
        return self._lanes[index % len(self._lanes)]

    def _slot(self, run: Run, number: int, index: int) -> DeviceSlot | None:
        """Where step ``number``, of this index, lies; None: in none of the slots."""
        lane_idx = index % len(self._lanes)
        orders = run.lanes[lane_idx].orders
        n = orders.copied.find(number)
        return None if n is None else self._lanes[lane_idx].memory.slots[orders.slot(n)]

    def _kept(self, run: Run) -> list[int]:
        """Indices of the layers that lie in slots as the pass that begins at ``released`` does."""
        if not run.heading.turns:
            return []
        numbers = range(run.released, run.released + self._schedule.length)
        steps = [(self._schedule.index(run, number), number) for number in numbers]
        return [i for i, n in steps if run.lanes[i % len(self._lanes)].orders.kept(n)]

    def _leads_on(self, run: Run, heading: Heading) -> bool:
        """True if the run goes on where the last pass ended, and as ``heading`` says."""
        passes, place = divmod(run.released, self._schedule.length)
        if place or run.handed > run.released or run.aborted:
            return False
        same_way = run.heading.goes_back(passes) == heading.back
        alike = (run.heading.turns, run.heading.on_host) == (heading.turns, heading.on_host)
        return same_way and alike

    def _await(self, run: Run, lane_run: LaneRun, n: int, number: int) -> None:
        while True:
            if self._control.closing:
                raise self._closed()
            if self._control.fatal is not None:
                raise StreamerError(
                    f"a thread of the streamer ended: {self._control.fatal}"
                ) from self._control.fatal
            if lane_run.copied.out > n:
                break
            self._pipeline.caller_bell.wait()
        if number in run.failures:
            raise run.failures.pop(number)
