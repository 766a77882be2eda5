"""How long passes take, by the number of their tokens."""

from __future__ import annotations

from .expert_cost import ExpertCost

FASTER, SLOWER = 0.5, 0.1
"""How much of a pass that was faster or slower than known counts: what makes one slow is most often
something else, such as a kernel that is compiled for it."""


class Pace:
    """Seconds of passes in which rows decode. Counts of tokens from one power of two up to the
    next are taken to cost the same, but for the experts that they ask for, where these come on
    demand. Thread rules: one thread."""

    def __init__(self, experts: ExpertCost | None = None) -> None:
        self._experts = experts
        self._seconds: dict[int, float] = {}
        """Without the experts', by the bits of the number of tokens."""

    def hear(self, tokens: int, seconds: float) -> None:
        """A pass of so many tokens, at least one, took so long."""
        size = tokens.bit_length()
        if self._experts is not None:
            seconds = max(seconds - self._experts.hear(tokens), 0.0)
        known = self._seconds.get(size, seconds)
        self._seconds[size] = known + (seconds - known) * (FASTER if seconds < known else SLOWER)

    def knows(self, tokens: int) -> bool:
        """True: there was a pass of about so many tokens."""
        return tokens.bit_length() in self._seconds

    def seconds(self, tokens: int) -> float:
        """Of a pass of so many tokens; where there was none, of the next smaller known, so that it
        is tried; 0 where there was no pass at all. Never more than what larger ones took: what made
        it slow then was something else."""
        known = self._seconds
        smaller = [size for size in known if size <= tokens.bit_length()]
        size = max(smaller, default=min(known, default=0))
        plain = min((known[other] for other in known if other >= size), default=0.0)
        return plain + (self._experts.seconds(tokens) if self._experts is not None else 0.0)
