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

GRIDS = {4: (0.40, 1.08, 35), 8: (0.90, 1.01, 12)}
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

    def codes(self, groups: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The nearest codes, as floats: weights (..., weights of a group), scales (...)."""
        low, high = code_range(self.bits)
        return torch.round(groups / scales[..., None]).clamp_(low, high)

    def stored(self, scales: torch.Tensor) -> torch.Tensor:
        """What is left of scales when they are stored; 0 and what overflows become 1."""
        kept = scales.to(self.dtype).float()
        usable = kept.isfinite() & (kept.abs() >= torch.finfo(self.dtype).tiny)
        return torch.where(usable, kept, torch.ones_like(kept))


def search_scales(
    groups: torch.Tensor, importance: torch.Tensor | None, rounding: Rounding
) -> torch.Tensor:
    """The best scale of each group of weights, float32 (...).

    ``groups`` (..., weights of a group) float32, ``importance`` likewise or what expands to it: the
    mean square of each weight's input; None: all weights count alike.
    """
    low, high = code_range(rounding.bits)
    largest = groups.abs().amax(-1) / ((high - low) / 2)
    best = rounding.stored(largest)
    least = torch.full_like(best, torch.inf)
    first, last, count = GRIDS[rounding.bits]
    for ratio in torch.linspace(first, last, count).tolist():
        _keep_better(groups, importance, rounding, rounding.stored(largest * ratio), (best, least))
    for _ in range(REFINEMENTS):
        moved = _least_squares(groups, rounding.codes(groups, best), importance)
        _keep_better(groups, importance, rounding, rounding.stored(moved), (best, least))
    return best


def _keep_better(
    groups: torch.Tensor,
    importance: torch.Tensor | None,
    rounding: Rounding,
    scales: torch.Tensor,
    found: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Put scales in place of the best found, and their errors, where these are smaller."""
    best, least = found
    error = rounding.codes(groups, scales).mul_(scales[..., None]).sub_(groups).square_()
    if importance is not None:
        error.mul_(importance)
    total = error.sum(-1)
    better = total < least
    torch.where(better, scales, best, out=best)
    torch.where(better, total, least, out=least)


def _least_squares(
    groups: torch.Tensor, codes: torch.Tensor, importance: torch.Tensor | None
) -> torch.Tensor:
    """The scale with which these codes come closest to the weights; 0 if all codes are 0."""
    weighted = codes if importance is None else codes * importance
    above, below = (weighted * groups).sum(-1), (weighted * codes).sum(-1)
    return torch.where(below > 0, above / below, torch.zeros_like(above))
