"""The parent of a candidate's process: keeps it within its memory, leaves nothing of it behind.

A script of its own, started by path with ``python -I -S``, on the standard library alone, so that
it starts in no time and nothing of the user's runs in it. One argument: Supervisor's, as JSON.
Stdin is the pipe whose closing ends the trial; stdout takes one line of JSON when all has ended.

On Linux every descendant of the candidate ends up as this process's child (it is their subreaper),
whatever sessions and groups they made, so "no child is left" means that none is left anywhere.
Elsewhere what can be ended is the candidate and its process group; memory is not watched.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

TICK_SECONDS = 0.05
"""Between two looks at processes and memory."""
SCAN_SECONDS, SCAN_SHARE = 0.25, 0.01
"""Between looks for new processes, at least; and the share of the time that they may take."""
TAIL_NBYTES = 8192
"""What is kept of the end of the candidate's output."""
CHUNK_NBYTES = 1 << 16
MAX_FREEZES = 50
"""Looks for processes that are forked while others are being stopped."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
OOM_FIRST = "1000"
"""oom_score_adj of what the kernel is to kill first when memory runs out."""
CANNOT_START = 127
ENDING = (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM))
"""Signals that end the trial as the closing of the pipe does. (Windows imports this, no more.)"""


class Supervisor:
    """One candidate from start to end. Thread rules: one thread.

    ``parent``: its process id; if that is not our parent any more, it has ended. ``descriptors``:
    those that the candidate keeps.
    """

    def __init__(
        self, command: list[str], parent: int, descriptors: list[int], max_host_bytes: int | None
    ) -> None:
        self._parent = parent
        self._most = max_host_bytes
        self._peak = 0
        self._passed: int | None = None
        self._status: int | None = None
        self._tail = b""
        self._asked_to_end = False
        self._known: set[int] = set()
        self._next_scan = 0.0
        self._oom_kills = _oom_kills()
        for number in ENDING:
            signal.signal(number, self._on_signal)
        # An inherited "ignore" would have the kernel reap for us and lose what became of it.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._adopts = _prctl(PR_SET_CHILD_SUBREAPER, 1)
        if os.getppid() != parent:
            sys.exit(CANNOT_START)  # it ended while this process started
        self._output, write_end = os.pipe()
        os.set_blocking(self._output, False)
        self._child = _start(command, descriptors, write_end)
        for descriptor in (write_end, *descriptors):
            os.close(descriptor)

    def run(self) -> dict[str, Any]:
        """Watch until the candidate ends or is to be ended; what became of it."""
        try:
            for _ in iter(self._time_to_end, True):
                pass
        finally:
            self._end_all()
        while self._drain():
            pass
        return {
            "status": self._status,
            "adopts": self._adopts,
            "passed": self._passed,
            "peak": self._peak,
            "oom_kills": _oom_kills() - self._oom_kills,
            "tail": self._tail.decode(errors="replace"),
        }

    def _time_to_end(self) -> bool:
        """Wait for a tick at the most and look around."""
        open_output = [self._output] if self._output >= 0 else []
        ready, _, _ = select.select([0, *open_output], [], [], TICK_SECONDS)
        if self._output in ready:
            self._drain()
        if 0 in ready or self._asked_to_end or os.getppid() != self._parent:
            return True
        self._reap()
        return self._status is not None or self._too_large()

    def _drain(self) -> bool:
        """Take some of what the candidate has printed; False if there is nothing."""
        if self._output < 0:
            return False
        try:
            data = os.read(self._output, CHUNK_NBYTES)
        except BlockingIOError:
            return False
        if not data:
            os.close(self._output)
            self._output = -1
        self._tail = (self._tail + data)[-TAIL_NBYTES:]
        return bool(data)

    def _too_large(self) -> bool:
        """Measure the memory of all processes; True if it is more than is allowed."""
        if sys.platform != "linux":
            return False
        begin = time.monotonic()
        if begin >= self._next_scan:
            self._known = _descendants()
            now = time.monotonic()
            self._next_scan = now + max(SCAN_SECONDS, (now - begin) / SCAN_SHARE)
        total = sum(_resident(pid) for pid in self._known)
        self._peak = max(self._peak, total)
        if self._most is not None and total > self._most:
            self._passed = total
        return self._passed is not None

    def _end_all(self) -> None:
        """Kill until no descendant is left."""
        if self._status is None:
            refuses(self._child, signal.SIGKILL)  # what it costs the machine ends here
        if sys.platform != "linux" and hasattr(os, "killpg"):
            refuses(-self._child, signal.SIGKILL)
        pause = 0.001
        while self._reap():
            found = _freeze() if sys.platform == "linux" else {self._child}
            # In a list: every one is to be tried.
            if found and all([refuses(pid, signal.SIGKILL) for pid in found]):
                return  # all are another user's by now
            self._drain()
            time.sleep(pause)
            pause = min(2 * pause, TICK_SECONDS)

    def _reap(self) -> bool:
        """Collect every child that has ended; True if some are left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._child:
                self._status = status

    def _on_signal(self, number: int, frame: object) -> None:
        self._asked_to_end = True


def _start(command: list[str], descriptors: list[int], output: int) -> int:
    """Start the candidate in a session of its own; its process id."""
    supervisor = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        for number in ENDING:
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for descriptor in descriptors:
            os.set_inheritable(descriptor, True)
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(OOM_FIRST)
        if os.getppid() == supervisor:
            os.execv(command[0], command)
    except BaseException as error:
        os.write(2, f"cannot start {command[0]}: {error}\n".encode())
    finally:
        os._exit(CANNOT_START)


def _freeze() -> set[int]:
    """Stop all descendants, so that none can start another; their process ids."""
    frozen = set[int]()
    for _ in range(MAX_FREEZES):
        new = _descendants() - frozen
        if not new:
            break
        for pid in new:
            refuses(pid, signal.SIGSTOP)
        frozen |= new
    return frozen


def _descendants() -> set[int]:
    """Process ids of all that descend from this process."""
    children: dict[int | None, list[int]] = {}
    for pid in process_ids():
        children.setdefault(_parent(pid), []).append(pid)
    found, new = set[int](), children.get(os.getpid(), [])
    while new:
        found.update(new)
        new = [pid for parent in new for pid in children.get(parent, []) if pid not in found]
    return found


def process_ids() -> list[int]:
    """Of all that there are; none where that is not told."""
    entries = os.scandir("/proc") if Path("/proc").is_dir() else ()
    return [int(entry.name) for entry in entries if entry.name.isdecimal()]


def _parent(pid: int) -> int | None:
    # The name, in brackets, may hold anything.
    after = read_proc(f"{pid}/stat").rpartition(b")")[2].split()
    return int(after[1]) if after else None


def _resident(pid: int) -> int:
    """Resident bytes of a process but for the pages of files that it maps."""
    lines = read_proc(f"{pid}/status").splitlines()
    kinds = (b"RssAnon:", b"RssShmem:")
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(kinds))


def _oom_kills() -> int:
    """How often the kernel has killed for want of memory."""
    lines = read_proc("vmstat").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(b"oom_kill "))


def read_proc(name: str) -> bytes:
    """What is there to read below /proc; nothing of a process that has gone."""
    try:
        return Path("/proc", name).read_bytes()
    except OSError:
        return b""


def refuses(pid: int, number: int, is_ours: Callable[[int], bool] | None = None) -> bool:
    """Send a signal to a process that ``is_ours``, by default a descendant, or to a group; True if
    that is not allowed: another user's."""
    try:
        handle = os.pidfd_open(pid) if pid > 0 and hasattr(os, "pidfd_open") else -1
    except ProcessLookupError:
        return False
    except OSError:  # an older kernel, a sandbox
        handle = -1
    try:
        if handle < 0:
            os.kill(pid, number)
        elif (is_ours or _descends)(pid):  # not another process that has got the id meanwhile
            signal.pidfd_send_signal(handle, number)
    except (ProcessLookupError, PermissionError) as error:
        return isinstance(error, PermissionError)
    finally:
        if handle >= 0:
            os.close(handle)
    return False


def _descends(pid: int) -> bool:
    """True if the process that has the id now descends from this one."""
    ancestor: int | None = pid
    while ancestor is not None and ancestor > 1 and ancestor != os.getpid():
        ancestor = _parent(ancestor)
    return ancestor == os.getpid()


def _prctl(option: int, value: int) -> bool:
    """False where there is none, or a sandbox refuses it."""
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0) == 0)


def main() -> None:
    report = json.dumps(Supervisor(**json.loads(sys.argv[1])).run())
    with suppress(OSError):  # the parent may have gone
        os.write(1, report.encode() + b"\n")


if __name__ == "__main__":
    main()
