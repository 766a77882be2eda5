"""How far drafts go, and when they are left alone, by what they cost and save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_streamer.llm.drafts.drafted import Drafted
from layer_streamer.llm.drafts.drafting import Drafting
from layer_streamer.llm.drafts.pace import Pace
from layer_streamer.llm.drafts.worth import ADVANCE, LENGTHS, SHARE, Worth
from layer_streamer.llm.request import Request
from layer_streamer.llm.text.sampling import Sampler


def pace_of(plain: float, token: float = 0.0) -> Pace:
    """Passes that take so long, and so much more for each token beyond the first."""
    pace = Pace()
    for tokens in (1, 2, 4, 8, 16, 32, 64):
        pace.hear(tokens, plain + (tokens - 1) * token)
    return pace


@given(
    plain=st.floats(0.01, 2.0),
    step=st.floats(1e-4, 0.5),
    agreed=st.lists(st.floats(0, 1), min_size=1, max_size=300),
)
def test_a_source_never_costs_more_than_its_share(
    plain: float, step: float, agreed: Sequence[float]
) -> None:
    """Whatever comes of drafts: at most a share of the time, the advance and one draft more."""
    pace = pace_of(plain)
    worth, took, without, dearest = Worth(pace), 0.0, 0.0, 0.0
    for part in agreed:
        length = worth.length(16, 1) if worth.pays else 0
        right = round(part * length)
        took += plain + length * step
        without += plain * (1 + right)
        dearest = max(dearest, length * step)
        worth.wait(plain + length * step)
        if length:
            worth.hear(length, right, length * step, 1)
        assert took - without <= SHARE * took + (ADVANCE + 1e-6) * plain + dearest


@given(
    right=st.integers(0, 200), wrong=st.integers(1, 50), step=st.floats(0.0, 0.2),
    token=st.floats(0.0, 0.05), most=st.integers(1, 64),
)  # fmt: skip
def test_a_draft_is_as_long_as_promises_most(
    right: int, wrong: int, step: float, token: float, most: int
) -> None:
    pace, worth = pace_of(1.0, token), Worth(pace_of(1.0, token))
    for i in range(wrong):
        some = right // wrong + (i < right % wrong)
        worth.hear(some + 1, some, step * (some + 1), 1)
    likely = worth.likelihood

    def rate(length: int) -> float:
        gained = sum(likely**i for i in range(1, length + 1))
        return (1 + gained) / (pace.seconds(1 + length) + length * worth._token_seconds)

    tried = [n for n in (0, *LENGTHS, most) if n <= most]
    assert rate(worth.length(most, 1)) >= max(map(rate, tried)) - 1e-9


def test_free_drafts_go_as_far_as_there_is_room() -> None:
    worth = Worth(pace_of(0.2))
    for _ in range(20):
        worth.hear(64, 1, 0.0, 1)
    assert worth.length(64, 1) == 64 and worth.pays


def test_what_has_lost_is_asked_again_later() -> None:
    pace = pace_of(0.2)
    worth = Worth(pace)
    while worth.pays:
        worth.hear(8, 0, 0.1, 1)
    worth.wait(1.0)
    assert not worth.pays
    worth.wait(100.0)
    assert worth.pays


def test_a_pass_that_is_slow_once_counts_little() -> None:
    pace = Pace()
    pace.hear(1, 30.0)  # compiled something
    for _ in range(8):
        pace.hear(1, 0.2)
    assert pace.seconds(1) < 0.4
    pace.hear(1, 30.0)
    assert pace.seconds(1) < 4
    pace.hear(64, 0.3)
    assert pace.seconds(1) == pace.seconds(64) == 0.3


@given(st.dictionaries(st.integers(1, 100), st.floats(0.1, 9), max_size=6), st.integers(1, 100))
def test_a_pass_takes_what_the_next_smaller_took_and_no_more_than_a_larger_one(
    seen: dict[int, float], tokens: int
) -> None:
    pace = Pace()
    by_size = {}
    for count, seconds in seen.items():
        if count.bit_length() not in by_size:
            by_size[count.bit_length()] = seconds
            pace.hear(count, seconds)
    smaller = [size for size in by_size if size <= tokens.bit_length()]
    size = max(smaller) if smaller else min(by_size, default=0)
    larger = [seconds for other, seconds in by_size.items() if other >= size]
    assert pace.seconds(tokens) == min(larger, default=0.0)
    assert pace.knows(tokens) == (tokens.bit_length() in by_size)


@given(st.lists(st.integers(0, 9), max_size=30))
def test_depths_say_how_far_each_draft_was_right(agreed: list[int]) -> None:
    found = Drafted()
    for right in agreed:
        found.add(10, right)
    assert (found.drafts, found.tokens) == (len(agreed), 10 * len(agreed))
    assert found.agreed == sum(agreed)
    for depth, count in enumerate(found.depths, 1):
        assert count == sum(right >= depth for right in agreed) > 0


class Fixed:
    """Proposes the same, and counts how often it is asked."""

    weighs = False

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens, self.asked = tokens, 0

    def propose(self, key: int, ids: Sequence[int], most: int) -> Sequence[int]:
        self.asked += 1
        return self.tokens[:most]

    def accepted(self, key: int, proposed: int, agreed: int) -> None: ...
    def forget(self, key: int) -> None: ...


class SomeRow:
    """As far as drafting looks at one."""

    capacity, length = 1000, 4


def request_of() -> Request:
    row: Any = SomeRow()
    return Request(0, (1, 2, 3), 500, Sampler(), None, 600, new_ids=[4, 5], row=row)


@pytest.mark.parametrize("better", ["a", "b"])
def test_the_source_that_saves_most_is_asked_first(better: str) -> None:
    sources = {"a": Fixed([1] * 8), "b": Fixed([2] * 8)}
    drafting = Drafting(sources, pace_of(0.2))
    request = request_of()
    for _ in range(64):
        drafting.propose([request], 64)
        drafting.hear(9, 0.2)
        drafting.judge(request, 6 if request.source == better else 1)
    other = "b" if better == "a" else "a"
    assert sources[better].asked >= 48 and 1 <= sources[other].asked <= 12
    assert request.drafts[better].agreed > request.drafts[other].agreed


def test_the_next_source_is_asked_where_one_has_nothing() -> None:
    sources = {"a": Fixed([]), "b": Fixed([2] * 8)}
    drafting, request = Drafting(sources, pace_of(0.2)), request_of()
    drafting.propose([request], 64)
    assert request.source == "b" and sources["a"].asked == 1


def test_a_pass_without_a_draft_comes_before_the_first_one() -> None:
    drafting, request = Drafting({"a": Fixed([1])}, Pace()), request_of()
    drafting.propose([request], 64)
    assert not request.draft
    drafting.hear(1, 0.2)
    drafting.propose([request], 64)
    assert request.draft.tokens == (1,)
