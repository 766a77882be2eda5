"""Scripts, each in an interpreter of its own: a fork of one that has imported torch."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from paths import PYTHONPATH, ROOT

HANG_SECONDS = 900
"""For one script, as for one test; the kernel ends those that take longer."""
AT_FIRST = os.environ | {"PYTHONPATH": PYTHONPATH}
"""Without what a test sets for its own processes."""
COMMAND = "import runpy; runpy.run_module('layer_streamer', run_name='__main__', alter_sys=True)"
"""The script that is ``python -m layer_streamer``."""

FORKS = f"""
import gc, json, os, signal, socket, sys, warnings
import torch

# At their end the forks look through what they have made, not through all of torch.
gc.collect()
gc.freeze()
asking = socket.socket(fileno=int(sys.argv.pop()))


def become(asked, given):
    asking.close()
    signal.alarm({HANG_SECONDS})
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv[1:] = asked["arguments"]
    for number, descriptor in enumerate(given):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if asked["strict"]:
        warnings.simplefilter("error")
    return asked["script"]


def next_script():
    while True:
        said, given, _, _ = socket.recv_fds(asking, 1 << 20, 3)
        if not said:
            sys.exit()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pid = os.fork()
        if not pid:
            return become(json.loads(said), given)
        for descriptor in given:
            os.close(descriptor)
        asking.send(str(pid).encode())
        asking.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())


exec(next_script())
"""


@cache
def forks() -> socket.socket:
    """Where this process asks for forks, one at a time.

    Importing torch takes longer than all that most scripts do, and is done once.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        server = subprocess.Popen(
            [sys.executable, "-c", FORKS, str(theirs.fileno())], pass_fds=[theirs.fileno()],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is for the tests
            # No threads at the fork: Python would warn.
            env=AT_FIRST | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


class Fork:
    """A script that runs as the main module of an interpreter that it ends.

    One at a time. What it prints goes to ``stdout`` if that is given, and is kept if not; what
    it says on stderr can be read as it comes. ``environment`` is set beside that of this process.
    ``strict``: warnings are errors.
    """

    def __init__(
        self, script: str, *arguments: object, stdout: IO[Any] | None = None,
        environment: dict[str, str] | None = None, strict: bool = False,
    ) -> None:  # fmt: skip
        self._script = script
        reading, writing = os.pipe()
        with ExitStack() as files:
            self._printed = files.enter_context(tempfile.TemporaryFile())
            self.stderr = files.enter_context(open(reading, "rb"))
            self._files = files.pop_all()
        asked = {
            "script": script, "arguments": [*map(str, arguments)], "folder": str(Path.cwd()),
            "environment": os.environ | (environment or {}), "strict": strict,
        }  # fmt: skip
        with open(os.devnull, "rb") as nothing, open(writing, "wb") as err:
            given = [file.fileno() for file in (nothing, stdout or self._printed, err)]
            socket.send_fds(forks(), [json.dumps(asked).encode()], given)
        self._pid: int | None = int(forks().recv(100))

    def send_signal(self, number: signal.Signals) -> None:
        assert self._pid is not None
        os.kill(self._pid, number)

    def wait(self) -> subprocess.CompletedProcess[str]:
        """How it ended, what it printed, and what it said that has not been read."""
        said = self.stderr.read().decode()
        code, self._pid = int(forks().recv(100)), None
        self._printed.seek(0)
        printed = self._printed.read().decode()
        return subprocess.CompletedProcess(self._script, code, printed, said)

    def __enter__(self) -> Fork:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pid is not None:
            with suppress(ProcessLookupError):
                self.send_signal(signal.SIGKILL)
            self.wait()
        self._files.close()


def run_script(script: str, *arguments: object, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run it to its end. ``how``: as of :class:`Fork`."""
    with Fork(script, *arguments, **how) as fork:
        return fork.wait()
