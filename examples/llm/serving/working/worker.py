"""Orders on their way through the engine's thread, as the event loop sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from layer_streamer import StreamerError

from ..api_error import ApiError, refused
from ..asking.order import Order
from ..asking.refusals import refusal_of
from ..limits import Limits
from .engine_thread import EngineThread, Report, TaggedPieces
from .mailbox import Mailbox
from .pieces import Piece
from .served import Facts, Load, Ready, Served
from .wait_estimate import WaitEstimate

T = TypeVar("T")


class Listener(Protocol):
    """Hears of what is counted."""

    def hear_facts(self, facts: Facts) -> None:
        """An engine has been opened."""
        ...

    def hear_load(self, load: Load) -> None:
        """What it is doing."""
        ...

    def hear_pass(self, seconds: float, tokens: int) -> None:
        """A pass took so long and gave so many tokens."""
        ...

    def hear_end(self, piece: Piece) -> None:
        """A text has ended."""
        ...

    def hear_cancel(self, texts: int) -> None:
        """Nobody wanted them any more."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """An order that was accepted."""

    mailbox: Mailbox
    ready: Sequence[Ready]


class Worker:
    """Thread rules: the event loop's, but for :meth:`close`."""

    def __init__(self, open_engine: Callable[[], Served], limits: Limits, hear: Listener) -> None:
        self._limits, self._hear = limits, hear
        self._thread = EngineThread(open_engine, self._post)
        self._preparing = ThreadPoolExecutor(1, "layer-streamer-prepare")
        self._engine: Served | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._answers: set[Answer] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._pending: set[asyncio.Future[Any]] = set()
        """What is to be done by :meth:`run`."""
        self._accepted = 0
        """Texts of which ``load`` does not know yet."""
        self._handed: list[int] = []
        """How many of them each command that has not been done submits."""
        self.status = "loading"
        """"loading", "ready", "draining", "ended"."""
        self.ended: asyncio.Event = asyncio.Event()
        """The engine is closed, or was never open."""
        self.error: BaseException | None = None
        """What ended it, if that was an error."""
        self.load, self.pace = Load(), WaitEstimate()

    def start(self) -> None:
        """Begin to open the engine."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def engine(self) -> Served:
        """ApiError (503) while it is not open, or about to close."""
        if self.status == "loading":
            raise ApiError(503, "Loading model", code="loading", headers={"retry-after": "5"})
        if self._engine is None or self.status != "ready":
            raise ApiError(503, "The server is about to end", code=self.status)
        return self._engine

    async def answer(self, order: Order) -> Answer:
        """Have an order tokenised, checked and queued. ApiError for one that is refused: 429 if too
        many texts wait."""
        engine, count = self.engine, order.count
        self._limits.check(order)
        self._check_queue(engine, count)
        self._accepted += count
        try:
            ready = await self.prepare(lambda: engine.prepare(order), order)
            _ = self.engine  # it may be about to close by now
        except BaseException:
            self._accepted -= count
            raise
        answer = Answer(Mailbox(count), ready)
        self._answers.add(answer)
        self._idle.clear()
        self._handed.append(count)
        self._thread.do(lambda engine: _submit(engine, answer))
        return answer

    async def prepare(self, work: Callable[[], T], order: Order | None = None) -> T:
        """Something for the tokenizer, off the loop. ApiError for what is wrong with a prompt, or
        with the order that it is of."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._preparing, work)
        except Exception as error:
            refusal = refusal_of(error, order)
            if refusal is None:
                raise
            raise refusal from error

    async def run(self, work: Callable[[Served], T]) -> T:
        """Something for the engine, between two passes; what it raises."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        _ = self.engine
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        self._handed.append(0)
        self._thread.do(lambda engine: self._work(engine, work, future))
        return await future

    def _work(
        self, engine: Served, work: Callable[[Served], T], future: asyncio.Future[T]
    ) -> TaggedPieces:
        """In the engine's thread."""
        assert self._loop is not None
        try:
            found = work(engine)
        except Exception as error:
            self._loop.call_soon_threadsafe(_settle, future, None, error)
        else:
            self._loop.call_soon_threadsafe(_settle, future, found, None)
        return []

    def leave(self, answer: Answer) -> None:
        """Nobody wants to hear of it any more: what has not ended is cancelled. Idempotent."""
        if answer not in self._answers:
            return
        self._answers.discard(answer)
        if not self._answers:
            self._idle.set()
        tags = [(answer, index) for index in answer.mailbox]
        if tags:
            self._hear.hear_cancel(len(tags))
            self._cancel(tags)

    async def drain(self, seconds: float) -> None:
        """Take no more; wait for what is under way, and end it if that takes longer."""
        if self.status != "ended":
            self.status = "draining"
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            self._fail(ApiError(503, "The server ended before this text did", code="draining"))

    def close(self) -> None:
        """End the engine after the pass that runs, and wait for it. Idempotent; any thread."""
        self._thread.stop()
        self._preparing.shutdown(cancel_futures=True)

    def _check_queue(self, engine: Served, count: int) -> None:
        """Rows that are free do not let wait."""
        rows, most = engine.facts.max_rows, self._limits.max_waiting
        if count > most + rows:
            raise refused("n", f"{count} texts: at most {most + rows} fit in rows and queue")
        free = max(rows - self.load.rows, 0)
        waiting = max(self.load.waiting + self._accepted - free, 0)
        if self.load.waiting + self._accepted + count > most + free:
            seconds = self.pace.retry_after(self.load.rows)
            raise ApiError(
                429,
                f"{waiting} texts are waiting: try again in {seconds} s",
                code="queue_full",
                headers={"retry-after": str(seconds)},
            )

    def _post(self, report: Report) -> None:
        """In the engine's thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._hear_report, report)

    def _hear_report(self, report: Report) -> None:
        done, self._handed = self._handed[: report.commands], self._handed[report.commands :]
        self._accepted -= sum(done)
        self.load = report.load
        self._hear.hear_load(report.load)
        if report.opened is not None:
            self._engine = report.opened
            self.status = "ready" if self.status == "loading" else self.status
            self._hear.hear_facts(report.opened.facts)
        if report.seconds is not None:
            self.pace.hear_pass(report.seconds)
            tokens = sum(piece.tokens for _, piece in report.events)
            self._hear.hear_pass(report.seconds, tokens)
        for (answer, index), piece in report.events:
            if piece.account is not None:
                self.pace.hear_text(piece.account.passes)
            if piece.ends and answer in self._answers and index in answer.mailbox.open:
                self._hear.hear_end(piece)  # of one that was left, that has been told
            answer.mailbox.put(index, piece)
        if report.ended:
            self.status, self.error, self._engine = "ended", report.error, None
            self._fail(ApiError(500, "The engine has ended", code="engine"))
            self.ended.set()

    def _fail(self, error: ApiError) -> None:
        """End all that has not ended, for those who wait for it."""
        for future in list(self._pending):
            _settle(future, None, error)
        for answer in list(self._answers):
            tags = [(answer, index) for index in answer.mailbox]
            for _ in tags:
                self._hear.hear_end(Piece(error=error))
            answer.mailbox.fail(error)
            self._cancel(tags)

    def _cancel(self, tags: Sequence[tuple[Answer, int]]) -> None:
        if tags and self.status != "ended":
            self._handed.append(0)
            self._thread.do(lambda engine: _cancel(engine, tags))


def _settle(future: asyncio.Future[Any], found: Any, error: Exception | None) -> None:
    """Whoever waits may be gone."""
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(found)


def _submit(engine: Served, answer: Answer) -> TaggedPieces:
    events: TaggedPieces = []
    for index, ready in enumerate(answer.ready):
        try:
            engine.submit(ready, (answer, index))
        except (ValueError, StreamerError) as error:
            events.append(((answer, index), Piece(error=error)))
    return events


def _cancel(engine: Served, tags: Sequence[tuple[Answer, int]]) -> TaggedPieces:
    for tag in tags:
        engine.cancel(tag)
    return []
