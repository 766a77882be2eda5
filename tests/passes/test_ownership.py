"""What opening, closing or a pass took is given back, wherever an interrupt or an error came."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupter import Interrupt, Interrupter
from routes import (
    NUM_LAYERS,
    Boom,
    assert_next_pass_is_exact,
    make_devices,
    nothing,
    nothing_left,
    open_route,
    route_params,
)
from support import FailingDisk, open_checkpoint

from layer_streamer import LayerStreamer, ReadError, StreamerError
from layer_streamer.planning.layout import PAGE
from layer_streamer.transport import pipeline as transport_pipeline

HANG_SECONDS = 10.0
SAMPLES = 12
"""Interrupts of the default suite; the slow one comes to every bytecode."""
PARTS = 16
OWN_NOTHING = ("planning", "machine")


def opening(route: str, path: Path, device: Any) -> None:
    open_route(route, path, device, read_threads=2).close()


def load(streamer: LayerStreamer) -> None:
    with streamer:
        streamer.load_static("lm_head.weight")


def closing(route: str, path: Path, device: Any, *, again: bool) -> Callable[[], None]:
    streamer = open_route(route, path, device, read_threads=2)
    streamer.run_pass(None, nothing)

    def close() -> None:
        try:
            streamer.close()
        except Interrupt:
            if again:
                streamer.close()
            raise

    return close


@contextmanager
def swallowed_in_finalizers() -> Iterator[None]:
    """Python swallows, and says, an interrupt that comes in a finalizer: it must not lose anything.

    It is not kept, as pytest would: its frames hold whatever was at work.
    """
    before = sys.unraisablehook

    def swallow(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is not Interrupt:
            before(unraisable)

    sys.unraisablehook = swallow
    try:
        yield
    finally:
        sys.unraisablehook = before


def interrupt_at(number: int, device: Any, make: Callable[[], Callable[[], None]]) -> bool:
    """Interrupt what ``make`` gives at its ``number``-th bytecode; False if it has no more."""
    with swallowed_in_finalizers(), nothing_left(device):
        use: Callable[[], None] | None = make()
        assert use is not None
        try:
            with Interrupter(number, "opcode", OWN_NOTHING) as interrupter:
                use()
        except Interrupt:
            pass
        use = None
    return interrupter.fired


def makers(route: str, path: Path, device: Any) -> dict[str, Callable[[], Callable[[], None]]]:
    return {
        "open": lambda: lambda: opening(route, path, device),
        "load": lambda: partial(load, open_route(route, path, device, read_chunk=PAGE)),
        "close": lambda: closing(route, path, device, again=False),
        "close again": lambda: closing(route, path, device, again=True),
    }


def count_bytecodes(make: Callable[[], Callable[[], None]]) -> int:
    use, far = make(), 1 << 40
    with Interrupter(far, "opcode", OWN_NOTHING) as interrupter:
        use()
    return far - interrupter.left


WAYS = pytest.mark.parametrize("way", ["open", "load", "close", "close again"])


@WAYS
@pytest.mark.parametrize("route", route_params("cpu direct", "two partial"))
def test_an_interrupt_at_a_bytecode_of_opening_loading_or_closing_leaves_nothing(
    tmp_path: Path, tensors: Any, route: str, device: Any, way: str
) -> None:
    make = makers(route, tmp_path, device)[way]
    count, rng = count_bytecodes(make), random.Random()
    assert count > 100
    for number in rng.sample(range(count), SAMPLES):
        interrupt_at(number, device, make)
    with open_route(route, tmp_path, device) as streamer:
        assert_next_pass_is_exact(streamer, device, tensors)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@WAYS
@pytest.mark.parametrize("route", ["cpu direct", "mapped", "arena", "two partial"])
def test_an_interrupt_at_any_bytecode_of_opening_loading_or_closing_leaves_nothing(
    tmp_path: Path, tensors: Any, route: str, device: Any, way: str, part: int
) -> None:
    make, number = makers(route, tmp_path, device)[way], part
    while interrupt_at(number, device, make):
        number += PARTS
    assert number > 100


def refuse_threads(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """From the ``number``-th on, no thread can be started."""
    start, left = threading.Thread.start, itertools.count(number, -1)

    def refuse(thread: threading.Thread) -> None:
        if next(left) <= 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)


@pytest.mark.parametrize("route", route_params("cpu pools", "partial"))
def test_an_opening_that_is_refused_a_thread_says_so_and_leaves_nothing(
    tmp_path: Path, tensors: Any, monkeypatch: Any, route: str, device: Any
) -> None:
    open_route(route, tmp_path, device, read_threads=2).close()
    for number in itertools.count():
        kept = None
        with nothing_left(device), monkeypatch.context() as patch:
            refuse_threads(patch, number)
            try:
                open_route(route, tmp_path, device, read_threads=2).close()
            except StreamerError as error:
                kept = error  # with its frames: what they hold is closed all the same
        if kept is None:
            break
        assert "can't start new thread" in str(kept)
        assert "ulimit -u" in str(kept)
    assert number > 4


class Engine:
    """Owns a streamer that calls back a method, a function of its own, or what leads to it."""

    def __init__(self, path: Path, way: str) -> None:
        self.seen: list[int] = []
        on_copy = {
            "method": self.note,
            "lambda": lambda i, stream: self.note(i, None),
            "callable": self,
        }[way]
        self.streamer = open_checkpoint(None, path, on_copy=on_copy)

    def note(self, layer_idx: int, stream: object) -> None:
        self.seen.append(layer_idx)

    __call__ = note


@pytest.mark.parametrize("way", ["method", "lambda", "callable"])
def test_a_callback_that_leads_to_the_streamer_does_not_keep_it_from_being_collected(
    tmp_path: Path, tensors: Any, way: str
) -> None:
    with nothing_left(None):
        engine = Engine(tmp_path, way)
        engine.streamer.run_pass(None, nothing)
        assert engine.seen[:NUM_LAYERS] == list(range(NUM_LAYERS))
        gone = weakref.ref(engine.streamer)
        del engine
        gc.collect()
        assert gone() is None


def test_a_callback_that_nobody_else_holds_is_called_in_every_pass_of_a_sweep(
    tmp_path: Path, tensors: Any
) -> None:
    seen: list[int] = []
    sweep = open_checkpoint(None, tmp_path, on_copy=lambda i, stream: seen.append(i)).sweep()
    gc.collect()
    for layer_idx, _ in sweep:
        assert layer_idx in seen


def failing_pass(streamer: LayerStreamer, disk: FailingDisk) -> weakref.ref[torch.Tensor]:
    """A pass over an activation of its own, which fails; is that still there afterwards?"""
    activation = torch.zeros(8)
    disk.times = 1
    with pytest.raises((ReadError, Boom)):
        streamer.run_pass(activation, nothing)
    return weakref.ref(activation)


@pytest.mark.parametrize("route", route_params("cpu pools", "pools", "ring"))
def test_what_a_failed_pass_was_given_is_freed_without_a_garbage_collection(
    tmp_path: Path, tensors: Any, route: str, device: Any, monkeypatch: Any
) -> None:
    streamer = open_route(route, tmp_path, device)
    spec = next(iter(streamer.manifest.layers[2].tensors.values()))
    disk = FailingDisk(spec.offset, errno.EIO)
    monkeypatch.setattr(os, "preadv", disk)
    owned = [
        weakref.ref(pool.arena)
        for lane in streamer._parts.pipeline.lanes
        for pool in lane.memory.host_pools
    ]
    gc.collect()
    gc.disable()
    try:
        assert failing_pass(streamer, disk)() is None
        # An error that a later pass would have raised holds nothing either.
        disk.times = 1
        for _ in streamer.sweep():
            break
        disk.failed.wait(HANG_SECONDS)
        streamer.close()
        assert not [ref for ref in owned if ref() is not None]
    finally:
        gc.enable()


def test_what_a_pass_was_given_is_freed_after_an_error_of_on_copy(
    tmp_path: Path, tensors: Any
) -> None:
    def on_copy(layer_idx: int, stream: object) -> None:
        if layer_idx == 3:
            raise Boom

    with open_checkpoint(None, tmp_path, on_copy=on_copy) as streamer:
        gc.collect()
        gc.disable()
        try:
            assert failing_pass(streamer, FailingDisk(-1, errno.EIO))() is None
        finally:
            gc.enable()


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Reads that do not end until the event is set, from when ``hangs`` is set on."""
    monkeypatch.setattr(transport_pipeline, "JOIN_SECONDS", 0.05)
    go_on, read = threading.Event(), os.preadv
    go_on.hangs, go_on.entered = False, threading.Event()  # type: ignore[attr-defined]

    def hang(*args: Any) -> int:
        if go_on.hangs:  # type: ignore[attr-defined]
            go_on.entered.set()  # type: ignore[attr-defined]
            go_on.wait(HANG_SECONDS)
        return read(*args)

    monkeypatch.setattr(os, "preadv", hang)
    yield go_on
    go_on.set()


def test_a_close_that_fails_is_noted_on_the_error_that_left_the_block(
    tmp_path: Path, tensors: Any, hanging: Any
) -> None:
    def fail(x: Any, weights: Any, layer_idx: int) -> Any:
        hanging.hangs = True
        raise Boom

    with pytest.raises(Boom) as raised, open_checkpoint(None, tmp_path) as streamer:
        try:
            streamer.run_pass(None, fail)
        finally:
            assert hanging.entered.wait(HANG_SECONDS)
    (note,) = raised.value.__notes__
    assert "did not stop within" in note
    hanging.set()
    streamer.close()
    assert streamer.closed


def test_closing_waits_for_all_threads_together(
    tmp_path: Path, tensors: Any, hanging: Any, monkeypatch: Any
) -> None:
    left: list[float] = []
    """What there was to wait for those that come after one that did not end."""
    join, late = threading.Thread.join, threading.Event()

    def fail(x: Any, weights: Any, layer_idx: int) -> Any:
        hanging.hangs = True
        raise Boom

    def joined(thread: threading.Thread, timeout: float | None = None) -> None:
        if late.is_set():
            left.append(timeout or 0.0)
        join(thread, timeout)
        if thread.is_alive():
            late.set()

    with open_route("cpu two", tmp_path, make_devices("cpu two"), read_threads=4) as streamer:
        with pytest.raises(Boom):
            streamer.run_pass(None, fail)
        assert hanging.entered.wait(HANG_SECONDS)
        monkeypatch.setattr(threading.Thread, "join", joined)
        with pytest.raises(StreamerError, match="layer-streamer-read"):
            streamer.close()
        monkeypatch.undo()
        assert late.is_set() and not any(left)
        hanging.set()


class CollectsOnce(set[int]):
    """Of the readers' own: collects garbage in the midst of a step, as Python may at any point."""

    def __init__(self) -> None:
        super().__init__()
        self.armed = threading.Event()
        self.done = threading.Event()

    def add(self, element: int) -> None:
        super().add(element)
        if self.armed.is_set() and not self.done.is_set():
            self.done.set()
            gc.collect()


def test_a_streamer_that_one_of_its_own_threads_collects_closes_all_the_same(
    tmp_path: Path, tensors: Any
) -> None:
    with nothing_left(None):
        gc.disable()
        try:
            owner: dict[str, Any] = {"streamer": open_checkpoint(None, tmp_path, n_gpu=1)}
            owner["itself"] = owner
            trap = CollectsOnce()
            owner["streamer"]._parts.pipeline.lanes[0].reader._filled = trap
            gone = weakref.ref(owner["streamer"])
            sweep = owner["streamer"].sweep()
            next(sweep)
            trap.armed.set()
            sweep.close()
            del sweep, owner
            # Prefetch starts over: the readers go on filling slots.
            trap.done.wait(HANG_SECONDS)
        finally:
            gc.enable()
        assert trap.done.is_set()
        gc.collect()
        assert gone() is None
