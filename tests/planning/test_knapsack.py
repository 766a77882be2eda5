"""The knapsack with few kinds, against every combination there is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer.planning.knapsack import Stock, bound_gain, fill, sum_gain

STOCKS = st.lists(
    st.builds(Stock, st.integers(0, 30), st.integers(0, 30), st.integers(0, 5)),
    min_size=1,
    max_size=4,
)


def sum_nbytes(stocks: Sequence[Stock], counts: Sequence[int]) -> int:
    return sum(count * stock.nbytes for count, stock in zip(counts, stocks, strict=True))


def best_gain(stocks: Sequence[Stock], capacity: int) -> int:
    combinations = product(*(range(stock.count + 1) for stock in stocks))
    return max(sum_gain(stocks, c) for c in combinations if sum_nbytes(stocks, c) <= capacity)


@settings(deadline=None)
@given(STOCKS, st.integers(0, 300))
def test_with_few_kinds_no_combination_gains_more(stocks: list[Stock], capacity: int) -> None:
    counts, _ = fill(stocks, capacity, max_tried=10_000)
    assert sum_nbytes(stocks, counts) <= capacity
    assert sum_gain(stocks, counts) == best_gain(stocks, capacity)


@settings(deadline=None)
@given(STOCKS, st.integers(0, 300))
def test_what_can_be_gained_is_bounded(stocks: list[Stock], capacity: int) -> None:
    assert bound_gain(stocks, capacity) >= best_gain(stocks, capacity)


@settings(deadline=None)
@given(STOCKS, st.integers(0, 300))
def test_with_no_combinations_left_to_try_nothing_more_fits(
    stocks: list[Stock], capacity: int
) -> None:
    counts, tried = fill(stocks, capacity, max_tried=0)
    left = capacity - sum_nbytes(stocks, counts)
    assert tried == 0
    assert left >= 0
    for count, stock in zip(counts, stocks, strict=True):
        assert 0 <= count <= stock.count
        assert count == stock.count or stock.nbytes > left


def test_what_takes_no_bytes_counts_towards_the_bound() -> None:
    assert bound_gain([Stock(0, 1, 1), Stock(5, 50, 1)], 0) == 1


def test_with_no_combinations_left_to_try_the_better_of_two_orders_is_taken() -> None:
    assert fill([Stock(10, 10, 1), Stock(5, 9, 2)], 10, max_tried=0)[0] == [0, 2]
    assert fill([Stock(10, 10, 1), Stock(1, 2, 1)], 10, max_tried=0)[0] == [1, 0]


def test_the_combinations_tried_are_counted_and_no_more_than_allowed() -> None:
    stocks = [Stock(7, 7, 9), Stock(5, 5, 30), Stock(3, 3, 4)]
    assert fill(stocks, 100, max_tried=50)[1] == 10 * 5
    assert fill(stocks, 100, max_tried=49)[1] == 0


def test_bytes_beyond_what_a_float_holds_are_counted_exactly() -> None:
    large = 2**60 + 1
    stocks = [Stock(large, large, 2), Stock(large - 1, large - 1, 2)]
    assert fill(stocks, 2 * large - 1, max_tried=100)[0] == [1, 1]
    assert bound_gain(stocks, 2 * large - 1) >= 2 * large - 1
