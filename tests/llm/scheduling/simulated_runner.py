"""A runner without a model: passes take as long as a script says, texts follow from the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from layer_streamer.llm.kv.blocks import BLOCK
from layer_streamer.llm.kv.rows import Row, Rows, make_spans
from layer_streamer.llm.request import Request
from layer_streamer.llm.scheduling.scheduler import Scheduler
from layer_streamer.llm.text.sampling import Sampler

VOCABULARY = 8
Taken = tuple[int, int]
"""How many tokens a row held before a pass, and how many it got."""


def request_of(prompt: Sequence[int], new: int, **options: Any) -> Request:
    """A request for so many tokens."""
    return Request(0, list(prompt), new, Sampler(), None, len(prompt) + new, **options)


def text_of(prompt: Sequence[int], new: int) -> list[int]:
    """What comes of it, whatever else there is."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(following(ids))
    return ids[len(prompt) :]


def following(ids: Sequence[int]) -> int:
    """Of the whole row: a token that is missing, doubled or out of order shows."""
    return sum((i + 1) * (token + 1) for i, token in enumerate(ids)) % 7 % VOCABULARY


def streamed(rows: Sequence[Taken]) -> float:
    """Seconds of a pass that a link bounds, up to some 2,000 tokens."""
    tokens = sum(count for _, count in rows)
    looks = sum(count * (before + count / 2) for before, count in rows if count > 1)
    return max(0.1, tokens * 5e-5) + looks * 2e-9


class SimulatedRunner:
    """What a Scheduler asks of a runner."""

    captures_passes = False

    def __init__(
        self,
        places: int,
        max_rows: int,
        seconds: Callable[[Sequence[Taken]], float] = streamed,
        window: int | None = None,
    ) -> None:
        rows = Rows(make_spans([window], places, max_rows), max_rows)
        self.kv = SimpleNamespace(rows=rows, move=lambda moves: None)
        self.most_tokens, self.now = places, 0.0
        self.passes: list[list[Taken]] = []
        self.took: list[float] = []
        self.before_pass: Callable[[], object] = lambda: None
        self.in_pass: Callable[[], object] = lambda: None
        self.in_end: Callable[[], object] = lambda: None
        """Each is called at its time in a pass: before it, before and after rows have grown."""
        self._seconds = seconds
        self._written: dict[tuple[int, int], int] = {}
        """The token at each place; in a ring also by its position, so that all are kept."""

    def scheduler(self, **options: Any) -> Scheduler:
        """One over this runner, with its clock."""
        runner: Any = self
        return Scheduler(runner, clock=lambda: self.now, **options)

    def forward(
        self, entries: Sequence[tuple[Row, Sequence[int]]], *, drafts: Any = None, on_layer: Any
    ) -> torch.Tensor:
        self.before_pass()
        assert sum(len(ids) for _, ids in entries) <= self.most_tokens
        for row, ids in entries:
            assert not row.dropped and ids and row.length + len(ids) <= row.capacity
        if on_layer is not None:
            on_layer(0)
        self.in_pass()
        self.passes.append([(row.length, len(ids)) for row, ids in entries])
        self.took.append(self._seconds(self.passes[-1]))
        self.now += self.took[-1]
        logits = torch.zeros(len(entries), VOCABULARY)
        for i, (row, ids) in enumerate(entries):
            for token in ids:
                self._written[self._at(row, row.length)] = token
                row.length += 1
            held = [self._written[self._at(row, at)] for at in range(row.length)]
            logits[i, following(held)] = 1.0
            self.in_end()
        return logits

    def _at(self, row: Row, position: int) -> tuple[int, int]:
        (span,) = self.kv.rows.spans
        blocks = row.blocks[span]  # not by the library's own lines, which interrupts count
        block = blocks[position // BLOCK % len(blocks)]
        return block * BLOCK + position % BLOCK, 0 if span.ring is None else position
