"""Many clients at a time: none is lost, none is answered twice, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from byte_model import byte_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_served import ScriptedServed
from serving import Running, events, head, parted, serving, wait_for
from small_engine import make_engine

from layer_streamer.llm.serving.limits import Limits
from layer_streamer.llm.serving.streamed import StreamedEngine

CHAT = "/v1/chat/completions"
JSON = "content-type: application/json"


async def speak(port: int, body: bytes, cut_after: int | None = None) -> tuple[int, bytes]:
    """Status and all that comes; ``cut_after``: leave after so many bytes. 0 if nothing came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head("POST", CHAT, JSON, f"content-length: {len(body)}") + body)
        await writer.drain()
        data = b""
        while cut_after is None or len(data) < cut_after:
            part = await reader.read(65536)
            if not part:
                break
            data += part
    finally:
        writer.close()
    return (int(data.split()[1]) if data.startswith(b"HTTP") else 0), data


def body_of(number: int, *, stream: bool) -> bytes:
    text = " ".join(f"w{number}.{k}" for k in range(1 + number % 7))
    return json.dumps(
        {"messages": [{"role": "user", "content": text}], "stream": stream, "max_tokens": 8}
    ).encode()


async def crowd(port: int, clients: int, requests: int, seed: int) -> Counter[str]:
    """Of so many clients at a time, some are cut midway and some malformed."""
    found: Counter[str] = Counter()
    numbers = iter(range(requests))
    draw = random.Random(seed)

    async def client() -> None:
        for number in numbers:
            kind, stream = draw.random(), draw.random() < 0.5
            if kind < 0.1:
                status, _ = await speak(port, b'{"messages": [{"role"')
                assert status == 400
                found["malformed"] += 1
            elif kind < 0.43:
                await speak(port, body_of(number, stream=True), cut_after=draw.randrange(1, 600))
                found["cut"] += 1
            else:
                status, data = await speak(port, body_of(number, stream=stream))
                while status == 429:
                    found["again"] += 1
                    await asyncio.sleep(0.01)
                    status, data = await speak(port, body_of(number, stream=stream))
                assert status == 200, data
                assert data.count(b"[DONE]") == stream
                found["answered"] += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


def left_behind(running: Running) -> list[Any]:
    """What should be nothing, when all have gone."""
    worker = running.worker
    state = running.server.server_state
    return [*worker._answers, *state.connections, *state.tasks, worker._accepted, *worker._handed]


def test_a_crowd_that_comes_and_goes_leaves_nothing_behind() -> None:
    engine = ScriptedServed(rows=4)
    with serving(engine, limits=Limits(max_waiting=8)) as running:
        found = asyncio.run(crowd(running.port, 12, 120, seed=1))
        wait_for(lambda: not engine.running and not engine.waiting)
        wait_for(lambda: not any(left_behind(running)))
    assert found["answered"] + found["cut"] + found["malformed"] == 120


@pytest.mark.slow
def test_two_thousand_requests_of_two_hundred_clients_on_a_real_engine(tmp_path: Path) -> None:
    path = byte_model(tmp_path)
    process = psutil.Process()

    def open_engine() -> StreamedEngine:
        engine = make_engine(path, max_batch=16, kv_tokens=4096, max_length=192)
        return StreamedEngine(engine, "bytes")

    with serving(open_engine, limits=Limits(max_waiting=64)) as running:
        wait_for(lambda: running.worker.status == "ready")
        sizes = []
        for seed in range(4):
            found = asyncio.run(crowd(running.port, 200, 500, seed))
            assert sum(found.values()) - found["again"] == 500
            wait_for(lambda: not any(left_behind(running)))
            wait_for(lambda: not running.worker.load.rows)
            gc.collect()
            sizes.append((process.memory_info().rss, process.num_fds(), threading.active_count()))
        served = running.worker.engine
        assert isinstance(served, StreamedEngine)
        assert not served._requests and not list(served._engine._runner.kv.rows)
    assert sizes[-1][0] - sizes[1][0] < 32 << 20, "memory grows"
    assert sizes[-1][1:] == sizes[1][1:], "descriptors or threads grow"


@pytest.mark.slow
def test_texts_of_64_clients_of_which_some_vanish_are_the_engines(tmp_path: Path) -> None:
    path = byte_model(tmp_path)
    options: dict[str, Any] = {
        "max_batch": 16, "kv_tokens": 4096, "max_length": 192, "reproducible": True,
    }  # fmt: skip

    def ask(number: int) -> dict[str, Any]:
        return {
            "messages": [{"role": "user", "content": "text " * (1 + number % 9) + str(number)}],
            "max_tokens": 3 + number % 20, "temperature": number % 2, "seed": number,
        }  # fmt: skip

    async def main(port: int) -> list[tuple[int, bytes]]:
        cuts = [100 * (number % 7) if number % 3 == 0 else None for number in range(64)]
        bodies = [json.dumps(ask(number) | {"stream": True}).encode() for number in range(64)]
        return await asyncio.gather(
            *(speak(port, body, cut) for body, cut in zip(bodies, cuts, strict=True))
        )

    with serving(
        lambda: StreamedEngine(make_engine(path, **options), "bytes"), limits=Limits()
    ) as running:
        wait_for(lambda: running.worker.status == "ready")
        found = asyncio.run(main(running.port))
    with make_engine(path, **options) as engine:
        for number, (_, data) in enumerate(found):
            if number % 3 == 0:
                continue
            asked = ask(number)
            alone = engine.generate(
                [asked["messages"]], max_new_tokens=asked["max_tokens"], seed=number,
                temperature=asked["temperature"],
            )  # fmt: skip
            chunks = events(parted(data)[1])
            deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
            assert ["".join(deltas)] == alone


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 1 << 70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def described(server: Running) -> dict[str, list[str]]:
    """Paths that take a body, each with the fields that /openapi.json names."""
    document = json.loads(server.get("/openapi.json")[1])
    found = {}
    for path, methods in document["paths"].items():
        if "post" in methods:
            reference = methods["post"]["requestBody"]["content"]["application/json"]["schema"]
            name = reference["$ref"].rsplit("/", 1)[1]
            found[path] = sorted(document["components"]["schemas"][name]["properties"])
    return found


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_is_sent_gets_an_answer_in_the_protocols_shape(
    server: Running, described: dict[str, list[str]], data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from(sorted(described)))
    fields = data.draw(st.dictionaries(st.sampled_from(described[path]), VALUES, max_size=4))
    basis: dict[str, Any] = {
        CHAT: {"messages": [{"role": "user", "content": "a"}]},
        "/v1/completions": {"prompt": "a"}, "/tokenize": {"content": "a"},
        "/detokenize": {"tokens": [97]}, "/v1/embeddings": {"input": "a"},
    }[path]  # fmt: skip
    status, reply = server.post(path, basis | fields)
    assert status in (200, 400), reply
    if status == 400:
        assert set(json.loads(reply)) == {"error"}


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(data=st.data())
def test_much_that_is_sent_gets_an_answer_in_the_protocols_shape(
    server: Running, described: dict[str, list[str]], data: st.DataObject
) -> None:
    test_whatever_is_sent_gets_an_answer_in_the_protocols_shape.hypothesis.inner_test(  # type: ignore[attr-defined]
        server, described, data
    )
