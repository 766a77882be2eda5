"""Which passes compute layers in host memory, and which stream them: by how long each way took.

A link brings layers in the same time for one token and for many; a processor's time grows with
tokens, sooner or later, by format and machine. So both are measured, by the number of tokens.
"""

from __future__ import annotations

MOST_TOKENS = 64
"""Of a pass that computes layers in host memory: what kernels for processors take."""
FEW = 8
"""The same before anything is known."""
FASTER, SLOWER = 0.5, 0.1
"""How much of a pass that was faster or slower than known counts: as of ``drafts.pace``."""
LEARNT = 4
"""Passes of a kind that are listened to, one after the other; then one in SELDOM is."""
SELDOM = 16
TRIED = 64
"""Passes after which the way that seems slower is tried again, if it is not by far."""
BY_FAR = 1.5
WORST = 2.5
"""How much longer than a streamed one a first pass of so many tokens may take at most."""


class Choice:
    """Counts of tokens from one power of two up to the next are taken to cost the same. Pure.

    Thread rules: one thread.
    """

    def __init__(self) -> None:
        self._there: dict[int, float] = {}
        """Seconds of passes, by the bits of the number of tokens."""
        self._streamed: dict[int, float] = {}
        self._link: float | None = None
        """What moving all layers takes, by the rate at which some move."""
        self._heard: dict[tuple[bool, int], int] = {}
        self._passes = 0

    def there(self, tokens: int) -> bool:
        """Whether a pass of so many tokens is to compute these layers in host memory."""
        if tokens > MOST_TOKENS:
            return False
        there, streamed = self._expected(tokens), self._known_streamed(tokens)
        if there is None or streamed is None:
            return tokens <= FEW
        if tokens.bit_length() not in self._there:
            return there <= WORST * streamed
        self._passes += 1
        close = max(there, streamed) <= BY_FAR * min(there, streamed)
        tries = close and self._passes % TRIED == 0
        return (there <= streamed) != tries

    def wants(self, tokens: int, *, there: bool) -> bool:
        """Whether to look how long such a pass took."""
        key = there, tokens.bit_length()
        count = self._heard[key] = self._heard.get(key, 0) + 1
        return count <= LEARNT or count % SELDOM == 0

    def hear(self, tokens: int, seconds: float, *, there: bool) -> None:
        """How long one took that followed one of its kind."""
        known = self._there if there else self._streamed
        size = tokens.bit_length()
        before = known.get(size, seconds)
        known[size] = before + (seconds - before) * (FASTER if seconds < before else SLOWER)

    def hear_link(self, seconds: float) -> None:
        """What all layers would take over the link, as it was in a pass that moved some."""
        self._link = seconds if self._link is None else min(self._link, seconds)

    def _expected(self, tokens: int) -> float | None:
        """Computed there: as known, or as if it grew with each token from what fewer took."""
        size = tokens.bit_length()
        smaller = [known for known in self._there if known <= size]
        if not smaller:
            return None
        return self._there[max(smaller)] * float(1 << (size - max(smaller)))

    def _known_streamed(self, tokens: int) -> float | None:
        smaller = [known for known in self._streamed if known <= tokens.bit_length()]
        return self._streamed[max(smaller)] if smaller else self._link
