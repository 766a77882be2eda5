"""Many prompts over one runner: rows that finish leave, those that wait enter, between passes.

Every pass costs the moving of the whole model, whatever it computes: so all rows share each one,
those that take their prompt as well as those that take one token. What a row raises ends that row:
the others go on as they would without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator

from .drafts.drafting import Drafting
from .kv.rows import Row
from .passes.runner import Runner
from .request import Event, Request
from .row_passes import RowPasses
from .text.following import Followed


class Scheduler:
    """Runs requests to their ends, as many at a time as there is room for.

    A request ends with what is raised for it alone: by its tokenizer or sampler, by a pass over its
    row, or since its logits are not numbers. What the streamer raises ends all of them. What their
    iterator raises comes when those that it gave before have ended.

    Thread rules: one thread. A generator that is closed early frees its rows.
    """

    def __init__(
        self,
        runner: Runner,
        requests: Iterable[Request],
        stop_ids: frozenset[int],
        *,
        row: Row | None = None,
        drafting: Drafting | None = None,
        on_layer: Callable[[int], object] | None = None,
    ) -> None:
        """``requests`` are taken one by one, as they come to fit. ``row`` is for the first of them
        and is left to the caller at the end. ``on_layer`` hears of the first pass's layers. Rows
        are drafted for by ``drafting``, but where passes are captured: there a pass costs what its
        tokens do."""
        self._runner, self._stop_ids = runner, stop_ids
        self._passes = RowPasses(runner)
        self._waiting = iter(requests)
        self._next: Request | None = None
        self._running: list[Request] = []
        self._given = row
        self._drafting = drafting if runner.decoder is None else None
        self._on_layer = on_layer
        self._asking_failed: Exception | None = None
        self._undelivered = 0
        """Requests that have had a row, and whose last event nobody has had yet."""

    def run(self) -> Generator[Event]:
        """Every pass's events, until all requests have ended."""
        try:
            while True:
                yield from self._admit()
                if not self._running:
                    break
                yield from self._pass()
        finally:
            for request in self._running:
                self._leave(request)
        if self._asking_failed is not None:
            raise self._asking_failed

    @property
    def has_ended(self) -> bool:
        """True: there is no further request, and the last events of all have been given out."""
        return self._undelivered == 0 and self._following() is None

    def _admit(self) -> Iterator[Event]:
        """Let requests in, in their order, while there is room; gives those that cannot run."""
        while (request := self._following()) is not None:
            if request.error is None:
                row = self._place(request)
                if row is not None:
                    request.row, request.began = row, time.perf_counter()
                    self._running.append(request)
                    self._undelivered += 1
                elif self._running:
                    return
                else:
                    request.fail(ValueError(f"{request.places} tokens: there is no room for them"))
            self._next = None
            if request.error is not None:
                yield request, ""

    def _place(self, request: Request) -> Row | None:
        """A row for a request; None: not now."""
        behind = sum(running.behind for running in self._running)
        if self._running and behind + request.behind > self._runner.most_tokens:
            return None
        if self._given is not None and request.index == 0:
            return self._given
        return self._runner.kv.rows.add(request.places)

    def _following(self) -> Request | None:
        """The next request, which stays the next one until it is let in."""
        if self._next is None and self._asking_failed is None:
            try:
                self._next = next(self._waiting, None)
            except Exception as error:
                self._asking_failed = error
        return self._next

    def _pass(self) -> Iterator[Event]:
        if self._drafting is not None:
            taken = sum(request.behind for request in self._running)
            self._drafting.propose(self._running, self._runner.most_tokens - taken)
        # Rows that take one token lie together, in the first chunk.
        self._running.sort(key=lambda request: request.behind)
        tokens = sum(request.behind for request in self._running)
        decodes = all(request.new_ids for request in self._running)
        began = time.perf_counter()
        found = self._passes.choose(self._running, self._on_layer)
        self._on_layer = None
        now = time.perf_counter()
        if self._drafting is not None and decodes:
            self._drafting.hear(tokens, now - began)
        pairs = sorted(zip(self._running, found, strict=True), key=lambda pair: pair[0].index)
        events = [(request, self._follow(request, tokens, now)) for request, tokens in pairs]
        for request, _ in events:
            if request.finish_reason is not None:
                self._leave(request)
        self._running = [request for request in self._running if request.finish_reason is None]
        for request, piece in events:
            self._undelivered -= request.finish_reason is not None
            yield request, piece

    def _follow(self, request: Request, tokens: Followed, now: float) -> str:
        """What a pass has brought a row: its text. The row then holds all of its ids but the last
        one, as without a draft."""
        request.passes += 1
        before, pieces = len(request.new_ids), []
        for token in tokens:
            pieces.append(self._advance(request, token, now))
            if request.finish_reason is not None:
                break
        if self._drafting is not None and request.draft:
            assert request.row is not None
            length = min(request.row.length, len(request.known) - 1)
            self._runner.kv.rows.truncate(request.row, length)
            self._drafting.judge(request, max(len(request.new_ids) - before - 1, 0))
        return "".join(pieces)

    def _advance(self, request: Request, choice: int | Exception, now: float) -> str:
        """One more token: its text, and whether it was the last."""
        if isinstance(choice, Exception):
            request.fail(choice)
            return ""
        if not request.new_ids:
            request.prompt_seconds = now - request.began
        else:
            request.decode_seconds = now - request.began - request.prompt_seconds
        request.new_ids.append(choice)
        try:
            return self._text(request, choice)
        except BaseException as error:  # tokenizers panic, which is no Exception
            request.fail(error)
            return ""

    def _text(self, request: Request, token: int) -> str:
        ended, text = token in self._stop_ids, request.text
        piece = text.push(token, ends=ended) if text is not None else ""
        reason = request.finish_reason
        if ended or (text is not None and text.stopped):
            reason = "stop"
        elif len(request.new_ids) >= request.max_new_tokens:
            reason = "length"
        if reason is not None and text is not None:
            piece += text.finish()
            if text.stopped:
                reason = "stop"
        request.finish_reason = reason
        return piece

    def _leave(self, request: Request) -> None:
        if self._drafting is not None:
            self._drafting.leave(request)
        if request.row is not None and request.row is not self._given:
            self._runner.kv.rows.drop(request.row)
