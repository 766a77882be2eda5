"""Where the tokens of a draft that is a tree are in their row, and what each of them sees.

They lie behind the row's tokens one after the other, as those of a chain do: that is their *place*.
Their *position* goes by how many tokens they follow, so those that may follow the same one have the
same. A token sees the row's own tokens, those that it follows, and itself; of these its window
leaves out what a position is too far away.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from .tree import ROOT, Tree


class Branches:
    """One row's. Lives as long as its pass."""

    def __init__(self, first: int, tree: Tree, device: torch.device) -> None:
        """``first``: the place of the first token of the tree."""
        self.first, self.tree = first, tree
        self.positions = [first - 1 + depth for depth in tree.depths]
        sees = np.eye(len(tree), dtype=np.bool_)
        for node, parent in enumerate(tree.parents):
            if parent != ROOT:
                sees[node] |= sees[parent]
        self._sees_NN = torch.from_numpy(sees).to(device)
        self._positions_N = torch.tensor(self.positions, device="cpu").to(device)
        self._masks: dict[tuple[int, int, int, int | None], torch.Tensor] = {}

    def seen(self, begin: int, end: int, window: int | None) -> int:
        """From which place on something is seen by the tokens at places from begin to end."""
        if window is None:
            return 0
        nodes = self.positions[max(begin - self.first, 0) : end - self.first]
        earliest = min([*nodes, begin])
        return min(max(0, earliest - window + 1), self.first)

    def alone(self, begin: int, end: int) -> Iterator[tuple[list[int], list[int]]]:
        """The tokens at places from begin to end, in parts that follow one another: their places,
        and those of the tree's tokens that the last one sees."""
        if begin < self.first:
            yield list(range(begin, self.first)), []
        known = set(range(begin - self.first))
        for branch in self.tree.first(end - self.first).branches():
            own = [node for node in branch if node not in known]
            known.update(own)
            if own:
                yield [self.first + node for node in own], [self.first + node for node in branch]

    def mask(self, begin: int, end: int, seen: int, window: int | None) -> torch.Tensor:
        """Which of the places from ``seen`` to ``end`` each of those from ``begin`` on sees: (T, P)
        of bools, True where it does. ``seen`` is not behind the first token of the tree."""
        key = (begin, end, seen, window)
        if key not in self._masks:
            self._masks[key] = self._mask(*key)
        return self._masks[key]

    def _mask(self, begin: int, end: int, seen: int, window: int | None) -> torch.Tensor:
        device, first, count = self._sees_NN.device, self.first, end - self.first
        places_P = torch.arange(seen, end, device=device)
        mask = places_P <= places_P[begin - seen :, None]
        before = max(begin - first, 0)
        mask[max(first - begin, 0) :, first - seen :] = self._sees_NN[before:count, :count]
        if window is not None:
            positions_P = places_P.clone()
            positions_P[first - seen :] = self._positions_N[:count]
            mask &= positions_P > positions_P[begin - seen :, None] - window
        return mask
