"""What a lookup keeps, looks at and lets go of."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_llm_lookup import TEXTS, expected

from layer_streamer.llm.drafts.lookup import Lookup
from layer_streamer.llm.drafts.occurrences import MOST_LENGTH, MOST_LOOKED_AT, Occurrences

BYTES_A_TOKEN = 152
"""As the docstrings have it: 12, and 140 for a run that there is once."""


def tokens(count: int, seed: int = 0) -> list[int]:
    """No run of three of them is there twice, for all that matters."""
    draw = random.Random(seed)
    return [draw.randrange(2**31) for _ in range(count)]


def kept(texts: list[list[int]], bound: int) -> list[list[int]]:
    """Those of the texts that a pool of that many tokens still has."""
    pool: list[list[int]] = []
    for text in texts:
        end = text[max(0, len(text) - max(0, bound - 1)) :]
        if end:
            pool.append(end)
        while sum(len(text) + 1 for text in pool) > bound:
            del pool[0]
    return pool


@settings(max_examples=300)
@given(st.lists(TEXTS, max_size=8), st.integers(0, 90), TEXTS, st.integers(1, 20))
@example([[1, 2, 3, 4], [5, 6, 7, 8]], 10, [1, 2, 3], 4)
@example([[1, 2, 3, 4], [5, 6, 7, 8]], 9, [1, 2, 3], 4)
@example([[1, 1, 1, 1]], 5, [1, 1, 1], 4)
@example([[1, 1, 1, 1]], 4, [1, 1, 1], 4)
@example([[1, 1, 1, 1]], 1, [1, 1, 1], 4)
def test_a_pool_keeps_the_newest_texts_that_it_has_room_for(texts, bound, ids, most):
    lookup = Lookup(pool_tokens=bound)
    for key, text in enumerate(texts):
        lookup.propose(key, text, 1)
        lookup.forget(key)
    assert list(lookup.propose(99, ids, most)) == expected(ids, most, kept(texts, bound))


def held(do: Callable[[], object]) -> int:
    """Bytes that are held longer than the call that took them."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        do()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [1000, 8192, 32768, 43_700, 65_535])
def test_a_row_takes_the_memory_that_is_documented(count):
    lookup, ids = Lookup(), tokens(count)
    assert held(lambda: lookup.propose(0, ids, 64)) <= BYTES_A_TOKEN * count


def test_a_row_that_has_ended_leaves_nothing_behind():
    lookup = Lookup(pool_tokens=0)

    def live(key: int) -> None:
        lookup.propose(key, tokens(2000, key), 64)
        lookup.accepted(key, 4, 0)
        lookup.forget(key)

    live(0)
    assert held(lambda: [live(key) for key in range(1, 4)]) < 4096


def test_a_pool_takes_no_more_memory_however_many_texts_end():
    lookup, bound = Lookup(pool_tokens=2048), 2048

    def fill() -> None:
        for key in range(40):
            lookup.propose(key, tokens(500, key), 64)
            lookup.forget(key)

    assert held(fill) <= BYTES_A_TOKEN * 2 * bound


def test_a_text_cut_back_to_nothing_frees_its_runs():
    lookup = Lookup()

    def grow_and_cut() -> None:
        for seed in range(10):
            lookup.propose(0, tokens(1000, seed), 64)
            lookup.propose(0, [], 64)

    assert held(grow_and_cut) <= BYTES_A_TOKEN * 2 * 1000


def test_beyond_the_newest_places_of_the_last_tokens_none_is_looked_at():
    old, newer = [8, 1, 2, 3, 50], [9, 1, 2, 3, 60]
    for count, wanted in [(MOST_LOOKED_AT - 1, 50), (MOST_LOOKED_AT, 60)]:
        # The ending itself is one of those that are looked at.
        ids = old + newer * (count - 1) + [8, 1, 2, 3]
        assert list(Lookup().propose(0, ids, 1)) == [wanted]


@pytest.mark.parametrize(("common", "wanted"), [(MOST_LENGTH - 1, 50), (MOST_LENGTH, 60)])
def test_of_matches_beyond_the_greatest_length_the_newest_wins(common, wanted):
    shared = tokens(common)
    ids = [7, *shared, 50, 8, *shared, 60, 7, *shared]
    assert list(Lookup().propose(0, ids, 1)) == [wanted]


def test_tokens_that_are_alike_in_their_low_bits_are_told_apart():
    largest = 2**31 - 1
    ids = [largest, 0, 50, 2**30, 0, 60, 2**16, 0, 70, 0, 0, 80]
    for first, wanted in [(largest, [50]), (2**30, [60]), (2**16, [70]), (0, [80]), (2**29, [])]:
        assert list(Lookup().propose(0, [*ids, first, 0], 1)) == wanted


@pytest.mark.parametrize("wrong", [2**31, "a", 1.5, None])
def test_ids_that_are_none_change_nothing(wrong):
    lookup = Lookup()
    lookup.propose(0, [1, 2, 3, 4], 8)
    with pytest.raises((OverflowError, TypeError)):
        lookup.propose(0, [1, 2, 3, 4, 1, wrong], 8)
    assert list(lookup.propose(0, [1, 2, 3, 4, 1, 2, 3], 2)) == [4, 1]


class Interrupted(list):
    """Token ids, of which one is a Ctrl-C."""

    def __getitem__(self, place):
        raise KeyboardInterrupt


def test_a_row_that_an_interrupt_left_half_read_is_read_again():
    lookup = Lookup()
    lookup.propose(0, [1, 2, 3, 4], 8)
    with pytest.raises(KeyboardInterrupt):
        lookup.propose(0, Interrupted([1, 2, 3, 4, 1]), 8)
    assert list(lookup.propose(0, [1, 2, 3, 4, 1, 2, 3], 2)) == [4, 1]


def test_an_interrupt_while_a_text_enters_the_pool_leaves_a_pool_that_works(monkeypatch):
    lookup = Lookup()
    for key in range(2):
        lookup.propose(key, [1, 2, 3, 4], 8)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Occurrences, "extend", interrupt)
        lookup.forget(0)
    assert list(lookup.propose(2, [1, 2, 3], 2)) == []
    lookup.forget(1)
    assert list(lookup.propose(2, [1, 2, 3], 2)) == [4]


def test_what_is_returned_may_be_changed():
    lookup, ids = Lookup(), [1, 2, 3, 4, 1, 2, 3]
    proposed = list(lookup.propose(0, ids, 4))
    found = lookup.propose(0, ids, 4)
    assert isinstance(found, list)
    found.clear()
    assert list(lookup.propose(0, ids, 4)) == proposed


@settings(max_examples=200)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20), TEXTS), max_size=8))
def test_an_index_cut_and_dropped_finds_what_one_of_the_rest_alone_finds(steps):
    index, texts = Occurrences(3), list[list[int]]()
    for oldest, size, text in steps:
        index.extend([*text, -1])
        texts.append(text)
        if oldest:
            index.drop(1 + len(texts.pop(0)))
        else:
            texts[-1] = texts[-1][:size]
            index.cut(sum(len(text) + 1 for text in texts))
            index.extend([-1])
    fresh = Occurrences(3)
    for text in texts:
        fresh.extend([*text, -1])
    assert len(index) == len(fresh)
    for text in texts:
        lookalike = Occurrences(3)
        lookalike.extend(text)
        assert index.longest(lookalike.ending()) == fresh.longest(lookalike.ending())
