"""One candidate, in a process of its own, from start until nothing of it is left."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, fields

from ...errors import ConfigError, StreamerError
from ...transport.stage import Bell
from ...transport.tasks import start_thread
from .course import Course
from .outcome import make_record
from .process import CandidateProcess
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

    ConfigError for values that make no trial; StreamerError where there are no such processes, or
    if one that was killed does not go away. Thread rules: any thread; blocks.
    """
    _check(spec, limits)
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
        self._bell = Bell()
        self._events: deque[tuple[str, float]] = deque()
        self._record: TrialRecord | None = None
        self._error: BaseException | None = None
        self._over = False
        self._stopped = False
        self._wake, self._waker = os.pipe()
        self._thread = threading.Thread(target=self._work, name="layer-streamer-trial", daemon=True)

    def run(self, on_event: OnEvent) -> TrialRecord:
        try:
            start_thread(self._thread)
            while True:
                over = self._over  # asked first: the last event comes before it
                if self._events:
                    on_event(*self._events.popleft())
                elif over:
                    break
                else:
                    self._bell.wait()
        finally:
            self._stop()
        if self._error is not None:
            raise self._error
        assert self._record is not None
        return self._record

    def close(self) -> None:
        """Give the pipe back, unless the thread may still be looking at it."""
        if self._over or self._thread.ident is None:
            if self._over:
                self._thread.join()
            os.close(self._wake)
            os.close(self._waker)

    def _stop(self) -> None:
        """Have the thread end what is left, and wait for it through all interrupts."""
        interrupt: KeyboardInterrupt | None = None
        self._stopped = True
        os.write(self._waker, b"x")
        while self._thread.ident is not None and not self._over:
            try:
                self._bell.wait()
            except KeyboardInterrupt as again:
                interrupt = again
        if interrupt is not None:
            raise interrupt

    def _work(self) -> None:
        try:
            if not self._stopped:
                self._record = self._run()
        except BaseException as error:
            self._error = error
        finally:
            self._over = True
            self._bell.ring()

    def _run(self) -> TrialRecord:
        course = Course(self._limits, time.monotonic(), self._spec.sleep_seconds)
        self._note("start", course)
        request = {
            "spec": _as_json(self._spec),
            "argv": sys.argv,
            "sys_path": [entry for entry in sys.path if isinstance(entry, str)],
        }
        process = CandidateProcess(request, self._limits.max_host_bytes)
        try:
            self._follow(process, course)
        finally:
            ended = time.monotonic()
            report, late = process.end()
        for message in late:
            if not course.over:
                course.hear(message, ended)
        return make_record(self._spec.settings, course, report, ended, process.garbage)

    def _follow(self, process: CandidateProcess, course: Course) -> None:
        """Listen until the trial is over: by its own words, the clock, or the supervisor."""
        ended = False
        while not (ended or course.over or self._stopped):
            wait = course.due().when - time.monotonic()
            messages, ended = process.wait(self._wake, wait)
            now = time.monotonic()
            for message in messages:
                stage = None if course.over else course.hear(message, now)
                if stage is not None:
                    self._note(stage, course)
            due = course.due()
            if now >= due.when and not ended and not course.over:
                course.verdict = (due.ending, due.detail)

    def _note(self, stage: str, course: Course) -> None:
        self._events.append((stage, time.monotonic() - course.began))
        self._bell.ring()


def _as_json(spec: TrialSpec) -> dict[str, object]:
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    for option in ("setup_fn", "on_copy"):
        name = values[option]
        values[option] = None if name is None else asdict(name)
    return {**values, "model": dict(spec.model), "settings": dict(spec.settings)}


def _check(spec: TrialSpec, limits: TrialLimits) -> None:
    if os.name != "posix":
        raise StreamerError("a trial needs the processes of Linux, WSL2 or macOS")
    if not sys.executable:
        raise StreamerError("a trial needs sys.executable, which this Python does not know")
    if spec.n_runs < 2:
        raise ConfigError(f"n_runs={spec.n_runs}: must be at least 2 (the first is discarded)")
    if spec.tokens < 0:
        raise ConfigError(f"tokens={spec.tokens}: must be at least 0")
    if not 0 <= spec.sleep_seconds < math.inf:
        raise ConfigError(f"sleep_seconds={spec.sleep_seconds}: must be at least 0, and finite")
    for name in ("trial_seconds", "hang_seconds"):
        value = getattr(limits, name)
        if not 0 < value < math.inf:
            raise ConfigError(f"{name}={value}: must be above 0, and finite")
    if not 0 <= limits.margin < math.inf:
        raise ConfigError(f"margin={limits.margin}: must be at least 0, and finite")
