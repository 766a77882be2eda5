"""How many steps of each kind to hold in so many bytes: the knapsack problem with few kinds. Pure.

A *kind* is a set of equal steps. With few kinds every combination of counts is tried, which is
exact; with many, the bytes are filled greedily.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf, prod
from operator import attrgetter, mul


@dataclass(frozen=True, slots=True)
class Stock:
    """``count`` equal steps, each of ``nbytes`` bytes and worth ``gain``."""

    nbytes: int
    gain: int
    count: int

    @property
    def density(self) -> float:
        """Gain for each byte, infinite for none; else in integers: floats would put close ones out
        of order."""
        return (self.gain << 128) // self.nbytes if self.nbytes else inf


def bound_gain(stocks: Sequence[Stock], capacity: int) -> int:
    """What cannot be exceeded in ``capacity`` bytes: the gain if steps could be cut."""
    gain = 0
    for stock in sorted(stocks, key=lambda stock: stock.density, reverse=True):
        if stock.count * stock.nbytes > capacity:
            return gain + capacity * stock.gain // stock.nbytes
        gain += stock.count * stock.gain
        capacity -= stock.count * stock.nbytes
    return gain


def sum_gain(stocks: Sequence[Stock], counts: Sequence[int]) -> int:
    """What ``counts`` of each stock are worth."""
    return sum(count * stock.gain for count, stock in zip(counts, stocks, strict=True))


def fill(stocks: Sequence[Stock], capacity: int, max_tried: int) -> tuple[list[int], int]:
    """How many of each stock to hold in ``capacity`` bytes, and how many combinations were tried.

    The gain is the largest possible, unless more than ``max_tried`` combinations would have to be
    tried; then it is what fits, the largest first or the most gainful for its bytes first. In any
    case nothing more fits.
    """
    if sum(stock.count * stock.nbytes for stock in stocks) <= capacity:
        return [stock.count for stock in stocks], 0
    # The stock with the most steps need not be enumerated: as many are taken as fit.
    last = max(range(len(stocks)), key=lambda i: stocks[i].count)
    num_combinations = prod(stock.count + 1 for stock in stocks) // (stocks[last].count + 1)
    if num_combinations <= max_tried:
        return _fill_exactly(stocks, last, capacity), num_combinations
    orders = attrgetter("gain"), attrgetter("density")
    filled = [_fill_greedily(stocks, capacity, order) for order in orders]
    return max(filled, key=lambda counts: sum_gain(stocks, counts)), 0


def _fill_exactly(stocks: Sequence[Stock], last: int, capacity: int) -> list[int]:
    others = [stock for i, stock in enumerate(stocks) if i != last]
    weights, gains = [stock.nbytes for stock in others], [stock.gain for stock in others]
    best, best_counts, best_fitting = -1, (0,) * len(others), 0
    for counts in product(*(range(stock.count + 1) for stock in others)):
        left = capacity - sum(map(mul, counts, weights))
        if left >= 0:
            fitting = _fitting(stocks[last], left)
            gain = sum(map(mul, counts, gains)) + fitting * stocks[last].gain
            if gain > best:
                best, best_counts, best_fitting = gain, counts, fitting
    return [*best_counts[:last], best_fitting, *best_counts[last:]]


def _fill_greedily(
    stocks: Sequence[Stock], capacity: int, order: Callable[[Stock], int]
) -> list[int]:
    counts = [0] * len(stocks)
    for i in sorted(range(len(stocks)), key=lambda i: order(stocks[i]), reverse=True):
        counts[i] = _fitting(stocks[i], capacity)
        capacity -= counts[i] * stocks[i].nbytes
    return counts


def _fitting(stock: Stock, capacity: int) -> int:
    return min(stock.count, capacity // stock.nbytes) if stock.nbytes else stock.count
