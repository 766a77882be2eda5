"""A candidate's process and its supervisor, as the parent sees them."""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import StreamerError
from .frames import FrameReader
from .setup_fn import TRIAL_VARIABLE

HERE = Path(__file__).parent
REAP_SECONDS = 60.0
"""For processes that have been killed: the kernel may still have to free their memory."""
LOOKS, LOOK_SECONDS = 3, 0.02
"""Looks in a row, and the pause between them, in which no process must be found."""
CHUNK_NBYTES = 1 << 16
LAST_CHUNKS = 1024
"""Reads from the descriptor for results once nobody can write to it any more, at the most."""


@dataclass(frozen=True, slots=True)
class Report:
    """What the supervisor reported at the end."""

    status: int | None
    """The candidate's, as wait() has it. None: not known."""
    adopts: bool = False
    """Whether it was the parent of all that were orphaned, so that none can be left."""
    passed: int | None = None
    """Resident bytes for which it was ended."""
    peak: int = 0
    """Most resident bytes of its processes."""
    oom_kills: int = 0
    """How often the kernel has killed for want of memory meanwhile, on the whole machine."""
    tail: str = ""
    """The end of what was printed."""
    supervisor_status: int = 0
    """The supervisor's own return code. Not 0: the rest of this report is missing."""


class CandidateProcess:
    """Started with construction; ends with :meth:`end`, which must be called.

    Thread rules: one thread, which must live until then.
    """

    def __init__(self, request: Mapping[str, Any], max_host_bytes: int | None) -> None:
        nonce = secrets.token_hex(16)
        self._marker = secrets.token_hex(8)
        self._reader = FrameReader(nonce)
        self._stack = ExitStack()
        self._said = b""
        self._ended = False
        self._silent = False
        self._wake: int | None = None
        self._supervisor: subprocess.Popen[bytes] | None = None
        try:
            self._start({**request, "nonce": nonce}, max_host_bytes)
        except BaseException:
            self.end()
            raise

    @property
    def garbage(self) -> int:
        """Bytes on the descriptor for results that were not the child's own."""
        return self._reader.garbage

    def wait(self, wake: int, seconds: float) -> tuple[list[dict[str, Any]], bool]:
        """Wait for news, for a byte on descriptor ``wake``, or for so many seconds.

        What the child has said, and whether the supervisor has ended.
        """
        if self._wake is None:
            self._selector.register(wake, selectors.EVENT_READ)
            self._wake = wake
        return self._listen(seconds)

    def end(self) -> tuple[Report, list[dict[str, Any]]]:
        """Have everything ended and wait for that; the report, and what was said until then.

        StreamerError if a process cannot be ended, which only the kernel can bring about.
        """
        with self._stack:
            if self._supervisor is None:
                return Report(None), []
            self._lifeline.close()
            if self._wake is not None:
                self._selector.unregister(self._wake)
            # It may have been stopped by what it supervises.
            self._supervisor.send_signal(signal.SIGCONT)
            messages = self._listen_to_end()
            report = self._report(self._supervisor.wait())
            if not report.adopts:
                end_marked(self._marker)
            for _ in range(LAST_CHUNKS):
                if self._silent:
                    break
                messages += self._hear()
            return report, messages

    def _listen_to_end(self) -> list[dict[str, Any]]:
        """Wait until the supervisor has ended; what the child said until then."""
        deadline = time.monotonic() + REAP_SECONDS
        messages: list[dict[str, Any]] = []
        while (left := deadline - time.monotonic()) > 0:
            more, ended = self._listen(left)
            messages += more
            if ended:
                return messages
        assert self._supervisor is not None
        raise StreamerError(
            f"a trial's processes were killed and are still there after {REAP_SECONDS:g} s "
            f"(supervisor: process {self._supervisor.pid}); no trial can be run beside them"
        )

    def _listen(self, seconds: float) -> tuple[list[dict[str, Any]], bool]:
        messages: list[dict[str, Any]] = []
        for key, _ in self._selector.select(max(0.0, seconds)):
            if key.fd == self._results:
                messages += self._hear()
            elif key.fd == self._report_descriptor:
                data = os.read(self._report_descriptor, CHUNK_NBYTES)
                self._said += data
                self._ended = self._ended or not data
        return messages, self._ended

    def _start(self, request: Mapping[str, Any], max_host_bytes: int | None) -> None:
        enter, closing = self._stack.enter_context, self._stack.callback
        wanted = tempfile.TemporaryFile()  # noqa: SIM115 - entered here
        enter(wanted)
        wanted.write(json.dumps(request).encode())
        wanted.flush()
        self._results, results_end = os.pipe()
        closing(os.close, self._results)
        with ExitStack() as ours:
            ours.callback(os.close, results_end)
            self._selector = enter(selectors.DefaultSelector())
            kept = (wanted.fileno(), results_end)
            # -P: the folder of this script is no place to import from.
            script = str(HERE / "child.py")
            command = [sys.executable, "-P", script, *(str(descriptor) for descriptor in kept)]
            orders = {
                "command": command,
                "parent": os.getpid(),
                "descriptors": kept,
                "max_host_bytes": max_host_bytes,
            }
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", str(HERE / "supervisor.py"), json.dumps(orders)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=kept,
                start_new_session=True,
                env={**os.environ, TRIAL_VARIABLE: self._marker},
            )
        assert self._supervisor.stdin is not None
        assert self._supervisor.stdout is not None
        self._lifeline = enter(self._supervisor.stdin)
        self._report_descriptor = enter(self._supervisor.stdout).fileno()
        for descriptor in (self._results, self._report_descriptor):
            os.set_blocking(descriptor, False)
            self._selector.register(descriptor, selectors.EVENT_READ)

    def _hear(self) -> list[dict[str, Any]]:
        """What the child has said, from one read."""
        try:
            data = os.read(self._results, CHUNK_NBYTES)
        except BlockingIOError:
            self._silent = True
            return []
        if not data:
            self._silent = True
            with suppress(KeyError):
                self._selector.unregister(self._results)
        return self._reader.feed(data)

    def _report(self, status: int) -> Report:
        try:
            report = json.loads(self._said)
        except ValueError:
            return Report(None, supervisor_status=status or 1)
        return Report(**report, supervisor_status=0)


def end_marked(marker: str) -> None:
    """Kill every process with this mark in its environment, where no supervisor could."""
    wanted = f"{TRIAL_VARIABLE}={marker}".encode()
    deadline = time.monotonic() + REAP_SECONDS
    looks = 0
    while looks < LOOKS and time.monotonic() < deadline:
        found = _marked(wanted)
        # One look can miss a process: its environment is empty for a moment while it starts.
        looks = 0 if found else looks + 1
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                _kill_marked(pid, wanted)
        if not found:
            time.sleep(LOOK_SECONDS)


def _kill_marked(pid: int, wanted: bytes) -> None:
    """Not another process that has got the id meanwhile."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except (OSError, AttributeError):  # an older kernel, a sandbox; not Linux
        os.kill(pid, signal.SIGKILL)
        return
    try:
        if _is_marked(pid, wanted):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    finally:
        os.close(handle)


def _marked(wanted: bytes) -> list[int]:
    pids = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if _is_marked(pid, wanted)]


def _is_marked(pid: int, wanted: bytes) -> bool:
    try:
        return wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
