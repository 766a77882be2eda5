"""An interrupt at every bytecode of the hooks, one after the other: the next forwards are exact."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from block_models import HIDDEN, Net, Streamed, streamed
from interrupter import Interrupt, Interrupter
from routes import Boom
from support import HANG_SECONDS, in_thread

BLOCKS = 3
BELOW = ("transport", "planning", "machine", "devices", "checkpoint")
"""Wings in which an interrupt is tried by the tests of passes."""
PARTS = 6
"""Tests that the interrupts at every bytecode are dealt out to: each has but so much time."""


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Streamed]:
    with streamed(tmp_path, lambda: Net(BLOCKS), n_gpu=0, n_cpu=0) as some:
        yield some


@contextmanager
def swallowed_in_finalizers() -> Iterator[None]:
    """Python swallows, and says, what is raised while it finalizes a generator."""
    before = sys.unraisablehook

    def swallow(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is not Interrupt:
            before(unraisable)

    sys.unraisablehook = swallow
    try:
        yield
    finally:
        sys.unraisablehook = before


def interrupt_everywhere(
    some: Streamed,
    use: Callable[[Streamed], None],
    *,
    skipped: Sequence[str] = (),
    stride: int = 1,
    first: int = 0,
) -> int:
    """Interrupt ``use`` at every ``stride``-th bytecode; a forward is exact each time, on this
    thread or another. How often it was interrupted."""
    number, count = first, 0
    while True:
        guard = threading.Timer(HANG_SECONDS, some.streamer.close)
        guard.start()
        with swallowed_in_finalizers():
            try:
                with Interrupter(number, "opcode", skipped) as interrupter:
                    use(some)
            except Interrupt:
                pass
            finally:
                sys.settrace(None)
            if count % 3 == 2:
                assert in_thread(lambda: some.agree(way=range(BLOCKS))) is None
            for seed in range(2):
                some.agree(seed, way=range(BLOCKS))
        guard.cancel()
        guard.join()
        if not interrupter.fired:
            return count
        number, count = number + stride, count + 1


def run(some: Streamed, *way: int) -> None:
    some.model.way = way
    with torch.no_grad():
        some.model(torch.ones(2, HIDDEN))


def walk(some: Streamed) -> None:
    """Forwards of every kind."""
    run(some, 0, 1, 2)
    run(some, 0, 1)
    run(some, 0, 2, 2)
    run(some, 0, 1, 1, 2, 2)


def fail(some: Streamed) -> None:
    """A forward that fails, and one after it."""

    def boom() -> None:
        raise Boom

    some.model.blocks[1].act = boom
    try:
        run(some, 0, 1, 2)
    except Boom:
        pass
    finally:
        some.model.blocks[1].act = None
    run(some, 0, 1)


USES = {"walk": walk, "fail": fail}


@pytest.mark.parametrize("use", ["walk", "fail"])
def test_after_an_interrupt_at_a_bytecode_of_the_hooks_forwards_are_exact(
    opened: Streamed, use: str
) -> None:
    stride = 89 if use == "walk" else 41
    assert interrupt_everywhere(opened, USES[use], skipped=BELOW, stride=stride) > 20


@pytest.mark.slow
@pytest.mark.parametrize("first", range(PARTS))
@pytest.mark.parametrize("use", ["walk", "fail"])
def test_after_an_interrupt_at_any_bytecode_of_a_forward_the_next_ones_are_exact(
    opened: Streamed, use: str, first: int
) -> None:
    count = interrupt_everywhere(opened, USES[use], stride=PARTS, first=first)
    assert count > 1000 // PARTS


def test_after_an_interrupted_close_one_can_close_again(opened: Streamed) -> None:
    number = 0
    while True:
        opened.agree(way=range(BLOCKS))
        run(opened, 0, 1)
        with swallowed_in_finalizers():
            try:
                with Interrupter(number, "opcode", BELOW) as interrupter:
                    opened.runner.close()
            except Interrupt:
                pass
            finally:
                sys.settrace(None)
        opened.runner.close()
        for block in opened.model.blocks:
            assert all(p.is_meta for p in block.parameters())
            assert len(block._forward_pre_hooks) == 1  # the tests' own
        opened.stream_again()
        if not interrupter.fired:
            break
        number += 13
    assert number > 100
