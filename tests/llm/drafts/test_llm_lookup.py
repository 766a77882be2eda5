"""Drafts from the text before, against a search that looks at every place of every text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from layer_streamer.llm.drafts.drafter import Drafter
from layer_streamer.llm.drafts.lookup import FIRST_PAUSE, FRUITLESS, LEAST, LONGEST_PAUSE, Lookup

TEXTS = st.integers(1, 5).flatmap(lambda high: st.lists(st.integers(0, high), max_size=60))
"""Of few different tokens: full of matches."""
PERIODIC = st.tuples(
    st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(2, 9),
    st.lists(st.integers(0, 9), max_size=4),
).map(lambda parts: parts[2] + parts[0] * parts[1])  # fmt: skip


def ended(texts: Sequence[Sequence[int]], least: int = LEAST) -> Lookup:
    """A lookup that has seen these texts to their ends."""
    lookup = Lookup(least)
    for key, text in enumerate(texts):
        lookup.propose(key, text, 1)
        lookup.forget(key)
    return lookup


def common_end(a: Sequence[int], b: Sequence[int]) -> int:
    """How many of the last tokens are equal."""
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return count


def runs_after(text: Sequence[int], ids: Sequence[int], length: int, most: int) -> list[list[int]]:
    """What follows each place of a text behind as many of the last tokens of ids, the newest first;
    the text of the row itself, which is ``ids``, goes on through its own end."""
    found = []
    for at in range(len(text) - 1, length - 1, -1):
        if common_end(text[:at], ids) >= length:
            run = list(text[at : at + most])
            period = len(run)
            while text is ids and len(run) < most:
                run.append(run[-period])
            found.append(run)
    return found


def expected(
    ids: Sequence[int], most: int, pool: Sequence[Sequence[int]] = (), least: int = LEAST
) -> list[int]:
    """The proposal, by the rules of :class:`Lookup` alone."""
    places = [text[:at] for text in [ids, *pool] for at in range(len(text))]
    length = max((common_end(before, ids) for before in places), default=0)
    if length < least:
        return []
    texts = [ids, *reversed(pool)]
    return next(run for text in texts for run in runs_after(text, ids, length, most))


@settings(max_examples=400)
@given(TEXTS | PERIODIC, st.integers(1, 20), st.integers(2, 5))
def test_a_row_alone_gets_what_a_search_of_all_places_finds(ids, most, least):
    assert list(Lookup(least).propose(0, ids, most)) == expected(ids, most, least=least)


@settings(max_examples=300)
@given(st.lists(TEXTS, max_size=4), TEXTS, st.integers(1, 20), st.integers(2, 4))
def test_texts_that_have_ended_are_searched_as_well(pool, ids, most, least):
    lookup = ended(pool, least)
    assert list(lookup.propose(99, ids, most)) == expected(ids, most, pool, least)


@given(st.lists(TEXTS, max_size=4), TEXTS, st.integers(1, 20))
def test_what_is_proposed_followed_an_equal_ending_somewhere(pool, ids, most):
    proposed = list(ended(pool).propose(99, ids, most))
    followed = [
        text[at : at + len(proposed)]
        for text, last in [*((text, len(text)) for text in pool), (ids + proposed, len(ids))]
        for at in range(LEAST, last)
        if text[at - LEAST : at] == ids[-LEAST:]
    ]
    assert not proposed or proposed in followed
    assert len(proposed) <= most


@given(st.lists(st.integers(0, 2**31 - 1), max_size=40, unique=True), st.integers(1, 20))
def test_ids_without_repetition_propose_nothing(ids, most):
    assert list(Lookup().propose(0, ids, most)) == []


@given(
    st.lists(st.integers(0, 99), min_size=1, max_size=40, unique=True),
    st.integers(3, 100),
    st.integers(1, 100),
)
def test_a_text_that_repeats_itself_is_proposed_in_full(period, more, most):
    endless = period * (2 + (more + most) // len(period))
    known = len(period) + more
    assert list(Lookup().propose(0, endless[:known], most)) == endless[known : known + most]


def test_a_longer_match_wins_over_newer_ones():
    ids = [9, 1, 2, 3, 50, *[8, 1, 2, 3, 60] * 3, 9, 1, 2, 3]
    assert list(Lookup().propose(0, ids, 1)) == [50]


def test_of_matches_as_long_the_newest_is_taken():
    ids = [1, 2, 3, 50, 4, 1, 2, 3, 50, 5, 1, 2, 3, 60, 6, 1, 2, 3]
    assert list(Lookup().propose(0, ids, 2)) == [60, 6]


def test_a_longer_match_in_the_pool_wins_and_one_as_long_does_not():
    lookup = ended([[8, 1, 2, 3, 70], [1, 2, 3, 80]])
    assert list(lookup.propose(7, [1, 2, 3, 60, 9, 1, 2, 3], 1)) == [60]
    assert list(lookup.propose(8, [1, 2, 3, 60, 8, 1, 2, 3], 2)) == [70]


def test_the_end_of_a_text_and_the_beginning_of_the_next_are_no_match():
    lookup = ended([[4, 5, 6, 1, 2], [3, 7, 7, 8]])
    assert list(lookup.propose(9, [1, 2, 3], 4)) == []
    assert list(lookup.propose(8, [4, 5, 6], 4)) == [1, 2]


@settings(max_examples=300)
@given(TEXTS | PERIODIC, st.lists(st.tuples(st.integers(0, 70), st.lists(st.integers(0, 3)))))
def test_ids_that_grow_and_are_cut_back_get_the_proposals_of_a_fresh_index(ids, steps):
    lookup, ids = Lookup(), list(ids)
    for size, more in [(len(ids), list[int]()), *steps]:
        ids = ids[:size]
        assert list(lookup.propose(5, ids, 12)) == list(Lookup().propose(0, ids, 12))
        ids += more
        assert list(lookup.propose(5, ids, 12)) == list(Lookup().propose(0, ids, 12))


@given(TEXTS, TEXTS, st.integers(0, 60))
def test_a_text_cut_back_and_grown_again_unseen_is_read_again(ids, more, size):
    lookup = Lookup()
    lookup.propose(5, ids, 12)
    changed = ids[:size] + more
    if len(changed) < len(ids) or not ids or changed[len(ids) - 1] != ids[-1]:
        assert list(lookup.propose(5, changed, 12)) == list(Lookup().propose(0, changed, 12))


@given(st.lists(TEXTS, min_size=2, max_size=4))
def test_rows_that_run_see_nothing_of_each_other(texts):
    lookup = Lookup()
    together = [list(lookup.propose(key, text, 12)) for key, text in enumerate(texts)]
    assert together == [list(Lookup().propose(0, text, 12)) for text in texts]


@given(TEXTS | PERIODIC, st.integers(1, 8), st.integers(1, 30))
def test_where_transformers_finds_a_match_no_longer_than_its_limit_both_follow_one_of_that_length(
    ids, limit, most
):
    theirs = PromptLookupCandidateGenerator(
        num_output_tokens=most, max_matching_ngram_size=limit, max_length=10_000
    )
    found, _ = theirs.get_candidates(torch.tensor([ids or [0]]))
    candidate = found[0, len(ids) :].tolist() if ids else []
    ours = list(Lookup(2).propose(0, ids, most))
    longest = max((common_end(ids[:at], ids) for at in range(len(ids))), default=0)
    length = min(longest, limit)
    if candidate and ours:
        runs = runs_after(ids, ids, length, most)
        assert candidate in [run[: len(candidate)] for run in runs]
        assert ours[:1] in [run[:1] for run in runs]
    assert bool(candidate) == bool(length)
    assert bool(ours) == (longest >= 2)


def hear(lookup: Drafter, ids: Sequence[int], agreed: int) -> bool:
    """True if something was proposed, of which the model then agreed with so much."""
    proposed = lookup.propose(0, ids, 4)
    lookup.accepted(0, len(proposed), agreed if proposed else 0)
    return bool(proposed)


def test_where_it_never_pays_it_is_left_alone_for_a_growing_number_of_tokens():
    lookup, at = Lookup(), []
    for size in range(8, 400):
        if hear(lookup, [7] * size, 0):
            at.append(size)
    pauses = [b - a for a, b in pairwise(at)]
    often = [1] * (FRUITLESS - 1)
    assert pauses == [*often, FIRST_PAUSE, 8, 16, *[LONGEST_PAUSE] * (len(at) - FRUITLESS - 3)]
    for size in range(8, 400):
        assert sum(place < size for place in at) <= 10 + (size - 8) / LONGEST_PAUSE


@given(st.integers(0, 2 * FRUITLESS))
def test_one_token_accepted_ends_all_pauses(fruitless):
    lookup, size = Lookup(), 8
    for _ in range(fruitless):
        while not hear(lookup, [7] * size, 0):
            size += 1
    while not hear(lookup, [7] * size, 1):
        size += 1
    assert all(hear(lookup, [7] * (size + step), 0) for step in range(FRUITLESS))
    assert not hear(lookup, [7] * (size + FRUITLESS), 0)


def test_a_text_cut_back_ends_the_pause():
    lookup = Lookup()
    for size in range(8, 8 + FRUITLESS):
        assert hear(lookup, [7] * size, 0)
    assert not hear(lookup, [7] * (8 + FRUITLESS), 0)
    assert hear(lookup, [7] * (7 + FRUITLESS), 0)


def test_what_is_said_in_a_pause_is_known_after_it():
    lookup = Lookup()
    for size in range(8, 8 + FRUITLESS):
        assert hear(lookup, [7] * size, 0)
    ids = [7] * (7 + FRUITLESS) + list(range(20, 28))
    assert not hear(lookup, ids[:-1], 0)
    assert list(lookup.propose(0, [*ids, 20, 21, 22], 2)) == [23, 24]


def test_proposals_that_were_empty_or_not_looked_at_cause_no_pause():
    lookup = Lookup()
    for _ in range(3 * FRUITLESS):
        lookup.accepted(0, 0, 0)
        assert list(lookup.propose(0, [1, 2, 3, 1, 2, 3], 1)) == [1]
        lookup.accepted(0, 0, 0)


def test_a_key_that_has_ended_begins_anew():
    lookup = Lookup(pool_tokens=0)
    for size in range(8, 8 + FRUITLESS):
        hear(lookup, [7] * size, 0)
    lookup.forget(0)
    assert list(lookup.propose(0, [1, 2, 3], 4)) == []
    assert list(lookup.propose(0, [1, 2, 3, 1, 2, 3], 1)) == [1]


def test_keys_that_are_not_known_are_no_error():
    lookup = Lookup()
    lookup.forget(1)
    lookup.accepted(1, 4, 0)
    assert list(lookup.propose(1, [], 4)) == [] == list(lookup.propose(1, [5, 5, 5, 5], 0))


@pytest.mark.parametrize("options", [{"least": 1}, {"pool_tokens": -1}])
def test_what_makes_no_sense_is_refused(options):
    with pytest.raises(ValueError, match="at least 2, and at least 0"):
        Lookup(**options)
