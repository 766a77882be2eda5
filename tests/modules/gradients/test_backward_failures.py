"""What goes wrong in a step of training is said, and the next step is exact."""

from __future__ import annotations

import errno
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from block_models import HIDDEN, NUM_BLOCKS, Streamed, streamed, unfinished
from interrupter import Interrupt, Interrupter
from routes import Boom
from support import HANG_SECONDS, FailingDisk, in_thread, rewrite_in_place
from test_backward import KINDS, Checkpointed, agree, gradient

from layer_streamer import CheckpointChangedError, ClosedError, ReadError

BELOW = ("transport", "planning", "machine", "devices", "checkpoint", "passes")
"""Wings in which an interrupt is tried by the tests of passes."""
PARTS = 6
"""Tests that the interrupts at every bytecode are dealt out to."""
FEW = {"n_gpu": 0, "n_cpu_pinned": 0, "n_cpu": 1}


@pytest.fixture(params=[KINDS[0], KINDS[3]])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Streamed]:
    with streamed(tmp_path, lambda: Checkpointed(request.param), **FEW) as some:
        yield some


class Times:
    """Raises at the n-th call, once."""

    def __init__(self, number: int, error: type[BaseException]) -> None:
        self._left, self._error = number, error

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise self._error


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("number", [1, 2])
def test_after_an_error_of_a_block_in_a_forward_or_its_recompute_the_next_step_is_exact(
    opened: Streamed, error: type[BaseException], number: int
) -> None:
    for place in (0, 3, NUM_BLOCKS - 1):
        block = opened.model.blocks[place]
        block.act = Times(number, error)
        with pytest.raises(error):
            gradient(opened.model, 1)
        block.act = None
        agree(opened, range(2))
        assert not unfinished(opened.streamer)


def test_after_an_error_of_a_gradients_hook_the_next_step_is_exact(opened: Streamed) -> None:
    def fail(gradient: torch.Tensor) -> None:
        raise Boom

    for place in (1, NUM_BLOCKS - 1):
        block = opened.model.blocks[place]
        handle = block.register_forward_hook(
            lambda module, args, y: y.register_hook(fail) and None if y.requires_grad else None
        )
        with pytest.raises(Boom):
            gradient(opened.model, 1)
        handle.remove()
        agree(opened, range(2))


def test_a_backward_that_is_left_out_or_done_twice_changes_nothing(opened: Streamed) -> None:
    agree(opened, [1])
    x = torch.ones(2, HIDDEN, requires_grad=True)
    opened.model(x)
    agree(opened, [1])
    u = torch.ones(2, HIDDEN, requires_grad=True)
    for one, y in ((x, opened.model(x).sum()), (u, opened.resident(u).sum())):
        for retain in (True, False):
            y.backward(retain_graph=retain)
        assert one.grad is not None
    assert torch.equal(x.grad, u.grad)  # type: ignore[arg-type]
    agree(opened)


def test_gradients_of_some_blocks_alone_are_exact(opened: Streamed) -> None:
    """As with adapters in the last blocks: the backward ends before the first ones."""
    for _ in range(3):
        found = []
        for model in (opened.model, opened.resident):
            x = torch.ones(2, HIDDEN)
            with torch.no_grad():
                for block in model.blocks[:4]:  # type: ignore[index, union-attr]
                    x = block(x)
            x.requires_grad_()
            y = x
            for block in model.blocks[4:]:  # type: ignore[index, union-attr]
                y = torch.utils.checkpoint.checkpoint(block, y, use_reentrant=False)
            y.sum().backward()
            found.append(x.grad)
        assert torch.equal(*found)  # type: ignore[arg-type]
        assert not unfinished(opened.streamer)
    agree(opened)


def read_errors(some: Streamed, patch: pytest.MonkeyPatch) -> FailingDisk:
    extent = next(iter(some.streamer.manifest.layers[1].tensors.values())).extents[0]
    disk = FailingDisk(extent.offset, errno.EIO)
    patch.setattr("os.preadv", disk)
    return disk


def test_a_read_error_in_a_backward_names_the_block_and_the_next_step_is_exact(
    opened: Streamed, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = read_errors(opened, monkeypatch)
    agree(opened)
    for _ in range(2):
        y = opened.model(torch.ones(2, HIDDEN, requires_grad=True)).sum()
        disk.times = 1
        with pytest.raises(ReadError, match=r"^blocks\.1: layer 1, tensor"):
            y.backward()
        disk.times = 0
        agree(opened, range(2))


def test_a_checkpoint_that_changes_before_a_backward_is_an_error_of_it(tmp_path: Path) -> None:
    with streamed(tmp_path, Checkpointed, **FEW) as some:
        agree(some)
        y = some.model(torch.ones(2, HIDDEN, requires_grad=True)).sum()
        rewrite_in_place(tmp_path / "model.safetensors")
        with pytest.raises(CheckpointChangedError):
            y.backward()


def test_a_backward_after_close_says_so(opened: Streamed) -> None:
    y = opened.model(torch.ones(2, HIDDEN, requires_grad=True)).sum()
    opened.close()
    with pytest.raises(ClosedError):
        y.backward()


@pytest.mark.parametrize("place", [0, 3])
def test_a_close_in_a_backward_is_an_error_of_it(opened: Streamed, place: int) -> None:
    y = opened.model(torch.ones(2, HIDDEN, requires_grad=True)).sum()
    opened.model.blocks[place].act = opened.close
    with pytest.raises((ClosedError, RuntimeError)):
        y.backward()


def test_a_close_between_the_last_block_of_a_backward_and_its_end_is_an_error_of_it(
    opened: Streamed,
) -> None:
    x = torch.ones(2, HIDDEN, requires_grad=True)
    x.register_hook(lambda gradient: opened.close())
    with pytest.raises(ClosedError):
        opened.model(x).sum().backward()


def test_steps_of_different_threads_after_each_other_are_exact(opened: Streamed) -> None:
    for number in range(4):
        assert in_thread(lambda: agree(opened, [1])) is None
        if number % 2:
            agree(opened, [2])
    graphs = [(x, m(x)) for m in (opened.model, opened.resident)
              for x in [torch.ones(2, HIDDEN, requires_grad=True)]]  # fmt: skip
    for _, y in graphs:
        assert in_thread(lambda y=y: y.sum().backward()) is None  # type: ignore[misc]
    assert torch.equal(graphs[0][0].grad, graphs[1][0].grad)  # type: ignore[arg-type]
    agree(opened)


def test_backwards_on_a_thread_that_lives_on_are_exact_as_on_a_gpu(opened: Streamed) -> None:
    """torch runs a GPU's backwards on threads of its own, which stay."""
    with ThreadPoolExecutor(1) as threads:

        def step(seed: int, act: Callable[[], None] | None = None) -> None:
            found = []
            for model in (opened.model, opened.resident):
                x = torch.full((2, HIDDEN), seed / 9, requires_grad=True)
                y = model(x).sum()
                opened.model.blocks[3].act = act
                threads.submit(y.backward).result(HANG_SECONDS)
                found.append(x.grad)
            assert torch.equal(*found)  # type: ignore[arg-type]

        for seed in range(3):
            step(seed)
            with pytest.raises(Boom):
                step(seed, Times(1, Boom))
            opened.model.blocks[3].act = None
            step(seed)
            agree(opened, [seed])


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


def interrupt_everywhere(some: Streamed, stride: int, first: int, skipped: Any = ()) -> int:
    number, count = first, 0
    while True:
        guard = threading.Timer(HANG_SECONDS, some.streamer.close)
        guard.start()
        y = some.model(torch.ones(2, HIDDEN, requires_grad=True)).sum()
        with swallowed_in_finalizers():
            try:
                with Interrupter(number, "opcode", skipped) as interrupter:
                    y.backward()
                    gradient(some.model, 1)
            except Interrupt:
                pass
            finally:
                sys.settrace(None)
            if count % 3 == 2:
                assert in_thread(lambda: agree(some, [1], range(3))) is None
            agree(some, [1], range(3))
            some.agree(way=range(3))
        guard.cancel()
        guard.join()
        if not interrupter.fired:
            return count
        number, count = number + stride, count + 1


def small(path: Path, kind: str) -> Any:
    return streamed(path, lambda: Checkpointed(kind, 3), **FEW)


@pytest.mark.parametrize("kind", KINDS[:1])
def test_after_an_interrupt_at_a_bytecode_of_a_backwards_hooks_steps_are_exact(
    tmp_path: Path, kind: str
) -> None:
    with small(tmp_path, kind) as some:
        assert interrupt_everywhere(some, 151, 0, BELOW) > 10


@pytest.mark.slow
@pytest.mark.parametrize("first", range(PARTS))
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]])
def test_after_an_interrupt_at_any_bytecode_of_a_step_the_next_ones_are_exact(
    tmp_path: Path, kind: str, first: int
) -> None:
    with small(tmp_path, kind) as some:
        assert interrupt_everywhere(some, PARTS, first, BELOW) > 100


def grown(some: Streamed, step: Callable[[], object], steps: int) -> int:
    """By how many objects a hundred steps are more than a few."""

    def count() -> int:
        gc.collect()
        return len(gc.get_objects())

    for _ in range(10):
        step()
    before = count()
    for _ in range(steps):
        step()
    return count() - before


@pytest.mark.parametrize("kind", KINDS[1:2])
def test_a_hundred_steps_leave_no_object_more(tmp_path: Path, kind: str) -> None:
    with small(tmp_path, kind) as some:
        some.model.train()
        assert grown(some, lambda: gradient(some.model, 1), 100) < 50
