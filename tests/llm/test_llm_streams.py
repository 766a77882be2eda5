"""Streams that end or are cut off, what is said before anything is computed, kinds of options."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from byte_model import TOKENIZER_FILES, byte_model
from small_engine import PROMPTS, make_engine, message

from layer_streamer import ClosedError
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.errors import UnsupportedModelError


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def shared(path: Path) -> Iterator[StreamingEngine]:
    with make_engine(path) as engine:
        yield engine


def test_a_stream_that_has_ended_just_ends_when_a_newer_call_follows(
    shared: StreamingEngine,
) -> None:
    stream = shared.generate(PROMPTS[0], max_new_tokens=1, stream=True, temperature=0)
    next(stream, None)
    shared.generate(PROMPTS[1], max_new_tokens=1)
    assert list(stream) == []
    events = shared.events(PROMPTS, max_new_tokens=1)
    first = [next(events) for _ in PROMPTS]
    shared.generate(PROMPTS[1], max_new_tokens=1)
    assert len(first) == 4 and list(events) == []


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_stream_that_closing_cuts_off_says_so(path: Path, taken: int) -> None:
    """Even where it never began, and where all rows end in the pass of which events are left."""
    with make_engine(path) as engine:
        events = engine.events(PROMPTS, max_new_tokens=2)
        waiting = engine.events(iter(PROMPTS * 3), max_new_tokens=1)
        for _ in range(taken):
            next(events)
            next(waiting)
    for stream in (events, waiting):
        with pytest.raises(ClosedError, match="closed"):
            list(stream)


def test_a_model_without_a_tokenizer_says_so_before_it_computes(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    for name in TOKENIZER_FILES:
        (tmp_path / name).unlink()
    with make_engine(tmp_path) as engine:
        forward, engine._runner.forward = engine._runner.forward, None  # type: ignore
        for options in ({}, {"stream": True}, {"stop": "x", "return_details": True}):
            with pytest.raises(UnsupportedModelError, match="no tokenizer"):
                engine.generate([1, 2], **options)  # type: ignore[arg-type]
        engine._runner.forward = forward  # type: ignore[method-assign]
        assert len(engine.generate([1, 2], max_new_tokens=3, return_details=True).ids) == 3


def test_options_of_other_kinds_are_taken_or_refused_in_one_line(shared: StreamingEngine) -> None:
    plain = shared.generate("Hi", max_new_tokens=3, seed=1, temperature=0.5, top_k=4, stop=())
    assert plain == shared.generate(
        "Hi", max_new_tokens=np.int32(3), seed=np.int64(1), temperature=np.float32(0.5),
        top_k=np.uint8(4), stop=None,
    )  # fmt: skip
    assert plain == shared.generate(
        "Hi", max_new_tokens=3, seed=1 + 2**64, temperature=0.5, top_k=4, stop=iter(["\0never"])
    )
    for options in (
        {"max_new_tokens": 1.0}, {"max_new_tokens": True}, {"max_new_tokens": None}, {"seed": 1.5},
        {"seed": "3"}, {"stop": 5}, {"stop": b"ab"}, {"stop": [None]}, {"temperature": True},
        {"top_k": 1.5}, {"top_p": "0.5"}, {"temperature": 1j}, {"min_p": np.array([0.5])},
    ):  # fmt: skip
        with pytest.raises(ValueError) as caught:
            shared.generate("Hi", **options)
        assert next(iter(options)) in message(caught.value)
