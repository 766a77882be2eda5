"""``n`` texts of a prompt are those of a list that has it n times."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from byte_model import byte_model
from hypothesis import given, settings
from hypothesis import strategies as st
from small_engine import PROMPTS, make_engine, message

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.errors import RowsError
from layer_streamer.llm.text.completion import Shape

DRAWN: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "seed": 11}
BAD = [300]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StreamingEngine]:
    with make_engine(byte_model(tmp_path_factory.mktemp("tiny")), reproducible=True) as engine:
        yield engine


def test_texts_of_a_prompt_have_the_seeds_that_follow(engine: Any):
    alone = [engine.generate(PROMPTS[0], **DRAWN | {"seed": 11 + i}) for i in range(3)]
    assert len({*alone}) == 3
    assert engine.generate(PROMPTS[0], n=3, **DRAWN) == alone
    assert engine.generate(PROMPTS[0], n=np.int64(1), **DRAWN) == alone[:1]


def test_of_several_prompts_there_is_a_list_for_each(engine: Any):
    two = PROMPTS[:2]
    found = engine.generate(two, n=2, **DRAWN)
    assert found == [
        engine.generate(two[0], n=2, **DRAWN),
        engine.generate(two[1], n=2, **DRAWN | {"seed": 13}),
    ]
    assert engine.generate([], n=2, **DRAWN) == []


def test_details_are_shaped_like_the_texts(engine: Any):
    found = engine.generate(PROMPTS[:2], n=2, return_details=True, **DRAWN)
    assert [[done.index for done in row] for row in found] == [[0, 1], [2, 3]]
    assert [[done.text for done in row] for row in found] == engine.generate(
        PROMPTS[:2], n=2, **DRAWN
    )


@pytest.mark.parametrize("prompts", [PROMPTS[0], PROMPTS[:1], PROMPTS[:2]])
def test_pieces_come_with_their_rows(engine: Any, prompts: Any):
    texts = ["" for _ in range(4)]
    for row, piece in engine.generate(prompts, n=2, stream=True, **DRAWN):
        texts[row] += piece
    found = engine.generate(prompts, n=2, **DRAWN)
    assert [text for text in texts if text] == [
        text for item in found for text in ([item] if isinstance(item, str) else item)
    ]


def test_a_prompt_that_fails_does_so_in_each_of_its_rows_and_the_others_go_on(engine: Any):
    found = engine.generate([PROMPTS[0], BAD], n=2, return_details=True, **DRAWN)
    assert [done.text for done in found[0]] == engine.generate(PROMPTS[0], n=2, **DRAWN)
    assert ["token id 300" in message(done.error) for done in found[1]] == [True, True]
    with pytest.raises(RowsError, match="prompt 2 of the list: token id 300") as caught:
        engine.generate([PROMPTS[0], BAD], n=2, **DRAWN)
    assert list(caught.value.errors) == [2, 3] and len(caught.value.completions) == 4


def test_the_error_of_a_single_prompt_is_raised_as_it_is(engine: Any):
    with pytest.raises(ValueError, match="token id 300") as caught:
        engine.generate(BAD, n=2, **DRAWN)
    assert not isinstance(caught.value, RowsError)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"n": 0}, "n=0: must be an int of at least 1"),
        ({"n": 1.0}, "n=1.0: must be an int"),
        ({"n": True}, "n=True: must be an int"),
        ({"n": 2, "reuse_prefix": True}, "reuse_prefix=True: takes one prompt"),
        ({"n": 2, "stream": True, "return_details": True}, "return_details=True: not together"),
    ],
)
def test_a_number_of_texts_that_makes_no_sense_is_named_in_one_line(
    engine: Any, options: Any, problem: str
):
    with pytest.raises(ValueError, match=problem) as caught:
        engine.generate(PROMPTS[0], **options)
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(st.lists(st.integers(), max_size=6), st.integers(1, 4))
def test_rows_are_each_prompt_n_times_one_behind_the_other(prompts: list[int], n: int):
    shape = Shape(several=True, n=n, stream=False, details=False)
    rows = shape.rows(prompts)
    assert rows == [prompts[i // n] for i in range(len(prompts) * n)]
    assert Shape(several=True, n=None, stream=False, details=False).rows(prompts) == prompts
