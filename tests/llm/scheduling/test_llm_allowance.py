"""How many tokens of prompts go beside rows that decode, by how long passes are said to take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_streamer.llm.kv.blocks import BLOCK
from layer_streamer.llm.scheduling.allowance import AGAIN, SHARE, Allowance

ROWS = 8
Cost = Callable[[int, int], float]
"""Seconds of a pass with so many tokens of a prompt, behind so many."""


def linked(free: int) -> Cost:
    """Weights stream as long as ``free`` tokens take to compute."""
    return lambda count, behind: max(1.0, (ROWS + count) / free)


def looking_back(free: int, far: int) -> Cost:
    """And each token looks back, which takes as long as all else of it ``far`` tokens behind."""
    return lambda count, behind: max(
        1.0, (ROWS + count) / free + count * (behind + count / 2) / far / free
    )


def take(allowance: Allowance, cost: Cost, prompt: int) -> list[tuple[int, float]]:
    """A prompt beside rows that decode: the parts that it is taken in, and each pass's seconds."""
    parts, behind = list[tuple[int, float]](), 0
    while behind < prompt:
        count = min(allowance.tokens(ROWS, behind), prompt - behind)
        seconds = cost(count, behind)
        allowance.hear(ROWS, count, behind, seconds)
        if count:
            parts.append((count, seconds))
        behind += count
    return parts


def too_long(parts: list[tuple[int, float]]) -> list[float]:
    return [seconds for _, seconds in parts if seconds > 1 + SHARE]


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 9000), st.integers(0, 1 << 17),
                          st.floats(0, 1e6)), max_size=80), st.integers(1, 99),
       st.integers(0, 1 << 17))  # fmt: skip
def test_it_is_whole_blocks_whatever_was_heard_and_none_only_to_measure(
    heard: list[tuple[int, int, int, float]], rows: int, context: int
) -> None:
    allowance = Allowance()
    for decoding, prompts, behind, seconds in heard:
        allowance.hear(decoding, prompts, behind, seconds)
    count = allowance.tokens(rows, context)
    if count == 0:
        allowance.hear(rows, 0, 0, 1.0)
        count = allowance.tokens(rows, context)
    assert count >= BLOCK and count % BLOCK == 0


@pytest.mark.parametrize("free", [700, 2000, 7000, 30_000])
def test_what_a_link_hides_is_found_and_hardly_exceeded(free: int) -> None:
    allowance = Allowance()
    first, again = (take(allowance, linked(free), 1 << 17) for _ in range(2))
    assert len(too_long(first)) <= 2 + len(first) // AGAIN
    assert len(too_long(again)) <= 1 + len(again) // AGAIN
    largest = max(count for count, _ in again)
    assert largest >= free * 0.9 // BLOCK * BLOCK, "it gives less than is free"


def test_what_is_too_much_even_for_two_blocks_is_tried_once_in_a_while() -> None:
    allowance = Allowance()
    parts = take(allowance, linked(300), 3 * AGAIN * BLOCK)
    assert len(too_long(parts)) <= 4
    assert len(parts) > 2 * AGAIN


def test_a_prompt_that_looks_far_back_gets_less_and_the_next_begins_with_more() -> None:
    allowance, cost = Allowance(), looking_back(4000, 16_000)
    first, again = (take(allowance, cost, 1 << 16) for _ in range(2))
    assert len(too_long(again)) <= len(again) // 10
    assert again[0][0] > first[0][0] and max(again)[0] > 2 * again[-2][0]


def test_short_prompts_and_the_ends_of_long_ones_are_no_reason_to_give_less() -> None:
    allowance, cost = Allowance(), linked(7000)
    take(allowance, cost, 1 << 16)
    known = allowance.tokens(ROWS, 0)
    for _ in range(20):
        take(allowance, cost, 30)
    assert allowance.tokens(ROWS, 0) == known > BLOCK


def test_a_pass_that_was_slow_for_another_reason_is_forgotten_soon() -> None:
    allowance, cost = Allowance(), linked(7000)
    take(allowance, cost, 1 << 17)
    deep = 1 << 16
    known = allowance.tokens(ROWS, deep)
    allowance.hear(ROWS, known, deep, 9.0)
    assert allowance.tokens(ROWS, deep) < known / 8
    for _ in range(20):
        count = allowance.tokens(ROWS, deep)
        allowance.hear(ROWS, count, deep, cost(count, deep))
    assert allowance.tokens(ROWS, deep) >= known * 0.8


def test_passes_without_rows_that_decode_tell_nothing() -> None:
    allowance = Allowance()
    allowance.hear(0, 9000, 0, 1.0)
    assert allowance.tokens(ROWS, 0) == 0
