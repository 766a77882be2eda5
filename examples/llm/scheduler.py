"""Many prompts over one runner: rows that finish leave, those that wait enter, between passes.

Every pass costs the moving of the whole model, whatever it computes: so all rows share each one,
those that take their prompt as well as those that take one token.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from .kv.rows import Row
from .passes.runner import Runner
from .text.sampling import Sampler, choose_tokens
from .text.stopping import TextStream


@dataclass(slots=True, eq=False)
class Request:
    """One prompt, and what has become of it."""

    index: int
    """Its place among the prompts of one call."""
    prompt_ids: Sequence[int]
    max_new_tokens: int
    sampler: Sampler
    text: TextStream | None
    """None where there is no tokenizer: ids alone come out."""
    places: int
    """Tokens for which its row is to have room."""
    new_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    """"stop" or "length", once it has ended."""
    row: Row | None = None
    prompt_seconds: float = 0.0
    """From its first pass on to its first token."""
    decode_seconds: float = 0.0
    """From there to its last."""
    began: float = 0.0

    @property
    def pending(self) -> Sequence[int]:
        """Tokens that the next pass appends to its row."""
        assert self.row is not None
        known = len(self.prompt_ids)
        if self.row.length < known:
            return [*self.prompt_ids[self.row.length :], *self.new_ids]
        return self.new_ids[self.row.length - known :]


Event = tuple[Request, str]
"""A request and its next piece of text, perhaps none; the last one if it has a finish_reason."""


class Scheduler:
    """Runs requests to their ends, as many at a time as there is room for.

    Thread rules: one thread. A generator that is closed early frees its rows.
    """

    def __init__(
        self,
        runner: Runner,
        requests: Iterable[Request],
        stop_ids: frozenset[int],
        *,
        row: Row | None = None,
        on_layer: Callable[[int], object] | None = None,
    ) -> None:
        """``requests`` are taken one by one, as they come to fit. ``row`` is for the first of them
        and is left to the caller at the end. ``on_layer`` hears of the first pass's layers."""
        self._runner, self._stop_ids = runner, stop_ids
        self._waiting, self._next = iter(requests), deque[Request]()
        self._running: list[Request] = []
        self._given = row
        self._on_layer = on_layer

    def run(self) -> Generator[Event]:
        """Every pass's events, until all requests have ended."""
        try:
            while self._admit():
                yield from self._pass()
        finally:
            for request in self._running:
                self._leave(request)

    def _admit(self) -> bool:
        """Let requests in, in their order, while there is room; False when all have ended."""
        while True:
            if not self._next:
                request = next(self._waiting, None)
                if request is None:
                    break
                self._next.append(request)
            request = self._next[0]
            row = self._given if self._given is not None and request.index == 0 else None
            row = row if row is not None else self._runner.kv.rows.add(request.places)
            if row is None:
                break
            request.row, request.began = row, time.perf_counter()
            self._running.append(self._next.popleft())
        return bool(self._running)

    def _pass(self) -> Iterator[Event]:
        # Rows that take one token lie together, in the first chunk.
        self._running.sort(key=lambda request: len(request.pending))
        entries = [(r.row, r.pending) for r in self._running if r.row is not None]
        logits = self._runner.forward(entries, on_layer=self._on_layer)
        self._on_layer = None
        tokens = choose_tokens(logits, [request.sampler for request in self._running])
        now = time.perf_counter()
        pairs = sorted(zip(self._running, tokens, strict=True), key=lambda pair: pair[0].index)
        events = [(request, self._advance(request, token, now)) for request, token in pairs]
        for request, _ in events:
            if request.finish_reason is not None:
                self._leave(request)
        self._running = [request for request in self._running if request.finish_reason is None]
        yield from events

    def _advance(self, request: Request, token: int, now: float) -> str:
        """One more token: its text, and whether it was the last."""
        if not request.new_ids:
            request.prompt_seconds = now - request.began
        else:
            request.decode_seconds = now - request.began - request.prompt_seconds
        request.new_ids.append(token)
        ended, text = token in self._stop_ids, request.text
        piece = text.push(token) if text is not None and not ended else ""
        if ended or (text is not None and text.stopped):
            request.finish_reason = "stop"
        elif len(request.new_ids) >= request.max_new_tokens:
            request.finish_reason = "length"
        if request.finish_reason is not None and text is not None:
            piece += text.finish()
            if text.stopped:
                request.finish_reason = "stop"
        return piece

    def _leave(self, request: Request) -> None:
        if request.row is not None and request.row is not self._given:
            self._runner.kv.rows.drop(request.row)
