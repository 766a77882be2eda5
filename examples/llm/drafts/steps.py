"""Draft tokens, one after the other, by passes of a model that is all on the device."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from ..kv.rows import Row
from ..passes.runner import Runner
from .pace import FASTER, SLOWER, Pace

CAUGHT_UP = 8
"""Tokens that a captured pass each takes; more go through one pass that is not captured."""


WARM_UP = 3
"""Passes: one that is streamed, one that is launched and captured, one that is replayed."""


class Steps:
    """A runner's greedy tokens behind a row of its cache.

    They end where one more promises less than the time of its pass is worth: where the likelihood
    of the whole draft, by the model's own account, times what a pass of the target takes does not
    come up to it. Thread rules: one thread.
    """

    def __init__(self, runner: Runner, pace: Pace, vocab: int) -> None:
        """``pace``: of the target's passes. ``vocab``: tokens from this one on are none."""
        self._runner, self._pace, self._vocab = runner, pace, vocab
        self._seconds = 0.0

    def warm_up(self) -> None:
        """Have kernels compiled and passes captured now, so that no draft waits for them."""
        rows = self._runner.kv.rows
        row = rows.add(WARM_UP)
        if row is not None:
            for _ in range(WARM_UP):
                self._next(row, (0,))
            rows.drop(row)

    def draft(self, row: Row, ids: Sequence[int], most: int) -> list[int]:
        """Up to ``most`` tokens that may follow ``ids``, which the row is given; of what is drafted
        it then has all but the last. At least one id, and room for all of this."""
        found: list[int] = []
        token, likely = self._next(row, ids)
        expected = 1.0
        while math.isfinite(likely):
            found.append(token)
            expected += likely
            if len(found) == most or not self._goes_on(len(found), likely, expected):
                break
            began = time.perf_counter()
            token, likelihood = self._next(row, (token,))
            self._note(time.perf_counter() - began)
            likely *= likelihood
        return found

    def _goes_on(self, count: int, likely: float, expected: float) -> bool:
        """True: a token more adds more than these do each second, the pass counted."""
        target = self._pace.seconds(1)
        whole = target + count * self._seconds
        return target == 0 or likely * whole >= expected * self._seconds

    def _note(self, seconds: float) -> None:
        known = self._seconds or seconds
        self._seconds = known + (seconds - known) * (FASTER if seconds < known else SLOWER)

    def _next(self, row: Row, ids: Sequence[int]) -> tuple[int, float]:
        """Append ids; the likeliest token behind them, and how likely it is."""
        runner = self._runner
        captured = runner.decoder is not None and len(ids) <= CAUGHT_UP
        for part in [[one] for one in ids] if captured else [list(ids)]:
            logits = runner.forward([(row, part)])
        with torch.inference_mode():
            logits_V = logits[0, : self._vocab]
            token = logits_V.argmax()
            likelihood = 1 / (logits_V - logits_V[token]).exp().sum()
            number, likely = torch.stack((token.double(), likelihood.double())).tolist()
        return int(number), likely
