"""One candidate, in a process of its own, from start until nothing of it is left."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any

from ...errors import StreamerError
from ...transport.tasks import join_all, start_thread
from .course import Course
from .outcome import make_record
from .process import CandidateProcess, child_request
from .record import TrialLimits, TrialRecord, TrialSpec

OnEvent = Callable[[str, float], object]
"""``on_event(stage, seconds)``: a stage begins, so many seconds after the trial."""


def run_trial(
    spec: TrialSpec, limits: TrialLimits, *, on_event: OnEvent | None = None
) -> TrialRecord:
    """Run one candidate and wait until it has ended and its processes are gone.

    The candidate is measured in a fresh process, so that nothing it does harms this one; CUDA is
    not used here. However it ends, that is told in the record. docs/tuning.md says when a trial is
    ended early; :class:`~.course.Course` has the rule on slow runs.

    ``on_event`` is called on this thread as each stage begins: "start", "import", "device",
    "open", "setup", "cache", "run 1", "sleep", "before run 2", "run 2" and so on. What it raises
    ends the trial and is raised, as is a KeyboardInterrupt: nothing is left running then.

    StreamerError where there are no such processes, or if one that was killed does not go away.
    ``spec`` and ``limits`` are made by TuneOptions, which checks them. Thread rules: any thread;
    blocks.
    """
    if os.name != "posix":
        raise StreamerError("a trial needs the processes of Linux, WSL2 or macOS")
    if not sys.executable:
        raise StreamerError("a trial needs sys.executable, which this Python does not know")
    task = _Task(spec, limits)
    try:
        return task.run(on_event or (lambda stage, seconds: None))
    finally:
        task.close()


class _Task:
    """The thread that owns the processes, and the calling thread, which can be interrupted.

    An interrupt comes to the main thread alone, between any two bytecodes. So what must not be
    lost, processes and descriptors, belongs to a thread that never gets one. It ends when the
    trial does, or is told to by a byte on a pipe. If the caller leaves even so, it is daemonic:
    the supervisor sees this process end.
    """

    def __init__(self, spec: TrialSpec, limits: TrialLimits) -> None:
        self._spec = spec
        self._limits = limits
        self._events: SimpleQueue[tuple[str, float] | None] = SimpleQueue()
        """None: there comes none any more."""
        self._found: TrialRecord | BaseException | None = None
        self._over = False
        self._stopped = False
        self._ended: float | None = None
        """When what is left of it began to be ended."""
        self._wake, self._waker = os.pipe()
        self._thread = threading.Thread(target=self._work, name="layer-streamer-trial", daemon=True)

    def run(self, on_event: OnEvent) -> TrialRecord:
        try:
            start_thread(self._thread)
            for event in iter(self._events.get, None):
                on_event(*event)
        finally:
            self._stop()
        if isinstance(self._found, BaseException):
            raise self._found
        assert self._found is not None
        return self._found

    def close(self) -> None:
        """Give the pipe back, unless the thread may still be looking at it."""
        if self._over or self._thread.ident is None:
            join_all([self._thread], threading.TIMEOUT_MAX)
            os.close(self._wake)
            os.close(self._waker)

    def _stop(self) -> None:
        """Have the thread end what is left, and wait for it through all interrupts."""
        interrupt: KeyboardInterrupt | None = None
        self._stopped = True
        os.write(self._waker, b"x")
        while self._thread.ident is not None and not self._over:
            try:
                self._events.get()
            except KeyboardInterrupt as again:
                interrupt = again
        if interrupt is not None:
            raise interrupt

    def _work(self) -> None:
        try:
            if not self._stopped:
                self._found = self._run()
        except BaseException as error:
            self._found = error
        finally:
            self._over = True
            self._events.put(None)

    def _run(self) -> TrialRecord:
        course = Course(self._limits, time.monotonic(), self._spec.sleep_seconds)
        self._note("start", course)
        request = child_request(f"{__package__}.measure", spec=self._spec)
        hear = partial(self._hear, course)
        process = CandidateProcess(request, self._limits.max_host_bytes, hear, self._wake)
        try:
            self._follow(process, course)
        finally:
            self._ended = time.monotonic()
            report = process.end()
        return make_record(self._spec.settings, course, report, self._ended)

    def _follow(self, process: CandidateProcess, course: Course) -> None:
        """Listen until the trial is over: by its own words, the clock, or the supervisor."""
        ended = False
        while not (ended or course.over or self._stopped):
            ended = process.wait(course.due().when - time.monotonic())
            due = course.due()
            if time.monotonic() >= due.when and not ended and not course.over:
                course.verdict = (due.ending, due.detail)

    def _hear(self, course: Course, message: dict[str, Any]) -> None:
        """Take note of what the child says, unless the trial is over."""
        if not course.over:
            stage = course.hear(message, self._ended or time.monotonic())
            if stage is not None:
                self._note(stage, course)

    def _note(self, stage: str, course: Course) -> None:
        self._events.put((stage, time.monotonic() - course.began))
