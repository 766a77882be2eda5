"""The caller's side of a pipeline: take a step, use it, give it back; begin and abort passes.

Everything here runs on the thread that runs the pass, which an interrupt may leave at any point.
What was going on is therefore never remembered apart: it is recomputed from the run's counters
when the next pass begins.
"""

from __future__ import annotations

from .clock import PassClock
from .device import Event, Stream
from .errors import ClosedError, StreamerError
from .pipeline import Pipeline
from .pool import Weights
from .stats import PassReport
from .worker import Run


class Caller:
    """Hands steps out to layer_fn, in order, on the calling thread.

    Contract: one thread at a time (the streamer sees to that). ``take`` blocks until the step is
    on its way to the device, never until it is there: the caller's stream waits for that.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._control = pipeline.control
        self._schedule = pipeline.schedule
        self._device = pipeline.device
        self._slots = pipeline.device_pool.slots
        self._scratch = pipeline.scratch
        self._finished: PassClock | None = None

    def begin(self) -> None:
        """Begin a pass at its first step, starting over if the one before did not end."""
        with self._device.guard():
            self._device.check_can_wait()
            self._pipeline.files.check_unchanged()
            run = self._control.run
            if run is None or not self._between_passes(run):
                self.abort()
            self._pipeline.wake()
            if self._pipeline.copier is not None and not self._device.unified:
                self._pipeline.copier.avoid(self._device.current_stream())
            run = self._run()
            self._schedule.clock(run, run.released).start()

    def take(self) -> tuple[int, Weights]:
        """The next step's layer index and weights, once its copies are enqueued.

        Raises the error that kept the step from being read or copied.
        """
        run = self._run()
        number = run.released
        index = self._schedule.index(number)
        self._await(run, number)
        layout = self._schedule.layouts[index]
        slot = self._slots[number % len(self._slots)]
        stream = self._device.current_stream()
        slot.handed_on = stream
        run.handed = number + 1
        self.order_after_copy(slot.ready, stream)
        self._schedule.clock(run, number).compute_begin[index].record(stream)
        if self._scratch is not None:
            weights = slot.weights(layout, self._scratch.memory)
            self._scratch.cast(slot, layout, stream)
        else:
            weights = slot.weights(layout, None)
        return self._schedule.steps[index].layer_idx, weights

    def order_after_copy(self, ready: Event, stream: Stream) -> None:
        """Let the caller's stream wait for the slot's copies."""
        stream.wait_event(ready)

    def give_back(self) -> None:
        """The caller's work on the step has been enqueued; once done, its slot is free."""
        run = self._run()
        number = run.released
        self._record_uses(number)
        clock, index = self._schedule.clock(run, number), self._schedule.index(number)
        clock.compute_end[index].record(self._device.current_stream())
        run.released = number + 1
        self._pipeline.slot_released()

    def finish(self) -> None:
        """The pass's last step has been given back."""
        run = self._run()
        clock = self._schedule.clock(run, run.released - 1)
        with self._device.guard():
            clock.stop()
        self._pipeline.files.check_unchanged()
        self._finished = clock

    def abort(self) -> None:
        """Drop the pass that is under way and start prefetching the first layers again.

        May be called, and interrupted, any number of times.
        """
        run, base_pass = self._control.run, 0
        if run is not None:
            run.aborted = True
            if run.handed > run.released:
                with self._device.guard():
                    self._record_uses(run.released)
            base_pass = run.base_pass + run.released // self._schedule.length
        self._pipeline.publish(base_pass)

    def report(self) -> PassReport | None:
        """The report of the last finished pass; waits until the device has done it."""
        if self._finished is None:
            return None
        with self._device.guard():
            return self._finished.report(self._schedule.layouts)

    def _between_passes(self, run: Run) -> bool:
        whole = run.released % self._schedule.length == 0
        return whole and not run.aborted and run.handed == run.released

    def _run(self) -> Run:
        run = self._control.run
        assert run is not None
        return run

    def _record_uses(self, number: int) -> None:
        stream = self._device.current_stream()
        self._slots[number % len(self._slots)].record_uses(stream)
        if self._scratch is not None:
            self._scratch.record_uses(stream)

    def _await(self, run: Run, number: int) -> None:
        while True:
            if self._control.closing:
                raise ClosedError("the streamer was closed during the pass")
            if self._control.fatal is not None:
                raise StreamerError(
                    f"a thread of the streamer ended: {self._control.fatal}"
                ) from self._control.fatal
            if run.copied.out > number:
                break
            self._pipeline.caller_bell.wait()
        if number in run.failures:
            raise run.failures[number]
