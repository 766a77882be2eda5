"""What quantizing has done to weights, summed up and shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Errors:
    """The errors of some weights, and what they are measured by."""

    weights: int = 0
    squares: float = 0.0
    """Of errors."""
    signal: float = 0.0
    """Squares of the weights themselves."""
    largest: float = 0.0
    unseen: int = 0
    """Matrices that no token of the calibration text has passed."""

    def see(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Take in weights and what they should be, both float32."""
        error = found - expected
        self.weights += error.numel()
        self.squares += _sum_of_squares(error)
        self.signal += _sum_of_squares(expected)
        self.largest = max(self.largest, float(error.abs().max()))

    def add(self, other: Errors) -> None:
        self.weights += other.weights
        self.squares += other.squares
        self.signal += other.signal
        self.largest = max(self.largest, other.largest)
        self.unseen += other.unseen

    @property
    def relative(self) -> float:
        """Root of the mean squared error over that of the mean squared weight."""
        return math.sqrt(self.squares / self.signal) if self.signal else 0.0

    def as_list(self) -> list[float]:
        return [self.weights, self.squares, self.signal, self.largest, self.unseen]

    @classmethod
    def of_list(cls, values: Sequence[float]) -> Errors:
        """Of ``as_list``, which has had no more than four values."""
        weights, squares, signal, largest, *unseen = values
        return cls(int(weights), float(squares), float(signal), float(largest), int(sum(unseen)))


def _sum_of_squares(values: torch.Tensor) -> float:
    """In float64: squares of what float32 holds may be beyond it."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def error_table(by_kind: Mapping[str, Errors], groups: Mapping[str, int]) -> str:
    """A line for each kind of matrix, and one for all."""
    wide = max(map(len, by_kind), default=0)
    title = f"{'weights':>14} {'group':>5} {'relative RMS':>12} {'largest':>9}"
    lines, total = [f"{'matrix':<{wide}} {title}"], Errors()
    for kind, errors in by_kind.items():
        total.add(errors)
        lines.append(f"{kind:<{wide}} {_numbers(errors, str(groups[kind]))}")
    return "\n".join([*lines, f"{'all':<{wide}} {_numbers(total, '')}"])


def _numbers(errors: Errors, group: str) -> str:
    return f"{errors.weights:>14,} {group:>5} {errors.relative:>12.5f} {errors.largest:>9.2g}"
