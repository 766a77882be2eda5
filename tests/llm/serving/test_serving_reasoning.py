"""Reasoning apart from the answer, however a text is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer.llm.reading.reasoning import ReasoningSplitter, thinks

TEXTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<think", ">", "</thi", "nk>", " ", "\n", "a", "b<"]),
    max_size=10,
).map("".join)


def split(pieces: list[str], *, inside: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(inside=inside)
    parts = [*map(splitter.push, pieces), splitter.finish()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, inside=st.booleans(), places=st.lists(st.integers(0, 60), max_size=6))
def test_where_reasoning_ends_does_not_go_by_the_cuts(
    text: str, inside: bool, places: list[int]
) -> None:
    edges = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    whole = split([text], inside=inside)
    assert split(pieces, inside=inside) == whole
    assert split(list(text), inside=inside) == whole


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("<think>\nHm.\n</think>\n\nYes. ", False, ("Hm.", "Yes. ")),
        ("Hm.\n</think>\n\nYes.", True, ("Hm.", "Yes.")),
        ("Hm. Never ends ", True, ("Hm. Never ends", "")),
        (" Plain <think>text</think>", False, ("", " Plain <think>text</think>")),
        ("<think></think>Yes", False, ("", "Yes")),
        ("<thin", False, ("", "<thin")),
        ("", True, ("", "")),
    ],
)
def test_what_is_reasoning_and_what_is_answer(
    text: str, inside: bool, expected: tuple[str, str]
) -> None:
    assert split(list(text), inside=inside) == expected


def test_a_template_without_such_a_part_has_no_reasoning() -> None:
    assert thinks("...</think>...") and not thinks("{{ messages }}") and not thinks(None)
