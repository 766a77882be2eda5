"""An interrupt at every line (and every bytecode) of the calling thread, one after the other."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from interrupter import Interrupt, Interrupter
from routes import ROUTES, open_route, route_params
from support import Witness

from layer_streamer import LayerStreamer

NUM_LAYERS = 3
"""Twice as many where there are to be some in every tier."""
HANG_SECONDS = 100.0


def interrupt_everywhere(
    streamer: LayerStreamer,
    use: Callable[[], None],
    check: Callable[[], None],
    kind: str,
    *,
    stride: int = 1,
    first: int = 0,
) -> int:
    """Interrupt ``use`` at every ``stride``-th event in turn, from the ``first`` on; ``check`` each
    time. How often it was interrupted."""
    number, count = first, 0
    while True:
        guard = threading.Timer(HANG_SECONDS, streamer.close)
        guard.start()
        try:
            with Interrupter(number, kind) as interrupter:
                use()
        except Interrupt:
            pass
        finally:
            sys.settrace(None)
        check()
        guard.cancel()
        guard.join()
        if not interrupter.fired:
            return count
        number, count = number + stride, count + 1


@pytest.fixture
def opened(
    route: str, device: Any, tmp_path: Path
) -> Iterator[tuple[LayerStreamer, Any, dict[str, torch.Tensor]]]:
    count = 2 * NUM_LAYERS if ROUTES[route].resident else NUM_LAYERS
    tensors = tiny_checkpoint(tmp_path, count, hidden=40)
    with open_route(route, tmp_path, device, dtype=torch.float32) as streamer:
        yield streamer, device, tensors


POOLED = pytest.mark.parametrize("route", ["cpu pools", "pools"])
OTHERS = pytest.mark.parametrize(
    "route",
    route_params(
        "cpu mapped",
        "mapped",
        slow=("cpu partial", "arena", "partial", "two partial", "host views", "host images"),
    ),
)
"""What differs between routes is on few lines of the calling thread."""
PARTS = 6
"""Tests that the interrupts at every bytecode are dealt out to: each has but so much time."""


def run_everywhere(opened: Any, kind: str, stride: int, first: int = 0) -> int:
    streamer, device, tensors = opened

    def check() -> None:
        witness = Witness(device, tensors)
        for _ in range(2):
            streamer.run_pass(None, witness)
        assert witness.layers == 2 * list(range(streamer.num_layers))
        witness.check()

    def use() -> None:
        streamer.run_pass(None, lambda x, w, i: x)
        # A pass that is aborted: the interrupt may come while it is. Closed by hand, because
        # Python swallows what is raised while it finalizes a generator.
        sweep = streamer.sweep()
        next(sweep)
        sweep.close()
        streamer.run_pass(None, lambda x, w, i: x)

    return interrupt_everywhere(streamer, use, check, kind, stride=stride, first=first)


@pytest.mark.parametrize(
    ("route", "stride"),
    [
        ("pools", 3),
        pytest.param("cpu pools", 1, marks=pytest.mark.slow),
        pytest.param("pools", 1, marks=pytest.mark.slow),
    ],
)
def test_after_an_interrupt_at_any_line_the_next_passes_are_exact(opened: Any, stride: int) -> None:
    assert run_everywhere(opened, "line", stride) > 200 // stride


@OTHERS
def test_after_an_interrupt_at_a_line_of_another_route_the_next_passes_are_exact(
    opened: Any,
) -> None:
    assert run_everywhere(opened, "line", 7) > 30


@POOLED
def test_after_an_interrupt_at_a_bytecode_the_next_passes_are_exact(opened: Any) -> None:
    assert run_everywhere(opened, "opcode", 29) > 50


@pytest.mark.slow
@pytest.mark.parametrize("first", range(PARTS))
@pytest.mark.parametrize(
    "route", ["cpu pools", "cpu mapped", "pools", "mapped", "arena", "partial", "two partial"]
)
def test_after_an_interrupt_at_any_bytecode_the_next_passes_are_exact(
    opened: Any, first: int
) -> None:
    assert run_everywhere(opened, "opcode", PARTS, first) > 1000 // PARTS


@pytest.mark.parametrize(
    ("route", "stride"),
    [
        pytest.param("cpu pools", 1, marks=pytest.mark.slow),
        ("pools", 2),
        ("two partial", 5),
        pytest.param("pools", 1, marks=pytest.mark.slow),
        pytest.param("two partial", 1, marks=pytest.mark.slow),
    ],
)
def test_after_an_interrupt_at_any_line_another_thread_can_run_a_pass(
    opened: Any, stride: int
) -> None:
    streamer, device, tensors = opened

    def check() -> None:
        errors: list[BaseException] = []

        def other() -> None:
            try:
                streamer.run_pass(None, witness)
            except BaseException as error:
                errors.append(error)

        witness = Witness(device, tensors)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(HANG_SECONDS)
        assert not errors
        witness.check()

    def use() -> None:
        streamer.run_pass(None, lambda x, w, i: x)

    assert interrupt_everywhere(streamer, use, check, "line", stride=stride) > 100 // stride
