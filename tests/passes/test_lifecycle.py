"""Interrupts, leaks, garbage collection, fork and exit."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from checkpoints import tiny_checkpoint, tiny_tensors
from fake_device import FakeDevice
from interpreters import Fork, run_script
from routes import (
    NUM_LAYERS,
    ROUTES,
    assert_next_pass_is_exact,
    assert_nothing_is_left,
    make_devices,
    nothing,
    open_route,
    route_params,
)
from safetensors.torch import save_file
from support import footprint, in_thread, open_checkpoint

from layer_streamer import LayerStreamer

ROUNDS = 100
INTERRUPTS = 150
MOMENTS = route_params(
    "pools", "two partial", "cuda pools", "cuda mapped", "cuda partial",
    slow=(
        "cpu pools", "cpu direct", "cpu mapped", "cpu partial", "cpu two", "direct", "mapped",
        "arena", "resident", "partial", "two",
    ),
)  # fmt: skip
ROUNDED = route_params(
    "cpu pools", "mapped", "cuda pools", "cuda mapped", "cuda partial",
    slow=(
        "direct", "cpu direct", "cpu mapped", "cpu partial", "cpu two", "pools", "arena",
        "resident", "partial", "two", "two partial",
    ),
)  # fmt: skip


class Alarm:
    """Raises KeyboardInterrupt on the main thread once, after a while, wherever it is."""

    def __init__(self, device: Any = None) -> None:
        self.armed = False
        # Several fakes share one lock: the first one's is every one's.
        first = device[0] if isinstance(device, list) else device
        self._busy = first.busy if isinstance(first, FakeDevice) else lambda: False

    @contextmanager
    def installed(self) -> Iterator[None]:
        before = signal.signal(signal.SIGALRM, self._ring)
        # Python swallows what is raised in these: hypothesis leaves one behind, and an interrupt
        # that falls into it would never come.
        callbacks, gc.callbacks[:] = gc.callbacks[:], []
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            gc.callbacks[:] = callbacks

    def set(self, seconds: float) -> None:
        self.armed = True
        signal.setitimer(signal.ITIMER_REAL, seconds, 2e-4)

    def _ring(self, number: int, frame: Any) -> None:
        if self.armed and not self._busy():
            self.armed = False
            raise KeyboardInterrupt


@pytest.mark.parametrize("route", MOMENTS)
@pytest.mark.parametrize("way", ["run_pass", "sweep"])
def test_after_an_interrupt_at_any_moment_the_next_pass_is_exact(
    streamer: LayerStreamer, device: Any, tensors: dict[str, torch.Tensor], way: str
) -> None:
    alarm, rng = Alarm(device), random.Random(3)
    with alarm.installed():
        slowest = 0.0
        for _ in range(INTERRUPTS):
            try:
                alarm.set(rng.uniform(1e-5, 3e-3))
                # An interrupt that a finaliser of something else swallowed is over, too.
                # No condition at the `while`: in CPython 3.13 what is raised there is in no `try`.
                while True:
                    if not alarm.armed:
                        break
                    use(streamer, way)
            except KeyboardInterrupt:
                pass
            began = time.monotonic()
            assert_next_pass_is_exact(streamer, device, tensors)
            slowest = max(slowest, time.monotonic() - began)
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


def open_pass_close(route: str, path: Path, round_number: int, **options: Any) -> None:
    device = make_devices(route)
    with open_route(route, path, device, read_threads=2, **options) as streamer:
        streamer.load_static("lm_head.weight")
        streamer.host_tensor("lm_head.weight")
        if round_number % 4 == 1:
            next(streamer.sweep())
        elif round_number % 4 == 2:
            streamer.run_pass(torch.zeros(1), nothing)
            assert streamer.last_pass is not None
        elif round_number % 4 == 3:
            assert in_thread(streamer.close) is None
    assert_nothing_is_left(device)


@pytest.mark.parametrize("route", ROUNDED)
def test_opening_and_closing_leaves_nothing_behind(tmp_path: Path, route: str) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS, hidden=128)
    # Where layers are read in parts, few of them: every part costs time.
    options = {"read_chunk": 1 << 15} if "read_chunk" in ROUTES[route].options else {}
    for i in range(8):
        open_pass_close(route, tmp_path, i, **options)
    gc.collect()
    on_gpu = torch.cuda.memory_allocated() if "cuda" in route else 0
    before, memory = footprint(), psutil.Process().memory_info().rss
    for i in range(ROUNDS):
        open_pass_close(route, tmp_path, i, **options)
    gc.collect()
    assert footprint() == before
    assert (torch.cuda.memory_allocated() if "cuda" in route else 0) == on_gpu
    # A leaked arena or slab of each round would be 100 x 0.4 MB or more.
    assert psutil.Process().memory_info().rss - memory < 32 << 20


def test_a_streamer_that_nobody_holds_closes_itself(
    tmp_path: Path, tensors: Any, route: str, device: Any
) -> None:
    open_pass_close(route, tmp_path, 0)  # a GPU's driver opens descriptors of its own, once
    before = footprint()
    streamer = open_route(route, tmp_path, device)
    streamer.run_pass(None, nothing)
    assert footprint() != before
    del streamer
    gc.collect()
    assert footprint() == before
    assert_nothing_is_left(device)


def test_closing_gives_all_memory_back_without_a_garbage_collection(
    tmp_path: Path, tensors: Any, route: str, device: Any
) -> None:
    streamer = open_route(route, tmp_path, device)
    streamer.run_pass(None, nothing)
    pipeline = streamer._parts.pipeline
    owned = [weakref.ref(lane) for lane in pipeline.lanes]
    owned += [weakref.ref(pool.arena) for lane in pipeline.lanes for pool in lane.memory.host_pools]
    owned += [weakref.ref(owner) for owner in pipeline.residents.owners]
    del pipeline
    gc.collect()
    gc.disable()
    try:
        streamer.close()
        assert not [ref for ref in owned if ref() is not None]
    finally:
        gc.enable()


def test_weights_kept_beyond_their_time_stay_readable_after_close(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS)
    kept: list[torch.Tensor] = []
    with open_checkpoint(None, tmp_path) as streamer:
        streamer.run_pass(None, lambda x, w, i: kept.extend(w.values()))
    assert all(torch.isfinite(tensor.sum()) for tensor in kept)


def test_memory_is_what_the_slots_take_and_does_not_grow_with_passes(tmp_path: Path) -> None:
    save_file(tiny_tensors(NUM_LAYERS, hidden=512), tmp_path / "model.safetensors")
    with open_checkpoint(None, tmp_path, n_gpu=1, n_cpu_pinned=0) as streamer:
        largest = max(layer.nbytes for layer in streamer.manifest.layers)
        assert streamer.memory.host_bytes <= 2 * (largest + 8192)
        streamer.run_pass(None, nothing)
        before = psutil.Process().memory_info().rss
        for _ in range(300):
            streamer.run_pass(None, nothing)
        assert psutil.Process().memory_info().rss - before < 8 << 20


OPEN = """
import os, sys, threading, warnings
from layer_streamer import LayerStreamer, ClosedError
options = {}
streamer = LayerStreamer.from_checkpoint(sys.argv[1], device="cpu", **options)
streamer.run_pass(None, lambda x, w, i: x)
"""
ENDINGS = [
    "",
    "next(streamer.sweep())",
    "sweep = streamer.sweep(); next(sweep)",
    "sys.exit(0)",
    "streamer.itself = streamer",
    "t = threading.Thread(target=lambda: next(streamer.sweep())); t.start(); t.join()",
]
DAEMON = """
def work():
    try:
        while True: streamer.run_pass(None, lambda x, w, i: x)
    except ClosedError: pass
threading.Thread(target=work, daemon=True).start()
"""
FORK = """
warnings.simplefilter("ignore", DeprecationWarning)
plan, memory = streamer.plan, streamer.memory
sweep = streamer.sweep()
next(sweep)
pid = os.fork()
if pid == 0:
    try:
        streamer.run_pass(None, lambda x, w, i: x)
    except ClosedError as error:
        assert "process" in str(error)
        assert (streamer.plan, streamer.memory) == (plan, memory)
        streamer.close()
        assert (streamer.plan, streamer.memory) == (plan, memory)
        sys.exit(7)
    sys.exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert sum(1 for _ in sweep) == 5
streamer.run_pass(None, lambda x, w, i: x)
streamer.close()
"""
FORKED = ["{}", "{'read_mode': 'mapped'}", "{'device_budget': '1GiB'}"]
SCRIPTS = [OPEN + ending for ending in [*ENDINGS, DAEMON]]
SCRIPTS += [OPEN.replace("{}", options, 1) + FORK for options in FORKED]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """How each of SCRIPTS ended, and what it printed."""
    path = tmp_path_factory.mktemp("scripts")
    tiny_checkpoint(path, NUM_LAYERS)
    done = [run_script(script, path, strict=True) for script in SCRIPTS]
    return {process.args: (process.returncode, process.stdout, process.stderr) for process in done}


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_interpreter_with_an_open_streamer_exits_cleanly(ended: Any, ending: str) -> None:
    assert ended[OPEN + ending] == (0, "", "")


def test_an_exit_while_a_daemon_thread_runs_passes_neither_hangs_nor_crashes(ended: Any) -> None:
    assert ended[OPEN + DAEMON] == (0, "", "")


@pytest.mark.parametrize("options", FORKED)
def test_a_forked_child_is_told_so_and_its_end_does_not_touch_the_parent(
    ended: Any, options: str
) -> None:
    assert ended[OPEN.replace("{}", options, 1) + FORK] == (0, "", "")


def test_a_real_sigint_ends_a_child_in_a_pass_with_keyboard_interrupt(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS)
    script = OPEN + (
        "print('ready', file=sys.stderr)\nwhile True: streamer.run_pass(None, lambda x, w, i: x)\n"
    )
    with Fork(script, tmp_path) as child:
        assert child.stderr.readline() == b"ready\n"
        child.send_signal(signal.SIGINT)
        done = child.wait()
    assert done.returncode == -signal.SIGINT
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
