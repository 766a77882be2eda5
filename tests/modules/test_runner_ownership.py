"""Who holds what of a streamed model: threads, copies, collection, rounds of opening it."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from block_models import HIDDEN, NUM_BLOCKS, Net, Streamed, streamed
from routes import nothing_left
from support import HANG_SECONDS, in_thread

from layer_streamer import StreamerError
from layer_streamer.modules.running import walks


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Streamed]:
    with streamed(tmp_path) as some:
        yield some


def run(some: Streamed) -> torch.Tensor:
    with torch.no_grad():
        y: torch.Tensor = some.model(torch.ones(2, HIDDEN))
        return y


class Held:
    """A forward on another thread that stands still where it is told to."""

    def __init__(self, some: Streamed, module: Any) -> None:
        self.arrived, self.goes_on = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self._some = some
        self._handle = module.register_forward_pre_hook(self._wait)
        self._thread = threading.Thread(target=self._run, name="the first")
        self._thread.start()
        assert self.arrived.wait(HANG_SECONDS)

    def _wait(self, module: Any, args: Any) -> None:
        if threading.current_thread() is self._thread:
            self.arrived.set()
            assert self.goes_on.wait(HANG_SECONDS)

    def _run(self) -> None:
        try:
            self._some.agree(5)
        except BaseException as error:
            self.error = error

    def finish(self) -> None:
        self.goes_on.set()
        self._thread.join(HANG_SECONDS)
        self._handle.remove()
        assert not self._thread.is_alive()


def places(some: Streamed) -> dict[str, Any]:
    """Before, within, and between blocks."""
    return {
        "at the first": some.model.blocks[0],
        "in a block": some.model.blocks[3].down,
        "in the last": some.model.blocks[NUM_BLOCKS - 1].down,
    }


@pytest.mark.parametrize("place", ["at the first", "in a block", "in the last"])
def test_a_second_forward_at_once_is_refused_and_the_first_is_exact(
    opened: Streamed, place: str
) -> None:
    first = Held(opened, places(opened)[place])
    for _ in range(2):
        with pytest.raises(StreamerError, match=r"two forwards at once: .* thread 'the first'"):
            run(opened)
    first.finish()
    assert first.error is None
    opened.agree()


@pytest.mark.parametrize("place", ["in a block", "in the last"])
def test_a_forward_that_another_thread_took_for_abandoned_gives_no_result(
    opened: Streamed, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tells whether a thread is in a forward may be wrong; what comes out must not be."""
    first = Held(opened, places(opened)[place])
    with monkeypatch.context() as patch:
        patch.setattr(walks, "computes", lambda thread: False)
        opened.agree()
    first.finish()
    assert isinstance(first.error, StreamerError)
    opened.agree()


class Pausing(Net):
    """Has something between two of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.between = torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            x = self.between(x) if i == 3 else x
            x = block(x)
        return x


def test_a_second_forward_between_two_blocks_of_the_first_is_refused(tmp_path: Path) -> None:
    with streamed(tmp_path, Pausing) as some:
        first = Held(some, some.model.between)
        with pytest.raises(StreamerError, match="two forwards at once"):
            run(some)
        first.finish()
        assert first.error is None
        some.agree()


def test_forwards_take_turns_on_threads_also_after_an_early_exit_on_one_that_lives_on(
    opened: Streamed,
) -> None:
    goes_on, left = threading.Event(), threading.Event()

    def leave_early() -> None:
        opened.agree(way=range(3))
        left.set()
        assert goes_on.wait(HANG_SECONDS)
        opened.agree(7, way=range(NUM_BLOCKS))

    thread = threading.Thread(target=leave_early)
    thread.start()
    assert left.wait(HANG_SECONDS)
    opened.agree(way=range(NUM_BLOCKS))
    opened.agree(way=range(2))
    goes_on.set()
    thread.join(HANG_SECONDS)
    opened.agree(way=range(NUM_BLOCKS))
    assert in_thread(opened.agree) is None


def test_many_threads_at_once_get_an_exact_forward_or_the_one_error(opened: Streamed) -> None:
    start = threading.Barrier(4)
    wrong: list[BaseException] = []
    exact: list[int] = []

    def forwards(seed: int) -> None:
        start.wait(HANG_SECONDS)
        for _ in range(30):
            try:
                opened.agree(seed)
                exact.append(seed)
            except StreamerError as error:
                if "at once" not in str(error) and "one pass at a time" not in str(error):
                    wrong.append(error)
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=forwards, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert not wrong, wrong[:3]
    assert exact
    opened.agree()


def drop(some: Streamed) -> list[weakref.ref[Any]]:
    """Let go of model, runner and streamer; what they were."""
    refs = [weakref.ref(part) for part in (some.model, some.runner.binder, some.streamer)]
    del some.runner, some.streamer, some.model
    return refs


@pytest.mark.parametrize("how_far", [0, 3, NUM_BLOCKS])
@pytest.mark.parametrize("strict", [False, True])
def test_a_model_that_nobody_holds_goes_at_once_with_its_streamer(
    tmp_path: Path, how_far: int, strict: bool
) -> None:
    with nothing_left(None):
        some = Streamed(tmp_path, strict=strict)
        some.model.way = range(how_far)
        run(some)
        gc.collect()
        gc.disable()
        try:
            refs = drop(some)
            assert [ref() for ref in refs] == [None, None, None]
        finally:
            gc.enable()


def test_a_model_that_goes_in_a_forward_that_failed_leaves_nothing(tmp_path: Path) -> None:
    with nothing_left(None):
        some = Streamed(tmp_path)
        some.model.blocks[2].act = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            run(some)
        drop(some)


def test_a_generation_that_nobody_goes_on_with_leaves_the_model_exact(opened: Streamed) -> None:
    def generate() -> Iterator[torch.Tensor]:
        x = torch.ones(2, HIDDEN)
        with torch.no_grad():
            for block in opened.model.blocks:
                x = block(x)
                yield x

    for n in range(1, NUM_BLOCKS):
        abandoned = generate()
        for _ in range(n):
            next(abandoned)
        opened.agree(n)
        del abandoned
        opened.agree(n)


@pytest.mark.parametrize("make", [copy.deepcopy, pickle.dumps])
def test_a_copy_of_a_streamed_model_is_one_clear_error(opened: Streamed, make: Any) -> None:
    opened.agree()
    for part in (opened.model, opened.model.blocks, opened.model.blocks[2]):
        with pytest.raises(StreamerError, match="cannot be copied or pickled"):
            make(part)
    opened.agree()


@pytest.mark.parametrize("rounds", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_rounds_of_opening_and_closing_leave_nothing(tmp_path: Path, rounds: int) -> None:
    def make() -> Net:
        return Net(2)

    with nothing_left(None):
        for n in range(rounds):
            some = Streamed(tmp_path, make)
            some.agree(n)
            if n % 3 == 0:
                some.close()  # the others go by themselves
            del some


def test_rounds_of_streaming_one_model_again_leave_no_hooks_and_no_weights(tmp_path: Path) -> None:
    with streamed(tmp_path) as some:
        blocks = [*some.model.blocks]
        hooks = [len(block._forward_pre_hooks) for block in blocks]
        for n in range(20):
            some.stream_again()
            some.agree(n)
            assert [len(block._forward_pre_hooks) for block in blocks] == hooks
        made = weakref.ref(some.model.blocks[2].up.weight)
        some.runner.close()
        assert made() is None
