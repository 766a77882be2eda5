"""Host memory that a thread takes ahead of the layers: nothing too early, too late, or too much."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import interrupter
import pytest
import torch
from assets import REPOSITORY, open_runner, tiny_checkpoint, tiny_model

from llm.growth import Growth
from llm.kv_host import HostTier
from llm.kv_rows import Row
from llm.pinned import GrowingMemory
from llm.runner import Chunking, Runner

HANG_SECONDS = 20.0
LAYERS = (0, 1, 2)
NAME = "llm-kv-growth"
PROMPT, MORE = [3, 1, 4, 1, 5, 9, 2, 6] * 40, [2, 7, 1]
WINDOW = {"sliding_window": 20, "use_sliding_window": True, "max_window_layers": 1}


def on_thread() -> bool:
    return threading.current_thread().name == NAME


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    for thread in threads():
        thread.join(HANG_SECONDS)
    assert not threads()


@pytest.fixture(scope="module", params=["full", "windows"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    changes = WINDOW if request.param == "windows" else {}
    model = tiny_model("qwen2", max_position_embeddings=2048, **changes)
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), model), model.config


def open_host(model: tuple[Path, Any], **options: Any) -> Any:
    options = {"tokens": 1024, "host_layers": LAYERS, "chunking": Chunking(tokens=64)} | options
    return open_runner(*model, **options)


def add_row(runner: Runner) -> Row:
    row = runner.kv.rows.add(600)
    assert row is not None
    return row


def tier(runner: Runner) -> HostTier:
    assert runner.kv.host is not None
    return runner.kv.host


def two_passes(runner: Runner) -> list[torch.Tensor]:
    row = add_row(runner)
    return [runner.forward([(row, ids)]) for ids in (PROMPT, MORE)]


@pytest.fixture
def expected(model: tuple[Path, Any]) -> list[torch.Tensor]:
    with open_host(model, host_layers=()) as runner:
        return two_passes(runner)


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def gated(monkeypatch: pytest.MonkeyPatch, gate: threading.Event) -> threading.Event:
    """Let the thread stop where memory has been noted as taken and is about to be cleared, until
    the gate opens; the event that is returned says that it is there."""
    there, original = threading.Event(), GrowingMemory._take

    class Late:
        def __init__(self, memory: torch.Tensor) -> None:
            self._memory = memory

        def __getitem__(self, part: slice) -> torch.Tensor:
            there.set()
            gate.wait(HANG_SECONDS)
            return self._memory[part]

    def take(self: GrowingMemory, first: int, after: int) -> None:
        if not on_thread():
            return original(self, first, after)
        view = GrowingMemory.__new__(GrowingMemory)
        view.__dict__.update(self.__dict__)
        view.memory = Late(self.memory)  # type: ignore[assignment]
        original(view, first, after)
        self._borders = view._borders
        return None

    monkeypatch.setattr(GrowingMemory, "_take", take)
    return there


def after_all_threads(runner: Runner, row: Row) -> list[torch.Tensor]:
    """The pass after the prompt's, twice: the first may have been prefetched before they ended."""
    for thread in threads():
        thread.join(HANG_SECONDS)
    first = runner.forward([(row, MORE)])
    runner.kv.rows.truncate(row, len(PROMPT))
    return [first, runner.forward([(row, MORE)])]


@pytest.mark.parametrize("waits", [True, False])
def test_tokens_go_home_only_into_memory_that_has_been_taken(
    model: tuple[Path, Any],
    expected: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    waits: bool,
) -> None:
    """Without the wait, tokens that have gone home are cleared, which must be seen."""
    gate, wait, close_layer = threading.Event(), Growth.wait, HostTier.close_layer
    there = gated(monkeypatch, gate)

    def watched_wait(self: Growth, key: int) -> None:
        if waits:
            gate.set()
            wait(self, key)

    def watched_close(self: HostTier, layer_idx: int, batch: Any) -> None:
        if layer_idx == 0:
            assert there.wait(HANG_SECONDS)
        close_layer(self, layer_idx, batch)

    monkeypatch.setattr(Growth, "wait", watched_wait)
    monkeypatch.setattr(HostTier, "close_layer", watched_close)
    with open_host(model) as runner:
        row = add_row(runner)
        found = [runner.forward([(row, PROMPT)])]
        gate.set()
        found += after_all_threads(runner, row)
    assert same(found, [*expected, expected[1]]) == waits


def test_all_that_a_pass_needs_and_nothing_else_is_taken_by_the_thread(
    model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    take, mine = GrowingMemory._take, []

    def watched(self: GrowingMemory, first: int, after: int) -> None:
        mine.append(on_thread())
        take(self, first, after)

    monkeypatch.setattr(GrowingMemory, "_take", watched)

    def finish(layer_idx: int) -> None:
        for thread in threads():
            thread.join(HANG_SECONDS)

    with open_host(model) as runner:
        host, row = tier(runner), add_row(runner)
        block = 256 * host.token_nbytes
        taken = []
        for count in (1, 200, 55, 1, 300):  # ends of 1, 201, 256, 257 and 557 tokens
            runner.forward([(row, [5] * count)], on_layer=finish)
            taken.append(host.host_nbytes)
        assert all(mine) and mine, "the caller found nothing left to take"
        ring = runner.kv.span(2).ring or 1024
        blocks = [n + 2 * min(n, ring // 256) for n in (1, 1, 1, 2, 3)]
        assert taken == [n * block for n in blocks]


def test_a_pass_that_needs_no_memory_starts_no_thread(
    model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    start = threading.Thread.start

    def watched(self: threading.Thread) -> None:
        started.append(self.name)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", watched)
    with open_host(model) as runner:
        row = add_row(runner)
        for count, times in ((250, 1), (1, 1), (5, 1), (1, 2)):
            runner.forward([(row, [5] * count)])
            assert started.count(NAME) == times
        runner.kv.rows.truncate(row, 250)
        runner.forward([(row, [5] * 20)])
        assert started.count(NAME) == 2, "what was taken is there"


def test_an_error_while_memory_is_taken_is_told_once_and_the_next_pass_works(
    model: tuple[Path, Any], expected: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    take, failed = GrowingMemory._take, []
    with open_host(model) as runner:
        bad = tier(runner)._layers[1].memory

        def watched(self: GrowingMemory, first: int, after: int) -> None:
            if self is bad and not failed:
                failed.append(on_thread())
                raise MemoryError("no memory for layer 1")
            take(self, first, after)

        monkeypatch.setattr(GrowingMemory, "_take", watched)
        row = add_row(runner)
        with pytest.raises(MemoryError, match="no memory for layer 1"):
            runner.forward([(row, PROMPT)])
        assert row.length == 0
        found = [runner.forward([(row, ids)]) for ids in (PROMPT, MORE)]
    assert same(found, expected)


def test_where_no_thread_can_be_had_the_caller_takes_the_memory(
    model: tuple[Path, Any], expected: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refused(self: threading.Thread) -> None:
        if self.name == NAME:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refused)
    with open_host(model) as runner:
        assert same(two_passes(runner), expected)


def fail(layer_idx: int) -> None:
    raise ZeroDivisionError


def opening_stop(monkeypatch: pytest.MonkeyPatch, gate: threading.Event) -> None:
    """The gate opens when the caller comes to wait for the thread's end."""
    stop = Growth.stop

    def watched(self: Growth) -> None:
        if self._thread is not None:
            gate.set()
        stop(self)

    monkeypatch.setattr(Growth, "stop", watched)


def test_a_pass_that_fails_while_memory_is_taken_leaves_a_cache_that_works(
    model: tuple[Path, Any], expected: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    there = gated(monkeypatch, gate)
    opening_stop(monkeypatch, gate)
    with open_host(model) as runner:
        row = add_row(runner)
        with pytest.raises(ZeroDivisionError):
            runner.forward([(row, PROMPT)], on_layer=fail)
        assert there.wait(HANG_SECONDS) and threads()
        found = [runner.forward([(row, PROMPT)])]
        gate.set()
        found += after_all_threads(runner, row)
    assert same(found, [*expected, expected[1]])


def test_closing_while_memory_is_taken_waits_for_what_is_being_taken(
    model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, closed = threading.Event(), []
    there = gated(monkeypatch, gate)
    opening_stop(monkeypatch, gate)
    monkeypatch.setattr(GrowingMemory, "close", lambda self: closed.append(bool(threads())))
    with open_host(model) as runner:
        row, host = add_row(runner), tier(runner)
        with pytest.raises(ZeroDivisionError):
            runner.forward([(row, PROMPT)], on_layer=fail)
        assert there.wait(HANG_SECONDS)
    assert closed == [False] * 3
    assert host.host_nbytes < 3 * 2 * 256 * host.token_nbytes, "no layer is begun any more"


def forget(host: HostTier) -> None:
    """The next pass takes all memory anew."""
    host._growth.stop()
    for layer in host._layers.values():
        old = layer.memory
        layer.memory = GrowingMemory(len(old._mapping), old._block, old._device)


@pytest.mark.parametrize(
    ("module", "kind", "step"),
    [("growth", "line", 1), ("growth", "opcode", 1), ("kv_host", "line", 1)],
)
def test_after_an_interrupt_anywhere_the_next_pass_is_right(
    model: tuple[Path, Any],
    expected: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    kind: str,
    step: int,
) -> None:
    path = REPOSITORY / "examples" / "llm" / f"{module}.py"
    monkeypatch.setattr(interrupter, "LIBRARY", str(path))
    with open_host(model) as runner:
        for number in range(0, 10_000, step):
            forget(tier(runner))
            row = add_row(runner)
            try:
                with interrupter.Interrupter(number, kind) as at:
                    runner.forward([(row, PROMPT)])
            except interrupter.Interrupt:
                assert row.length == 0
                assert torch.equal(runner.forward([(row, PROMPT)]), expected[0])
            assert torch.equal(runner.forward([(row, MORE)]), expected[1])
            runner.kv.rows.drop(row)
            if not at.fired:
                break
    assert not at.fired and number > 10 * step


@pytest.mark.gpu
def test_on_a_gpu_the_thread_page_locks_what_a_pass_needs(model: tuple[Path, Any]) -> None:
    with open_host(model, device="cuda", host_layers=()) as runner:
        expected = two_passes(runner)
    with open_host(model, device="cuda") as runner:
        found = two_passes(runner)
        memories = [layer.memory for layer in tier(runner)._layers.values()]
        assert all(m.pinned and m.memory[: 1 << 12].is_pinned() for m in memories)
    assert same(found, expected)
    assert not any(memory.memory[: 1 << 12].is_pinned() for memory in memories)
