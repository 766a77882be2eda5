"""A crowd of clients on a real model for as long as is asked: LAYER_STREAMER_LOAD_MINUTES, else 2.

LAYER_STREAMER_LOAD_MINUTES=30 python -m pytest -n 0 -s -m slow THIS_FILE
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import json
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from statistics import linear_regression, median
from typing import Any

import psutil
import pytest
from assets import smollm2
from serving import Running, events, parted, serving, wait_for
from test_serving_load import left_behind, speak

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.serving.asking.order import Order
from layer_streamer.llm.serving.limits import Limits
from layer_streamer.llm.serving.streamed import StreamedEngine
from layer_streamer.llm.serving.working.worker import Answer

MINUTES = float(os.environ.get("LAYER_STREAMER_LOAD_MINUTES", "2"))
CLIENTS = 200
ROUNDS = max(4, min(round(MINUTES * 2 / 3), 60))
"""At the end of each everybody leaves at once, and it is looked at what is left behind."""
WARM = ROUNDS // 2
"""Rounds after which nothing may grow any more: blocks of keys and values are taken one by one, and
what is drafted from fills up."""
MOST_GROWTH = (32 if MINUTES >= 10 else 256) << 20
"""Bytes, from there to the end: a short run is not warm by then."""
CUT, MALFORMED = 1 / 3, 1 / 10
SYSTEM = "You are one of many. " * 60
"""Longer than a block of the prefix cache."""
BROKEN: list[Callable[[random.Random], bytes]] = [
    lambda draw: b'{"messages": [{"role"', lambda draw: draw.randbytes(200),
    lambda draw: b"[" * 1000, lambda draw: b'{"messages": []}',
    lambda draw: json.dumps(asked(0, draw) | {"guided_regex": "(" * 9}).encode(),
    lambda draw: json.dumps(asked(0, draw) | {"temperature": "hot"}).encode(),
    lambda draw: json.dumps(asked(0, draw) | {"messages": "none"}).encode(),
    lambda draw: json.dumps(asked(0, draw) | {"stop": [""]}).encode(),
]  # fmt: skip


def asked(number: int, draw: random.Random) -> dict[str, Any]:
    """A request like no other."""
    words = " ".join(f"w{draw.randrange(1000)}" for _ in range(draw.randrange(1, 8)))
    messages = [{"role": "user", "content": f"{number}: {words}"}]
    if draw.random() < 0.15:
        messages.insert(0, {"role": "system", "content": SYSTEM})
    more = draw.choice(
        [{}, {"temperature": 0}, {"temperature": 1, "seed": number}, {"stop": ["e", "\n"]},
         {"logprobs": True, "top_logprobs": 2}, {"guided_regex": "(yes|no), because .{3,9}"}]
    )  # fmt: skip
    return {"messages": messages, "max_tokens": draw.randrange(1, 10), **more}


@dataclass
class Crowd:
    """What clients have met with."""

    running: Running
    counts: Counter[str] = field(default_factory=Counter)
    ids: set[str] = field(default_factory=set)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    accepted: int = 0
    """By the server."""

    def __post_init__(self) -> None:
        worker = self.running.worker
        answer = worker.answer

        async def counting(order: Order) -> Answer:
            found = await answer(order)
            self.accepted += 1
            return found

        worker.answer = counting  # type: ignore[method-assign]

    async def round(self, seed: int, seconds: float) -> None:
        """All clients at a time, each with one request after the other, for so long; then they
        leave, whatever they wait for."""
        numbers = count(seed * 1_000_000)
        draw = random.Random(seed)

        async def client() -> None:
            while True:
                await self.ask(next(numbers), draw)

        clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
        ended, left = await asyncio.wait(clients, timeout=seconds, return_when="FIRST_EXCEPTION")
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        for task in ended:
            task.result()  # what went wrong
        self.counts["left"] += len(left)

    async def ask(self, number: int, draw: random.Random) -> None:
        """One request of whichever kind."""
        kind, stream = draw.random(), draw.random() < 0.5
        if kind < MALFORMED:
            status, _ = await self.speak(draw.choice(BROKEN)(draw), draw)
            assert status == 400
            self.counts["malformed"] += 1
            return
        cut = kind < MALFORMED + CUT
        body = json.dumps(asked(number, draw) | {"stream": stream or cut}).encode()
        if cut:
            await speak(self.running.port, body, cut_after=draw.randrange(1, 3000))
            self.counts["cut"] += 1
            return
        began = time.monotonic()
        status, data = await self.speak(body, draw)
        assert status == 200, data
        self.hear(data, stream=stream)
        self.seconds.append(time.monotonic() - began)

    async def speak(self, body: bytes, draw: random.Random) -> tuple[int, bytes]:
        """What comes, for one that comes back as often as it is told to."""
        while (found := await speak(self.running.port, body))[0] == 429:
            self.counts["again"] += 1
            await asyncio.sleep(draw.uniform(1, 3))
        return found

    def hear(self, data: bytes, *, stream: bool) -> None:
        """A reply, which is one and whole."""
        chunks = events(parted(data)[1]) if stream else [json.loads(parted(data)[1])]
        (id_,) = {chunk["id"] for chunk in chunks}
        assert id_ not in self.ids, "answered twice"
        self.ids.add(id_)
        ends = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
        assert ends[-1] in ("stop", "length") and not any(ends[:-1])
        assert data.count(b"[DONE]") == stream and data.count(b"HTTP/1.1 ") == 1
        self.tokens += chunks[-1]["timings"]["predicted_n"]
        self.counts["answered"] += 1


@dataclass(frozen=True)
class Held:
    """What the process has."""

    seconds: float
    rss: int
    descriptors: int
    threads: int

    @classmethod
    def now(cls) -> Held:
        """After what nobody needs any more has gone."""
        gc.collect()
        process = psutil.Process()
        rss, threads = process.memory_info().rss, threading.active_count()
        return cls(time.monotonic(), rss, process.num_fds(), threads)


def check_nothing_is_left(running: Running) -> None:
    """Wait until all have gone; then there is nobody in the server, the queue, the engine."""
    wait_for(lambda: not any(left_behind(running)))
    wait_for(lambda: not (running.worker.load.rows or running.worker.load.waiting))
    served = running.worker.engine
    assert isinstance(served, StreamedEngine)
    assert not (served._requests or served._tags or served._told)
    engine = served._engine
    rows, drafting = engine._runner.kv.rows, engine.scheduler.drafting
    assert not list(rows) and len(rows._prefixes.blocks) * 256 <= engine.plan.kv_tokens
    assert drafting is not None
    assert not (drafting._held or drafting._spent or drafting._in_cache or drafting._salts)


def counted(running: Running) -> dict[str, float]:
    """The server's own counts."""
    lines = running.get("/metrics")[1].decode().splitlines()
    found = [re.fullmatch(r"layer_streamer_(\S+) (\S+)", line) for line in lines]
    return {one[1]: float(one[2]) for one in found if one is not None}


def check_counts(before: dict[str, float], after: dict[str, float], crowd: Crowd) -> None:
    """Every request that was accepted has one end, and every reply a request."""

    def more(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    ended = sum(more(f'texts_total{{reason="{why}"}}') for why in ("stop", "length"))
    left = more('texts_total{reason="cancelled"}')
    assert more('texts_total{reason="error"}') == 0 == more('replies_total{status="500"}')
    assert ended + left == crowd.accepted, "each that was accepted has one end"
    counts = crowd.counts
    assert counts["answered"] <= ended <= counts["answered"] + counts["cut"] + counts["left"]
    assert 0 <= more('replies_total{status="400"}') - counts["malformed"] <= counts["left"]
    assert more('replies_total{status="429"}') >= crowd.counts["again"]


def open_engine() -> StreamedEngine:
    engine = StreamingEngine(
        smollm2(), device="cpu", max_batch=24, max_length=768, kv_tokens=6144, lookup=True
    )
    return StreamedEngine(engine, "smollm2")


@pytest.mark.slow
def test_a_crowd_for_minutes_loses_nothing_and_leaves_nothing_behind() -> None:
    faulthandler.cancel_dump_traceback_later()
    limits = Limits(max_waiting=140, drain_seconds=5)
    with serving(open_engine, limits=limits) as running:
        wait_for(lambda: running.worker.status == "ready")
        crowd, before = Crowd(running), counted(running)
        held = [Held.now()]
        for number in range(ROUNDS):
            asyncio.run(crowd.round(number, 60 * MINUTES / ROUNDS))
            check_nothing_is_left(running)
            held.append(Held.now())
            print(f"round {number + 1} of {ROUNDS}: {dict(crowd.counts)}, {held[-1]}", flush=True)
        after = counted(running)
        check_counts(before, after, crowd)
    warm = held[WARM:]
    slope = linear_regression([h.seconds for h in warm], [h.rss for h in warm]).slope
    growth = slope * (warm[-1].seconds - warm[0].seconds)
    counts, seconds = crowd.counts, sorted(crowd.seconds)
    requests = sum(counts[kind] for kind in ("answered", "cut", "malformed"))
    print(f"{MINUTES:g} minutes, {CLIENTS} clients: {requests} requests, {dict(counts)}")
    slowest, passes = seconds[len(seconds) * 99 // 100], after["pass_seconds_count"]
    print(f"an answer took {median(seconds):.1f} s, 99 of 100 at most {slowest:.1f}")
    print(f"{passes:.0f} passes of {after['pass_seconds_sum'] / passes:.2f} s")
    print(f"{crowd.tokens} tokens; memory grows by {growth / 2**20:+.1f} MiB by its slope")
    print(f"first {held[0]}\nwarm {warm[0]}\nend {warm[-1]}")
    assert counts["answered"] and counts["cut"] > requests / 4 and counts["malformed"]
    assert max(growth, warm[-1].rss - warm[0].rss) < MOST_GROWTH, "memory grows"
    assert warm[-1].descriptors <= warm[0].descriptors and warm[-1].threads <= warm[0].threads
