"""What trials have shown of candidates that were not tried: lower bounds on their seconds. Pure.

The logarithm of (measured / predicted) is taken to be a sum of one effect for each value that a
candidate has, and one common to all. Least squares with effects that are small by nature (SIZES)
give an estimate for each candidate, and how far from it the truth can be.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SIZES = defaultdict[str, float](
    lambda: 0.1,
    batch_gpu=0.05, batch_cpu_pinned=0.05, batch_cpu=0.05, read_mode=0.2, read_threads=0.15,
    host_layers=0.3,
)  # fmt: skip
"""By setting, how far one of its values may well put a prediction wrong (as a logarithm)."""
COMMON = 2.0
"""The same of what is common to all: predictions may be wrong by a factor all together."""
REACH = 2.5
"""Bounds hold if the root of the sum of (effect / size) ** 2 is at most this."""
NOISE = 0.005
"""How well a measurement repeats."""
ROUNDS = 20
"""Of coordinate descent."""

Features = Sequence[Mapping[str, Any]]
"""By candidate, the value of each setting; a setting that does not matter to it is not there."""


class LowerBounds:
    """Lower bounds of all candidates' logarithms of (seconds / predicted seconds).

    ``features`` by candidate; ``measured``: by candidate's index, that logarithm; ``exceeded``: by
    index, a logarithm that the candidate's was seen to be above.
    """

    def __init__(
        self, features: Features, measured: Mapping[int, float], exceeded: Mapping[int, float]
    ) -> None:
        self._matrix, sizes = _encode(features)
        tried = sorted(measured)
        rows = self._matrix[tried]
        precision = np.diag(1 / sizes**2) + rows.T @ rows / NOISE**2
        self._covariance: Array = np.asarray(np.linalg.inv(precision), dtype=np.float64)
        values = np.array([measured[index] for index in tried], dtype=np.float64)
        self._weights: Array = self._covariance @ (rows.T @ values) / NOISE**2
        self._exceeded = dict(exceeded)

    def estimates(self) -> Array:
        """By candidate, what is most likely."""
        found: Array = self._matrix @ self._weights
        return found

    def lower(self) -> Array:
        """By candidate, what it cannot be below."""
        estimates = self.estimates()
        bounds: Array = estimates - REACH * self._deviation(self._matrix)
        if not self._exceeded:
            return bounds
        indices = list(self._exceeded)
        above = np.array(list(self._exceeded.values())) - estimates[indices]
        # What holds with one of them at a time, and with all of them, weighted.
        for shares in (np.eye(len(indices))[:, None, :], self._shares(indices)[None, :, :]):
            for of_all in shares:
                apart = self._matrix - of_all @ self._matrix[indices]
                from_them = estimates + of_all @ above - REACH * self._deviation(apart)
                bounds = np.maximum(bounds, from_them)
        return bounds

    def _shares(self, indices: list[int]) -> Array:
        """By candidate, how much of each of ``indices`` it is: weights >= 0.

        Those with which the rest of it is known best, by coordinate descent; bounds hold with any.
        """
        theirs = self._matrix[indices] @ self._covariance
        among = theirs @ self._matrix[indices].T
        wanted = self._matrix @ theirs.T
        shares = np.zeros_like(wanted)
        for _ in range(ROUNDS):
            for k in range(len(indices)):
                step = (wanted[:, k] - shares @ among[:, k]) / max(among[k, k], 1e-12)
                shares[:, k] = np.maximum(shares[:, k] + step, 0.0)
        return shares

    def _deviation(self, rows: Array) -> Array:
        squares = np.einsum("ij,jk,ik->i", rows, self._covariance, rows)
        found: Array = np.sqrt(np.maximum(squares, 0.0))
        return found


def _encode(features: Features) -> tuple[Array, Array]:
    """One column for each value of each setting, and one for all; the size of each effect."""
    columns: dict[tuple[str, str], int] = {}
    for of_one in features:
        for name, value in of_one.items():
            columns.setdefault((name, repr(value)), len(columns) + 1)
    matrix = np.zeros((len(features), len(columns) + 1))
    matrix[:, 0] = 1.0
    for row, of_one in enumerate(features):
        for name, value in of_one.items():
            matrix[row, columns[name, repr(value)]] = 1.0
    sizes = np.array([COMMON, *(SIZES[name] for name, _ in columns)])
    return matrix, sizes


def to_log(seconds: float, predicted: float) -> float:
    """The logarithm of (seconds / predicted)."""
    return math.log(max(seconds, 1e-12) / max(predicted, 1e-12))
