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
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import StreamerError
from . import supervisor
from .frames import FrameReader
from .setup_fn import TRIAL_VARIABLE

CHILD = Path(__file__).with_name("child.py")
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
    """The supervisor's own return code. Not 0: all before is missing."""
    noise: int = 0
    """Bytes on the descriptor for results that were not the child's own."""


class CandidateProcess:
    """Started with construction; ends with :meth:`end`, which must be called.

    ``hear(message)`` is called in these two for all that the child says. ``wake``: a descriptor on
    which a byte ends a :meth:`wait`. Thread rules: one thread, which must live until the end.
    """

    def __init__(
        self,
        request: Mapping[str, Any],
        max_host_bytes: int | None,
        hear: Callable[[dict[str, Any]], object],
        wake: int,
    ) -> None:
        nonce = secrets.token_hex(16)
        self._marker = secrets.token_hex(8)
        self._reader = FrameReader(nonce)
        self._stack = ExitStack()
        self._said = b""
        self._ended = False
        self._hear, self._wake = hear, wake
        self._supervisor: subprocess.Popen[bytes] | None = None
        try:
            self._start({**request, "nonce": nonce}, max_host_bytes)
        except BaseException:
            self.end()
            raise

    def wait(self, seconds: float) -> bool:
        """Wait for news, for a byte on ``wake``, or for so many seconds; True if the supervisor has
        ended."""
        for key, _ in self._selector.select(max(0.0, seconds)):
            if key.fd == self._wake:
                continue
            data = os.read(key.fd, CHUNK_NBYTES)
            if key.fd == self._results:
                self._take(data)
            else:
                self._said += data
                self._ended = self._ended or not data
            if not data:
                self._selector.unregister(key.fd)
        return self._ended

    def end(self) -> Report:
        """Have everything ended and wait for that.

        StreamerError if a process cannot be ended, which only the kernel can bring about.
        """
        with self._stack:
            if self._supervisor is None:
                return Report(None)
            self._lifeline.close()
            self._selector.unregister(self._wake)
            # It may have been stopped by what it supervises.
            self._supervisor.send_signal(signal.SIGCONT)
            self._wait_for_end(self._supervisor.pid)
            status = self._supervisor.wait()
            try:
                report = Report(**json.loads(self._said))
            except ValueError:
                report = Report(None, supervisor_status=status or 1)
            if not report.adopts:
                end_marked(self._marker)
            read = partial(os.read, self._results, CHUNK_NBYTES)
            with suppress(BlockingIOError):
                for data in islice(iter(read, b""), LAST_CHUNKS):
                    self._take(data)
            return replace(report, noise=self._reader.garbage)

    def _take(self, data: bytes) -> None:
        for message in self._reader.feed(data):
            self._hear(message)

    def _wait_for_end(self, pid: int) -> None:
        deadline = time.monotonic() + REAP_SECONDS
        while not self._ended:
            if time.monotonic() > deadline:
                raise StreamerError(
                    f"a trial's processes were killed and are still there after {REAP_SECONDS:g} s "
                    f"(supervisor: process {pid}); no trial can be run beside them"
                )
            self.wait(deadline - time.monotonic())

    def _start(self, request: Mapping[str, Any], max_host_bytes: int | None) -> None:
        enter, closing = self._stack.enter_context, self._stack.callback
        self._results, results_end = os.pipe()
        closing(os.close, self._results)
        with ExitStack() as ours:
            ours.callback(os.close, results_end)
            self._selector = enter(selectors.DefaultSelector())
            wanted = tempfile.TemporaryFile()  # noqa: SIM115 - entered here
            enter(wanted)
            wanted.write(json.dumps({**request, "results": results_end}, default=_as_json).encode())
            wanted.seek(0)
            kept = (wanted.fileno(), results_end)
            # -P: the folder of this script is no place to import from.
            command = [sys.executable, "-P", str(CHILD), str(wanted.fileno())]
            orders = {
                "command": command,
                "parent": os.getpid(),
                "descriptors": kept,
                "max_host_bytes": max_host_bytes,
            }
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", supervisor.__file__, json.dumps(orders)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=kept,
                start_new_session=True,
                env={**os.environ, TRIAL_VARIABLE: self._marker},
            )
        assert self._supervisor.stdin is not None
        assert self._supervisor.stdout is not None
        self._lifeline = enter(self._supervisor.stdin)
        enter(self._supervisor.stdout)
        os.set_blocking(self._results, False)
        for descriptor in (self._results, self._supervisor.stdout.fileno(), self._wake):
            self._selector.register(descriptor, selectors.EVENT_READ)


def child_request(module: str, **request: Any) -> dict[str, Any]:
    """What child.py is to have ``module.main`` do, where modules are found as they are here."""
    paths = [entry for entry in sys.path if isinstance(entry, str)]
    return {"module": module, "argv": sys.argv, "sys_path": paths, **request}


def _as_json(value: Any) -> dict[str, Any]:
    """A dataclass in a request. (asdict would copy a model's tables.)"""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def end_marked(marker: str) -> None:
    """Kill every process with this mark in its environment, where no supervisor could."""
    wanted = f"{TRIAL_VARIABLE}={marker}".encode()
    deadline = time.monotonic() + REAP_SECONDS
    looks = 0
    while looks < LOOKS and time.monotonic() < deadline:
        found = [pid for pid in supervisor.process_ids() if _is_marked(wanted, pid)]
        # One look can miss a process: its environment is empty for a moment while it starts.
        looks = 0 if found else looks + 1
        for pid in found:
            supervisor.refuses(pid, signal.SIGKILL, partial(_is_marked, wanted))
        if not found:
            time.sleep(LOOK_SECONDS)


def _is_marked(wanted: bytes, pid: int) -> bool:
    return wanted in supervisor.read_proc(f"{pid}/environ").split(b"\0")
