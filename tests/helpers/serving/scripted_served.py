"""An engine without a model: each text is a script, and a test lets passes happen."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from layer_streamer.llm.errors import PromptTooLongError
from layer_streamer.llm.serving.asking.order import Order
from layer_streamer.llm.serving.limits import Limits
from layer_streamer.llm.serving.metrics import Metrics
from layer_streamer.llm.serving.working.pieces import Account, Piece, ScoredToken
from layer_streamer.llm.serving.working.served import Facts, Load, Ready
from layer_streamer.llm.serving.working.worker import Worker

QUICK = Limits(drain_seconds=5, body_seconds=5)


class ScriptedServed:
    """Says the words of a prompt's last line, one a pass; with ``gate``, only as often as a test
    lets it. A word "RAISE" is an error of its text, "BREAK" one of the engine."""

    def __init__(
        self, rows: int = 2, *, gate: bool = False, template: str | None = None, length: int = 1000
    ) -> None:
        self.facts = Facts(
            name="scripted", max_length=length, max_rows=rows, template=template, places=4096,
            where={"device": 1, "host": 2, "disk": 3},
        )  # fmt: skip
        self.passes = threading.Semaphore(0) if gate else None
        self.running: dict[Any, list[str]] = {}
        self.waiting: dict[Any, list[str]] = {}
        self.taken: dict[Any, int] = {}
        self.orders: list[Order] = []
        self.cancelled: list[Any] = []
        self.threads: set[int] = set()
        self.closed = threading.Event()
        self.submitted = threading.Semaphore(0)

    @property
    def load(self) -> Load:
        rows = len(self.running)
        return Load(rows=rows, waiting=len(self.waiting), places_used=10 * rows)

    def prepare(self, order: Order) -> Sequence[Ready]:
        self.orders.append(order)
        found = []
        for prompt in order.prompts:
            text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
            text.encode()
            if len(text) > self.facts.max_length:
                raise PromptTooLongError(f"the prompt has {len(text)} tokens")
            if "REFUSE" in text:
                raise ValueError("the prompt is refused")
            words = [f"{word} " for word in text.splitlines()[-1].split(" ")]
            found += [Ready(range(len(text)), words)] * order.n
        return found

    def tokenize(self, prompt: Any, *, special: bool) -> Sequence[int]:
        return ([1] if special else []) + [ord(character) for character in str(prompt)]

    def detokenize(self, ids: Sequence[int]) -> str:
        if max(ids, default=0) > 0x10FFFF:
            raise ValueError("there is no such token")
        return "".join(map(chr, ids))

    def embed(self, prompts: Sequence[Sequence[int]]) -> Iterator[Sequence[float]]:
        if any(len(prompt) > self.facts.max_length for prompt in prompts):
            raise PromptTooLongError("too long")
        return ([float(sum(prompt)), -0.5] for prompt in prompts)

    def submit(self, ready: Ready, tag: Any) -> None:
        self.waiting[tag] = list(ready.request)
        self.taken[tag] = len(ready.ids)
        self.submitted.release()

    def cancel(self, tag: Any) -> None:
        if tag in self.waiting or tag in self.running:
            self.cancelled.append(tag)
        self.waiting.pop(tag, None)
        self.running.pop(tag, None)

    def step(self) -> Sequence[tuple[Any, Piece]]:
        self.threads.add(threading.get_ident())
        for tag in list(self.waiting)[: self.facts.max_rows - len(self.running)]:
            self.running[tag] = self.waiting.pop(tag)
        if not self.running:
            return []
        if self.passes is not None and not self.passes.acquire(timeout=0.05):
            return []
        return [(tag, self._say(tag)) for tag in list(self.running)]

    def _say(self, tag: Any) -> Piece:
        words = self.running[tag]
        word, count = words.pop(0), self.taken[tag]
        if word == "BREAK ":
            raise RuntimeError("the engine broke")
        if word == "RAISE ":
            del self.running[tag]
            return Piece(error=ValueError("the text cannot go on"))
        scored = [ScoredToken(word, list(word[:99].encode()), -0.5)]
        if words:
            return Piece(word, 1, scored)
        del self.running[tag]
        return Piece(word, 1, scored, "stop", Account(count, 1, passes=1))

    def close(self) -> None:
        self.closed.set()


@asynccontextmanager
async def working(
    engine: ScriptedServed | Callable[[], Any], limits: Limits = QUICK
) -> AsyncIterator[Worker]:
    """A worker whose engine is open."""
    open_engine = engine if callable(engine) else lambda: engine
    worker = Worker(open_engine, limits, Metrics())
    worker.start()
    try:
        while worker.status == "loading":
            await asyncio.sleep(0)
        yield worker
    finally:
        await asyncio.get_running_loop().run_in_executor(None, worker.close)
