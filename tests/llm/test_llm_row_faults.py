"""What one row raises ends that row: the others get what they would have got alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_model import VOCABULARY, byte_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_engine import PROMPTS, make_engine, message

from layer_streamer.llm import parts as parts_module
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.errors import EngineError, RowsError
from layer_streamer.llm.text.sampling import Sampler
from layer_streamer.llm.text.stopping import TextStream

OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "top_k": 20, "seed": 3}
Panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
"""What a package that is written in Rust raises; the real class can be had from nowhere."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def shared(path: Path) -> Iterator[StreamingEngine]:
    with make_engine(path) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(shared: StreamingEngine) -> list[tuple[int, ...]]:
    """Each prompt's ids, with the seed that it has in the list."""
    return [
        shared.generate(ids, **(OPTIONS | {"seed": 3 + i}), return_details=True).ids
        for i, ids in enumerate(PROMPTS)
    ]


def others_are_whole(engine: StreamingEngine, alone: Any, bad: int, match: str) -> None:
    """One of the prompts fails, whichever way the texts are asked for."""
    found = engine.generate(PROMPTS, return_details=True, **OPTIONS)
    for i, done in enumerate(found):
        if i == bad:
            assert done.finish_reason == "error" and match in message(done.error)
            assert done.ids == alone[i][: len(done.ids)] and done.error.__traceback__ is None
        else:
            assert (done.ids, done.error) == (alone[i], None)
    with pytest.raises(RowsError, match=f"prompt {bad} of the list: ") as caught:
        engine.generate(PROMPTS, **OPTIONS)
    assert match in message(caught.value) and list(caught.value.errors) == [bad]
    texts = [done.text for done in found]
    assert [done.text for done in caught.value.completions] == texts
    pieces = ["" for _ in PROMPTS]
    with pytest.raises(RowsError):
        for row, piece in engine.generate(PROMPTS, stream=True, **OPTIONS):
            pieces[row] += piece
    del pieces[bad], texts[bad]
    assert pieces == texts
    with pytest.raises(type(found[bad].error)) as single:
        engine.generate(PROMPTS[bad], **OPTIONS | {"seed": 3 + bad})
    assert match in message(single.value)
    assert len(list(engine._runner.kv.rows)) == 0


def failing_pass(engine: StreamingEngine, bad: int, error: Exception) -> None:
    """Passes fail that the row of a prompt is in."""
    forward = engine._runner.forward

    def wrong(entries: Any, **options: Any) -> torch.Tensor:
        logits = forward(entries, **options)
        if any(list(ids[: len(PROMPTS[bad])]) == PROMPTS[bad] for _, ids in entries):
            for row, ids in entries:
                row.length -= len(ids)  # as it is after a pass that did not end
            raise error
        return logits

    engine._runner.forward = wrong  # type: ignore[method-assign]


@pytest.mark.parametrize("bad", range(len(PROMPTS)))
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory\nframe #0: <unknown>"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        IndexError("index 7 is out of bounds"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_pass_that_has_no_memory_for_one_row(
    path: Path, alone: Any, bad: int, error: Any
) -> None:
    with make_engine(path) as engine:
        failing_pass(engine, bad, error)
        others_are_whole(engine, alone, bad, type(error).__name__)


@pytest.mark.parametrize("error", [TypeError("TextInputSequence must be str"), Panic("at 4"), ""])
@pytest.mark.parametrize("where", ["push", "finish", "__init__"])
def test_a_tokenizer_that_breaks_down_over_one_row(
    path: Path, alone: Any, monkeypatch: pytest.MonkeyPatch, where: str, error: Any
) -> None:
    start, original = TextStream.__init__, getattr(TextStream, where)
    bad = {}

    def noting(self: Any, tokenizer: Any, ids: Any, stops: Any, **options: Any) -> None:
        start(self, tokenizer, ids, stops, **options)
        bad[id(self)] = list(ids) == PROMPTS[2]

    def breaking(self: Any, *arguments: Any, **options: Any) -> Any:
        if where == "__init__":
            noting(self, *arguments, **options)
        if bad[id(self)]:
            raise error or OverflowError
        return None if where == "__init__" else original(self, *arguments, **options)

    monkeypatch.setattr(TextStream, "__init__", noting)
    monkeypatch.setattr(TextStream, where, breaking)
    with make_engine(path) as engine:
        others_are_whole(engine, alone, 2, type(error or OverflowError()).__name__)


@pytest.mark.parametrize("where", ["see", "choose"])
def test_a_sampler_that_has_no_memory_for_one_row(
    path: Path, alone: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    original, bad = getattr(Sampler, where), Sampler(seed=4)._generator.initial_seed()

    def wrong(self: Sampler, *arguments: Any) -> Any:
        if self._generator.initial_seed() == bad:
            raise RuntimeError("no memory")
        return original(self, *arguments)

    monkeypatch.setattr(Sampler, where, wrong)
    with make_engine(path) as engine:
        others_are_whole(engine, alone, 1, "RuntimeError: no memory")


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ([], "the prompt is empty"),
        ([5, VOCABULARY], "token id 258: must be from 0 to 257"),
        ([-1], "token id -1"),
        ([1.5], "whole numbers"),
        (["a"], "whole numbers"),
        (None, "whole numbers"),
        ([5] * 64, "64 tokens, max_length=64"),
        (OSError("the disk is gone"), "the disk is gone"),
    ],
)
def test_ids_that_cannot_be_taken_fail_in_their_place(
    shared: StreamingEngine, alone: Any, prompt: Any, match: str
) -> None:
    prompts = [PROMPTS[0], prompt, *PROMPTS[2:]]
    found = list(shared.completions(prompts, **OPTIONS))
    assert [done.ids for done in found] == [alone[0], (), *alone[2:]]
    assert match in message(found[1].error)
    with pytest.raises(RowsError, match="prompt 1 of the list"):
        list(shared.events(prompts, **OPTIONS))
    with pytest.raises(type(found[1].error)):
        list(shared.events([prompt], **OPTIONS))


def test_prompts_that_cannot_be_encoded_fail_in_their_place(shared: StreamingEngine) -> None:
    good = shared.generate("Hello", max_new_tokens=4)
    bad = ["", [{"role": "user"}], 5, None, "half \ud83d", ["a", "b"], {"a": 1}, [VOCABULARY]]
    found = shared.generate(["Hello", *bad, "Hello"], max_new_tokens=4, return_details=True)
    assert found[0].text == found[-1].text == good
    assert all(message(done.error) for done in found[1:-1])


def test_whatever_a_tokenizer_raises_over_a_prompt_is_a_value_error_in_one_line(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_engine(path) as engine:
        for error in (TypeError("no\nstr"), Panic("at 4"), KeyError("x"), AssertionError()):

            def broken(*_: Any, error: Any = error) -> Any:
                raise error

            monkeypatch.setattr(engine._prompts._encoder, "encode", broken)
            with pytest.raises(ValueError) as caught:
                engine.encode("Hello")
            assert type(error).__name__ in message(caught.value)
        monkeypatch.setattr(engine._prompts._encoder, "encode", lambda *_: sys.exit())
        with pytest.raises(SystemExit):
            engine.generate(["Hello", "Hi"])


def test_prompts_that_cease_to_come_raise_when_those_that_came_have_ended(
    shared: StreamingEngine, alone: Any
) -> None:
    def coming() -> Iterator[list[int]]:
        yield from PROMPTS[:2]
        raise OSError("the disk is gone")

    found = []
    with pytest.raises(OSError, match="the disk is gone"):
        for done in shared.completions(coming(), **OPTIONS):
            found.append(done.ids)
    assert found == alone[:2]


def test_what_a_caller_raises_is_not_taken_for_a_rows_fault(shared: StreamingEngine) -> None:
    class OwnError(Exception):
        pass

    def stop(layer_idx: int) -> None:
        raise OwnError

    with pytest.raises(OwnError):
        list(shared.events(PROMPTS, on_layer=stop, **OPTIONS))
    assert len(list(shared._runner.kv.rows)) == 0


@pytest.mark.parametrize(
    "error", [RuntimeError("can't start new thread"), torch.OutOfMemoryError("CUDA\nno"), Panic()]
)
def test_an_engine_that_the_machine_refuses_is_an_error_in_one_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def refuse(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(parts_module, "open_runner", refuse)
    with pytest.raises(EngineError, match="the engine cannot be opened: ") as caught:
        make_engine(path)
    assert type(error).__name__ in message(caught.value) and caught.value.__cause__ is error


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_number_of_rows_may_fail_in_any_way_beside_any_others(
    path: Path, shared: StreamingEngine, data: st.DataObject
) -> None:
    faults = st.sampled_from([None, "ids", "error", "pass", "sampler"])
    rows = data.draw(st.lists(st.tuples(st.integers(1, 40), faults), max_size=12))
    prompts = [[(i * 17 + k) % 256 for k in range(n)] for i, (n, _) in enumerate(rows)]
    options = {"max_new_tokens": 3, "temperature": 1.0, "seed": 0}
    alone = [
        shared.generate(ids, **(options | {"seed": i}), return_details=True).ids
        for i, ids in enumerate(prompts)
    ]
    given = [
        {"ids": [999], "error": KeyError("x")}.get(fault or "", ids)
        for ids, (_, fault) in zip(prompts, rows, strict=True)
    ]
    with make_engine(path, max_batch=3, kv_tokens=256, prefill_chunk=16) as engine:
        forward = engine._runner.forward
        bad = [ids for ids, (_, fault) in zip(prompts, rows, strict=True) if fault == "pass"]

        def wrong(entries: Any, **kwargs: Any) -> torch.Tensor:
            if any(list(ids) in bad and row.length == 0 for row, ids in entries):
                raise RuntimeError("no memory")
            return forward(entries, **kwargs)

        engine._runner.forward = wrong  # type: ignore[method-assign]
        choose = Sampler.choose
        with pytest.MonkeyPatch.context() as patch:
            seeds = {Sampler(seed=i)._generator.initial_seed() for i, (_, f) in enumerate(rows)
                     if f == "sampler"}  # fmt: skip

            def unlucky(self: Sampler, logits: torch.Tensor) -> torch.Tensor:
                if self._generator.initial_seed() in seeds:
                    raise RuntimeError("no luck")
                return choose(self, logits)

            patch.setattr(Sampler, "choose", unlucky)
            found = list(engine.completions(given, **options))
    for done, ids, (_, fault) in zip(found, alone, rows, strict=True):
        assert (done.error is None, done.ids) == ((True, ids) if fault is None else (False, ()))
