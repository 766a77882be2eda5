"""Setup functions for trials that go wrong, each in its own way. Imported by name in a child."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

LONG = 600
SLEEPER = [sys.executable, "-S", "-c", f"import time; time.sleep({LONG})"]
IGNORER = [
    sys.executable, "-S", "-c",
    f"import signal, time\nfor n in (1, 2, 15): signal.signal(n, 1)\ntime.sleep({LONG})",
]  # fmt: skip

Run = Callable[[], object]


def healthy(streamer: Any) -> Run:
    return lambda: streamer.run_pass(None, lambda x, w, i: x)


def raises(streamer: Any) -> Run:
    raise ValueError("a setup that\nraises")


def raises_in_run(streamer: Any) -> Run:
    def run() -> None:
        raise KeyError("run")

    return run


def returns_nothing(streamer: Any) -> None:
    return None


def exits_zero(streamer: Any) -> Run:
    return lambda: os._exit(0)


def exits_three(streamer: Any) -> Run:
    return lambda: os._exit(3)


def sys_exits(streamer: Any) -> Run:
    return lambda: sys.exit(4)


def interrupts_itself(streamer: Any) -> Run:
    return lambda: os.kill(os.getpid(), signal.SIGINT)


def segfaults(streamer: Any) -> Run:
    return lambda: os.kill(os.getpid(), signal.SIGSEGV)


def hangs(streamer: Any) -> Run:
    return lambda: time.sleep(LONG)


def hangs_holding_the_lock(streamer: Any) -> Run:
    # PyDLL: the interpreter's lock is kept.
    return lambda: ctypes.PyDLL(None).sleep(LONG)


def hangs_ignoring_signals(streamer: Any) -> Run:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    return hangs(streamer)


def starts_others(streamer: Any) -> Run:
    """Children in sessions of their own, grandchildren that lost their parent; then all is well."""
    subprocess.Popen(SLEEPER, start_new_session=True)
    subprocess.Popen(IGNORER, start_new_session=True)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv(SLEEPER[0], SLEEPER)
        os._exit(0)
    return healthy(streamer)


def starts_others_and_exits(streamer: Any) -> Run:
    starts_others(streamer)
    os._exit(5)


def starts_others_and_hangs(streamer: Any) -> Run:
    starts_others(streamer)
    return hangs(streamer)


def runs_away(streamer: Any) -> Run:
    """Leaves a process that is another one at every moment; a look at /proc may well miss it.

    It holds the test's lock, and ends by itself should nothing else end it.
    """
    lock = os.open(os.environ["LAYER_STREAMER_TEST_LOCK"], os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    deadline = time.monotonic() + 30
    if os.fork() == 0:
        while time.monotonic() < deadline:
            os.setsid()
            if os.fork():
                os._exit(0)
        os._exit(0)
    os._exit(8)


def forks_and_goes_on(streamer: Any) -> Run:
    """Both processes come back here, and both think they are the trial."""
    os.fork()
    return healthy(streamer)


def allocates(streamer: Any) -> Run:
    """Takes memory and touches it, without end; the test's own bound ends it."""
    held = []

    def run() -> None:
        while True:
            held.append(b"\1" * (16 << 20))

    return run


def allocates_in_a_grandchild(streamer: Any) -> Run:
    script = "held = []\nwhile True: held.append(b'x' * (16 << 20))"
    child = subprocess.Popen([sys.executable, "-S", "-c", script], start_new_session=True)
    return child.wait


def refused_memory(streamer: Any) -> Run:
    return lambda: bytearray(1 << 62)


def refused_torch_memory(streamer: Any) -> Run:
    import torch

    return lambda: torch.empty(1 << 61, dtype=torch.uint8)


def prints_megabytes(streamer: Any) -> Run:
    import torch

    for stream in (sys.stdout, sys.stderr):
        for _ in range(64):
            stream.write("noise " * (1 << 15))
    print(f"\ntorch has {torch.get_num_threads()} threads", flush=True)
    raise ValueError("after much ado")


def prints_and_works(streamer: Any) -> Run:
    print("noise " * (1 << 20))
    return healthy(streamer)


def fakes_a_result(streamer: Any) -> Run:
    """What a result might look like to a reader of text."""
    for stream in (sys.stdout, sys.stderr):
        print('{"result": {"run_seconds": [1e-9]}}\n{"seconds": 1e-9}', file=stream, flush=True)
    raise ValueError("no result")


def writes_garbage(streamer: Any) -> Run:
    """To every descriptor there is, between the frames and in the middle of the streamer."""

    def run() -> None:
        streamer.run_pass(None, lambda x, w, i: x)
        _scribble()

    return run


def writes_garbage_and_exits(streamer: Any) -> Run:
    _scribble()
    os._exit(6)


def closes_everything(streamer: Any) -> Run:
    return lambda: os.closerange(0, 4096)


def kills_its_parent(streamer: Any) -> Run:
    starts_others(streamer)
    os.kill(os.getppid(), signal.SIGKILL)
    return hangs(streamer)


def stops_its_parent(streamer: Any) -> Run:
    os.kill(os.getppid(), signal.SIGSTOP)
    return hangs(streamer)


def slow_once_measured(streamer: Any) -> Run:
    """The first run and the untimed one are quick; the next takes a minute."""
    runs = []

    def run() -> None:
        runs.append(None)
        streamer.run_pass(None, lambda x, w, i: x)
        if len(runs) > 2:
            time.sleep(60)

    return run


def slow(streamer: Any) -> Run:
    return lambda: time.sleep(60)


def _scribble() -> None:
    for entry in list(os.scandir("/proc/self/fd")):
        with suppress(OSError):
            os.write(int(entry.name), os.urandom(3000) + b'{"result": {}}\n')


def allocates_on_the_gpu(streamer: Any) -> Run:
    import torch

    held = []

    def run() -> None:
        while True:
            held.append(torch.empty(1 << 30, dtype=torch.uint8, device=streamer.device))

    return run


def launches_work(streamer: Any) -> Run:
    """Work for the device that takes long after the call has returned."""
    import torch

    return lambda: torch.cuda._sleep(1_000_000_000)
