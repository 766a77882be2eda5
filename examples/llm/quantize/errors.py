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

    @property
    def relative(self) -> float:
        """Root of the mean squared error over that of the mean squared weight."""
        return math.sqrt(self.squares / self.signal) if self.signal else 0.0

    def as_list(self) -> list[float]:
        return [self.weights, self.squares, self.signal, self.largest]

    @classmethod
    def of_list(cls, values: Sequence[float]) -> Errors:
        weights, squares, signal, largest = values
        return cls(int(weights), float(squares), float(signal), float(largest))


def _sum_of_squares(values: torch.Tensor) -> float:
    """In float64: squares of what float32 holds may be beyond it."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def error_table(by_module: Mapping[str, Errors], groups: Mapping[str, int]) -> str:
    """A line for each kind of matrix, and one for all."""
    lines = [f"{'matrix':<18} {'weights':>14} {'group':>5} {'relative RMS':>12} {'largest':>9}"]
    total = Errors()
    for module, errors in by_module.items():
        total.add(errors)
        lines.append(_line(module, errors, str(groups[module])))
    return "\n".join([*lines, _line("all", total, "")])


def _line(name: str, errors: Errors, group: str) -> str:
    return (
        f"{name:<18} {errors.weights:>14,} {group:>5} {errors.relative:>12.5f} "
        f"{errors.largest:>9.2g}"
    )
