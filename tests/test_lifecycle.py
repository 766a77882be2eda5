"""Interrupts, leaks, garbage collection, fork and exit."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from checkpoints import tiny_checkpoint, tiny_tensors
from fake_device import FakeDevice
from safetensors.torch import save_file
from support import Witness, footprint, make_device, open_checkpoint

from layer_streamer import LayerStreamer

NUM_LAYERS = 6
ROUNDS = 200
INTERRUPTS = 300
DEVICES = ["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)]


def nothing(x: Any, weights: Any, layer_idx: int) -> Any:
    return x


class Alarm:
    """Raises KeyboardInterrupt on the main thread once, after a while, wherever it is."""

    def __init__(self, device: Any = None) -> None:
        self._armed = False
        self._busy = device.busy if isinstance(device, FakeDevice) else lambda: False

    @contextmanager
    def installed(self) -> Iterator[None]:
        before = signal.signal(signal.SIGALRM, self._ring)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def set(self, seconds: float) -> None:
        self._armed = True
        signal.setitimer(signal.ITIMER_REAL, seconds, 2e-4)

    def _ring(self, number: int, frame: Any) -> None:
        if self._armed and not self._busy():
            self._armed = False
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("way", ["run_pass", "sweep"])
def test_after_an_interrupt_at_any_moment_the_next_pass_is_exact(
    tmp_path: Path, kind: str, way: str
) -> None:
    tensors = tiny_checkpoint(tmp_path, NUM_LAYERS, hidden=40)
    device, rng = make_device(kind), random.Random(3)
    alarm = Alarm(device)
    with (
        open_checkpoint(device, tmp_path, n_gpu=1, n_cpu_pinned=1, n_cpu=1) as streamer,
        alarm.installed(),
    ):
        slowest = 0.0
        for _ in range(INTERRUPTS // 2):
            try:
                alarm.set(rng.uniform(1e-5, 3e-3))
                while True:
                    use(streamer, way)
            except KeyboardInterrupt:
                began = time.monotonic()
            witness = Witness(device, tensors)
            streamer.run_pass(None, witness)
            slowest = max(slowest, time.monotonic() - began)
            assert witness.layers == list(range(NUM_LAYERS))
            witness.check()
        assert slowest < 5.0


def use(streamer: LayerStreamer, way: str) -> None:
    if way == "run_pass":
        streamer.run_pass(None, nothing)
    else:
        for _ in streamer.sweep():
            pass


def test_an_interrupt_while_waiting_for_a_layer_ends_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS)
    go_on = threading.Event()
    read = os.preadv

    def hang(*args: Any) -> int:
        go_on.wait(30)
        return read(*args)

    alarm = Alarm()
    with open_checkpoint(None, tmp_path) as streamer, alarm.installed():
        monkeypatch.setattr(os, "preadv", hang)
        alarm.set(0.05)
        with pytest.raises(KeyboardInterrupt):
            streamer.run_pass(None, nothing)
        go_on.set()
        streamer.run_pass(None, nothing)


def open_pass_close(device: Any, path: Path, round_number: int) -> None:
    with open_checkpoint(device, path) as streamer:
        streamer.load_static("lm_head.weight")
        streamer.host_tensor("lm_head.weight")
        if round_number % 3 == 1:
            next(streamer.sweep())
        elif round_number % 3 == 2:
            streamer.run_pass(torch.zeros(1), nothing)
            assert streamer.last_pass is not None


@pytest.mark.parametrize("kind", DEVICES)
def test_opening_and_closing_leaves_nothing_behind(tmp_path: Path, kind: str) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS, hidden=128)
    device = make_device(kind)
    for i in range(6):
        open_pass_close(device, tmp_path, i)
    gc.collect()
    before, memory = footprint(), psutil.Process().memory_info().rss
    on_gpu = torch.cuda.memory_allocated() if kind == "cuda" else 0
    for i in range(ROUNDS):
        open_pass_close(device, tmp_path, i)
    gc.collect()
    assert footprint() == before
    assert (torch.cuda.memory_allocated() if kind == "cuda" else 0) == on_gpu
    # A leaked arena of each round would be 200 x 1.4 MB.
    assert psutil.Process().memory_info().rss - memory < 32 << 20


@pytest.mark.parametrize("kind", DEVICES)
def test_a_failed_opening_leaves_nothing_behind(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS)
    device = make_device(kind)
    open_pass_close(device, tmp_path, 2)
    before = footprint()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("layer_streamer.lane.HostArena", refuse)
    for _ in range(20):
        with pytest.raises(MemoryError):
            open_checkpoint(device, tmp_path, n_cpu_pinned=2)
    gc.collect()
    assert footprint() == before


def test_a_streamer_that_nobody_holds_closes_itself(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS)
    before = footprint()
    streamer = open_checkpoint(None, tmp_path)
    streamer.run_pass(None, nothing)
    assert footprint() != before
    del streamer
    gc.collect()
    assert footprint() == before


def test_weights_kept_beyond_their_time_stay_readable_after_close(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS)
    kept: list[torch.Tensor] = []
    with open_checkpoint(None, tmp_path) as streamer:
        streamer.run_pass(None, lambda x, w, i: kept.extend(w.values()))
    assert all(torch.isfinite(tensor.sum()) for tensor in kept)


def test_memory_is_what_the_slots_take_and_does_not_grow_with_passes(tmp_path: Path) -> None:
    save_file(tiny_tensors(NUM_LAYERS, hidden=512), tmp_path / "model.safetensors")
    with open_checkpoint(None, tmp_path, n_gpu=1, n_cpu_pinned=None) as streamer:
        largest = max(layer.nbytes for layer in streamer.manifest.layers)
        assert streamer.memory.host_bytes <= 2 * (largest + 8192)
        streamer.run_pass(None, nothing)
        before = psutil.Process().memory_info().rss
        for _ in range(300):
            streamer.run_pass(None, nothing)
        assert psutil.Process().memory_info().rss - before < 8 << 20


def run_child(script: str, path: Path, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter; ``path`` is its first argument."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(path)],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        cwd=Path(__file__).parents[1],
    )


OPEN = """
import os, sys, threading, warnings
from layer_streamer import LayerStreamer, ClosedError
streamer = LayerStreamer.from_checkpoint(sys.argv[1], device="cpu")
streamer.run_pass(None, lambda x, w, i: x)
"""


@pytest.mark.parametrize(
    "ending",
    [
        "",
        "next(streamer.sweep())",
        "sweep = streamer.sweep(); next(sweep)",
        "sys.exit(0)",
        "streamer.itself = streamer",
        "t = threading.Thread(target=lambda: next(streamer.sweep())); t.start(); t.join()",
    ],
)
def test_an_interpreter_with_an_open_streamer_exits_cleanly(tmp_path: Path, ending: str) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS)
    done = run_child(OPEN + ending, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_exit_while_a_daemon_thread_runs_passes_neither_hangs_nor_crashes(
    tmp_path: Path,
) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS)
    script = OPEN + (
        "def work():\n"
        "    try:\n"
        "        while True: streamer.run_pass(None, lambda x, w, i: x)\n"
        "    except ClosedError: pass\n"
        "threading.Thread(target=work, daemon=True).start()\n"
    )
    done = run_child(script, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_forked_child_is_told_so_and_its_end_does_not_touch_the_parent(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS)
    script = (
        OPEN
        + """
warnings.simplefilter("ignore", DeprecationWarning)
sweep = streamer.sweep()
next(sweep)
pid = os.fork()
if pid == 0:
    try:
        streamer.run_pass(None, lambda x, w, i: x)
    except ClosedError as error:
        assert "process" in str(error)
        streamer.close()
        sys.exit(7)
    sys.exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert sum(1 for _ in sweep) == 5
streamer.run_pass(None, lambda x, w, i: x)
streamer.close()
"""
    )
    done = run_child(script, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_real_sigint_ends_a_child_in_a_pass_with_keyboard_interrupt(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS)
    script = OPEN + (
        "print('ready', flush=True)\nwhile True: streamer.run_pass(None, lambda x, w, i: x)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
