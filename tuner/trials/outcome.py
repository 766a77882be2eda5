"""What became of a trial: from its course and the supervisor's report to a record."""

from __future__ import annotations

import os
import signal
import time

from .course import Course
from .frames import CANNOT_TELL
from .process import Report
from .record import Choice, Ending, TrialRecord


def make_record(settings: Choice, course: Course, report: Report, ended: float) -> TrialRecord:
    """The record of a trial that was ended at ``ended`` and is gone now."""
    now = time.monotonic()
    ending: Ending = "ok"
    if course.result is not None and course.verdict is None:
        facts = course.result
    else:
        ending, detail = _ending(course, report)
        if ending == "slower":
            since = course.elapsed(now) - course.elapsed(ended)
            detail += f"; ended after {course.elapsed(ended):.3f} s, gone {since:.3f} s later"
        elif report.tail.strip():
            detail += f"\nThe end of what it printed:\n{_plain(report.tail)}"
        facts = {"detail": detail}
    return TrialRecord(
        settings=dict(settings),
        ending=ending,
        run_seconds=tuple(course.run_seconds),
        parts={name: tuple(seconds) for name, seconds in course.parts.items()},
        warm_up_seconds=course.warm_up_seconds,
        peak_device_bytes=course.device_peak,
        peak_host_bytes=report.peak,
        trial_seconds=now - course.began,
        **facts,
    )


def _ending(course: Course, report: Report) -> tuple[Ending, str]:
    """How a trial without a result ended, and the beginning of its detail."""
    if course.verdict is not None:
        return course.verdict
    where = f"in stage {course.stage!r}"
    if report.noise:
        where += f"; {report.noise} bytes that were not its own came on the descriptor for results"
    if report.passed is not None:
        most = course.limits.max_host_bytes
        return "out of memory", f"{report.passed} bytes resident, max_host_bytes={most}, {where}"
    if report.status is None:
        code = report.supervisor_status
        name = _signal_name(-code) if code < 0 else f"exit code {code}"
        return "signal", f"the trial's supervisor was ended ({name}), {where}"
    code = os.waitstatus_to_exitcode(report.status)
    if code == CANNOT_TELL:
        where += "; that is how a child ends whose descriptor for results was closed"
    if code >= 0:
        return "exit", f"exit code {code} without a result, {where}"
    ending, detail = _killed(-code, report)
    return ending, f"{detail}, {where}"


def _killed(number: int, report: Report) -> tuple[Ending, str]:
    """How a trial ended whose process was ended by a signal that was not ours."""
    name = _signal_name(number)
    if number == signal.SIGKILL and report.oom_kills:
        return "out of memory", f"{name} by the kernel, for want of memory"
    if number == signal.SIGABRT and "bad_alloc" in report.tail:
        return "out of memory", f"{name} after std::bad_alloc"
    return "signal", name


def _plain(text: str) -> str:
    """Text that does a terminal no harm."""
    lines = text.replace("\r", "\n")
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in lines).strip()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
