"""The scale of each group of weights: where to clip so that the error is least.

A large scale reaches the largest weights, a small one is finer for all others. The scales of a grid
are tried, each group keeps its best, and that is moved to where the error is least for the codes
that it gives. The error of a weight counts by the mean square of its input: what it adds to the
error of the output, if inputs are not correlated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .codes import code_range

GRIDS = {4: (0.38, 1.0, 32), 8: (0.90, 1.0, 11)}
"""By bits: the smallest and the largest ratio of the scale that is tried to the one that clips
nothing, and how many are tried."""
REFINEMENTS = 2
"""How often the best scale is moved and the codes are made anew."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """What a matrix is rounded to."""

    bits: int
    dtype: torch.dtype
    """Of the scales as they are stored: what is chosen here is what is written."""

    def codes(
        self, groups: torch.Tensor, scales: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The nearest codes, as floats: weights (..., weights of a group), scales (...)."""
        low, high = code_range(self.bits)
        return torch.div(groups, scales[..., None], out=out).round_().clamp_(low, high)

    def stored(self, scales: torch.Tensor) -> torch.Tensor:
        """What is left of scales when they are stored; what is too small to be stored becomes 1."""
        limits = torch.finfo(self.dtype)
        kept = scales.clamp(max=limits.max).to(self.dtype).float()
        return torch.where(kept >= limits.tiny, kept, torch.ones_like(kept))


def search_scales(
    groups: torch.Tensor, importance: torch.Tensor | None, rounding: Rounding
) -> torch.Tensor:
    """The best scale of each group of weights, float32 (...).

    ``groups`` (..., weights of a group) float32, ``importance`` likewise or what expands to it: the
    mean square of each weight's input; None: all weights count alike.
    """
    low, high = code_range(rounding.bits)
    reach = groups.abs().amax(-1)
    largest = reach / high
    # As large as this if the largest weight is the one negative number that has no positive.
    best = _Best(groups, importance, rounding, rounding.stored(reach / -low))
    first, last, count = GRIDS[rounding.bits]
    for ratio in torch.linspace(first, last, count, dtype=torch.float32, device="cpu").tolist():
        best.see(rounding.stored(largest * ratio))
    for _ in range(REFINEMENTS):
        best.see(rounding.stored(best.least_squares()))
    return best.scales


class _Best:
    """The best scale of each group so far."""

    def __init__(
        self,
        groups: torch.Tensor,
        importance: torch.Tensor | None,
        rounding: Rounding,
        scales: torch.Tensor,
    ) -> None:
        self._groups, self._importance, self._rounding = groups, importance, rounding
        self._space = torch.empty_like(groups)
        self.scales = scales
        self._least = self._error(scales)

    def see(self, scales: torch.Tensor) -> None:
        """Take those of these scales whose errors are smaller."""
        error = self._error(scales)
        better = error < self._least
        self.scales = torch.where(better, scales, self.scales)
        self._least = torch.where(better, error, self._least)

    def least_squares(self) -> torch.Tensor:
        """The scale with which the best codes come closest to the weights; 0 if all are 0."""
        codes = self._rounding.codes(self._groups, self.scales, self._space)
        weighted = codes if self._importance is None else codes * self._importance
        above, below = (weighted * self._groups).sum(-1), (weighted * codes).sum(-1)
        return torch.where(below > 0, above / below, torch.zeros_like(above))

    def _error(self, scales: torch.Tensor) -> torch.Tensor:
        error = self._rounding.codes(self._groups, scales, self._space)
        error.mul_(scales[..., None]).sub_(self._groups).square_()
        return (error if self._importance is None else error.mul_(self._importance)).sum(-1)
