"""In which order a forward comes to its blocks, which a model's modules need not tell."""

from __future__ import annotations


class Course:
    """Finds the order out by the first forward, if that enters every block.

    Where a later one begins cannot be told. Ownership: the thread that runs the forward.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._entered: dict[int, None] = {}
        self._last = -1
        self.over = False
        """There is nothing to find out any more."""
        self.order: tuple[int, ...] | None = None
        """Blocks by when they were entered first; None as long as it is not known."""

    def note(self, i: int) -> None:
        """Block ``i`` is entered."""
        if i in self._entered and i != self._last:
            self.over = True
        self._entered[i] = None
        self._last = i
        if len(self._entered) == self._count and not self.over:
            self.order = tuple(self._entered)
            self.over = True
