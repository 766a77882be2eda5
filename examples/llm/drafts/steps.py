"""Draft tokens, one after the other, by passes of a model that is all on the device."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from ..kv.rows import Row
from ..passes.runner import Runner
from .pace import FASTER, SLOWER, Pace
from .tree import ROOT, Tree

CAUGHT_UP = 8
"""Tokens that a captured pass each takes; more go through one pass that is not captured."""


BRANCHES = 4
"""Tokens that may follow each, of which the likeliest goes on: with real drafts of 0.5B chains of
16 give a fifth more tokens a pass for it (docs/benchmarks)."""
WARM_UP = 3
"""Passes: one that is streamed, one that is launched and captured, one that is replayed."""


class Steps:
    """A runner's greedy tokens behind a row of its cache, and others that it found likely.

    Those that follow one another end where one more promises less than the time of its pass is
    worth: where the likelihood of all of them, by the model's own account, times what a pass of the
    target takes does not come up to it. At each of them the next likeliest tokens are known as
    well, without a step: the likeliest of these are drafted, too, as far as a pass of the target
    has room for them. Thread rules: one thread.
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

    def draft(self, row: Row, ids: Sequence[int], most: int) -> Tree:
        """Up to ``most`` tokens that may follow ``ids``, which the row is given: first those that
        follow one another, of which it then has all but the last, then others beside them. At least
        one id, and room for all that follow one another."""
        trunk, beside = list[int](), list[tuple[float, int, int]]()
        likely = expected = 1.0
        guesses = self._next(row, ids)
        while guesses:
            parent = len(trunk) - 1
            (token, likelihood), *others = guesses
            beside += [(likely * each, parent, other) for other, each in others]
            trunk.append(token)
            likely *= likelihood
            expected += likely
            if len(trunk) == most or not self._goes_on(len(trunk), likely, expected):
                break
            began = time.perf_counter()
            guesses = self._next(row, (token,))
            self._note(time.perf_counter() - began)
        beside = sorted(beside, reverse=True)[: most - len(trunk)]
        beside = beside[: self._worth_it(len(trunk), [each for each, *_ in beside])]
        return Tree(
            (*trunk, *(token for *_, token in beside)),
            (*range(ROOT, len(trunk) - 1), *(parent for _, parent, _ in beside)),
        )

    def _goes_on(self, count: int, likely: float, expected: float) -> bool:
        """True: a token more adds more than these do each second, the pass counted."""
        pace = self._pace
        now = pace.seconds(1 + count)
        more = self._seconds + max(pace.seconds(2 + count) - now, 0.0)
        return now == 0 or likely * (now + count * self._seconds) >= expected * more

    def _worth_it(self, count: int, likely: Sequence[float]) -> int:
        """How many of those beside ``count`` tokens, the likeliest first, add more than a pass that
        looks at them takes longer. None of them takes a step."""
        plain, now = self._pace.seconds(1), self._pace.seconds(1 + count)
        best, most, gained = 0, 0.0, 0.0
        for number, each in enumerate(likely, 1):
            gained += each * plain
            net = gained - (self._pace.seconds(1 + count + number) - now)
            if net >= most:
                best, most = number, net
        return best

    def _note(self, seconds: float) -> None:
        known = self._seconds or seconds
        self._seconds = known + (seconds - known) * (FASTER if seconds < known else SLOWER)

    def _next(self, row: Row, ids: Sequence[int]) -> list[tuple[int, float]]:
        """Append ids; the likeliest tokens behind them, and how likely they are. None, if the
        logits are no numbers."""
        runner = self._runner
        ids = [min(token, self._vocab - 1) for token in ids]  # for those it has not, any other
        captured = runner.captures_passes and len(ids) <= CAUGHT_UP
        for part in [[one] for one in ids] if captured else [list(ids)]:
            logits = runner.forward([(row, part)])
        with torch.inference_mode():
            logits_V = logits[0, : self._vocab]
            likeliest = logits_V.topk(min(BRANCHES, self._vocab))
            share = (likeliest.values - logits_V.logsumexp(0)).exp()
            tokens, likely = torch.stack((likeliest.indices.double(), share.double())).tolist()
        if not math.isfinite(sum(likely)):
            return []
        return list(zip(map(int, tokens), likely, strict=True))
