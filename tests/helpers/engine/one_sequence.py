"""One sequence on a runner: the simplest use of the engine's passes, for tests of the models."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
import torch.nn.functional as F

from layer_streamer.llm.kv.cache import KVCache
from layer_streamer.llm.kv.rows import Row
from layer_streamer.llm.passes.runner import Runner
from layer_streamer.llm.text.sampling import Sampler

VOCABULARY = 512
"""Of the tiny models."""


class OneSequence:
    """A runner whose cache has one row."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.config, self.streamer = runner, runner.config, runner.streamer
        row = runner.kv.rows.add(runner.kv.layout.tokens)
        assert row is not None
        self.row = row

    @property
    def kv(self) -> KVCache:
        return self.runner.kv

    def forward(
        self,
        ids: Sequence[int],
        *,
        every_position: bool = False,
        on_layer: Callable[[int], object] | None = None,
    ) -> torch.Tensor:
        """Logits of what follows the last token (1, V), or each (len(ids), V)."""
        entries = [(self.row, ids)]
        return self.runner.forward(entries, every_position=every_position, on_layer=on_layer)

    def truncate(self, length: int) -> int:
        return self.kv.rows.truncate(self.row, length)


def generate(
    sequence: OneSequence,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """Greedy ids after the prompt; the first of ``stop_ids`` is the last."""
    ids, sampler = list(prompt_ids), Sampler()
    for _ in range(max_new_tokens):
        token = int(sampler.choose(sequence.forward(ids)[-1]))
        yield token
        if token in stop_ids:
            return
        ids = [token]


def mean_nll(sequence: OneSequence, ids: Sequence[int]) -> float:
    """Mean negative log-likelihood of each token of a text given those before it, in nats."""
    logits = sequence.forward(ids, every_position=True)[:-1]
    targets = torch.tensor(ids[1:], device=logits.device)
    return float(F.cross_entropy(logits.double(), targets))


class Story:
    """A random sequence of passes: rows grow, are cut back, leave and enter."""

    def __init__(self, seed: int, steps: int = 14) -> None:
        self._random, self._steps = random.Random(seed), steps

    def tell(self, runner: Runner) -> list[torch.Tensor]:
        """The logits of every pass."""
        rows: list[Row] = []
        logits = []
        for _ in range(self._steps):
            self._change(runner, rows)
            entries = [(row, self._tokens(row)) for row in rows]
            logits.append(runner.forward([(row, ids) for row, ids in entries if ids]))
        return logits

    def _change(self, runner: Runner, rows: list[Row]) -> None:
        dice = self._random
        if rows and dice.random() < 0.25:
            gone = rows.pop(dice.randrange(len(rows)))
            runner.kv.rows.drop(gone)
        if rows and dice.random() < 0.35:
            row = dice.choice(rows)
            runner.kv.rows.truncate(row, dice.randint(row.length // 2, row.length))
        while not rows or (len(rows) < 4 and dice.random() < 0.5):
            row = runner.kv.rows.add(dice.choice([200, 256, 900, 1400]))
            if row is None:
                break
            rows.append(row)

    def _tokens(self, row: Row) -> list[int]:
        room = row.capacity - row.length
        count = min(self._random.choice([1, 1, 1, 2, 30, 150, 600]), room)
        return [self._random.randrange(VOCABULARY) for _ in range(count)]
