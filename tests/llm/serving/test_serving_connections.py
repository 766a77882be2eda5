"""However many connect, whoever has asked gets an answer, and the server stays within its limit."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress

import pytest
from scripted_served import ScriptedServed
from serving import Running, head, read_all, serving, wait_for

from layer_streamer.llm.serving.limits import Limits

CHAT = "/v1/chat/completions"
JSON = "content-type: application/json"
MOST = 16
ANSWERED = MOST - 1
"""One is kept for /health."""
LIMITS = Limits(max_connections=MOST, max_waiting=64, drain_seconds=5)
HI = json.dumps({"messages": [{"role": "user", "content": "a b"}], "stream": True}).encode()
HALF_A_HEAD = b"GET /health HTTP/1.1\r\nhost: loc"
HALF_A_BODY = head("POST", CHAT, JSON, "content-length: 99") + b'{"mess'
KEPT = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
"""After it the connection stays open."""


@pytest.fixture
def wires() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def connected(
    running: Running, wires: ExitStack, count: int, data: bytes = b""
) -> list[socket.socket]:
    """So many connections that send this and no more."""
    found = []
    for _ in range(count):
        wire = wires.enter_context(running.connect())
        with suppress(ConnectionError):
            wire.sendall(data)
        found.append(wire)
    return found


def asked(running: Running, wires: ExitStack, count: int) -> Sequence[socket.socket]:
    """So many that have asked for a text, which does not come yet."""
    data = head("POST", CHAT, JSON, f"content-length: {len(HI)}") + HI
    found = connected(running, wires, count, data)
    for _ in range(count):
        assert running.engine.submitted.acquire(timeout=60)
    return found


def is_cut(wire: socket.socket) -> bool:
    """True once the server has closed it, without a word."""
    try:
        return wire.recv(1) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("data", [b"", HALF_A_HEAD, HALF_A_BODY, KEPT])
def test_those_that_do_not_ask_make_room_for_one_that_does(data: bytes, wires: ExitStack) -> None:
    with serving(limits=LIMITS) as running:
        idle = connected(running, wires, 3 * MOST, data)
        for _ in range(3):
            assert running.get("/health")[0] == 200
            assert running.post(CHAT, HI)[0] == 200
        assert len(running.server.server_state.connections) <= MOST
        if data is not KEPT:
            assert all(map(is_cut, idle[: 2 * MOST]))
        wires.close()  # or the server would wait for the bodies


def test_beyond_the_limit_health_is_answered_and_others_are_told_to_come_back(
    wires: ExitStack,
) -> None:
    engine = ScriptedServed(gate=True, rows=2)
    with serving(engine, limits=LIMITS) as running:
        texts = asked(running, wires, ANSWERED)
        for _ in range(3):
            reply = running.raw(head("POST", CHAT, JSON, f"content-length: {len(HI)}") + HI)
            assert reply.startswith(b"HTTP/1.1 503") and b"retry-after: " in reply.lower()
            assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == "connections"
            assert running.get("/health")[0] == 200
        engine.passes.release(1000)  # type: ignore[union-attr]
        for wire in texts:
            assert read_all(wire).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert running.post(CHAT, HI)[0] == 200


def test_those_that_have_asked_are_not_cut_for_those_that_have_not(wires: ExitStack) -> None:
    engine = ScriptedServed(gate=True, rows=2)
    with serving(engine, limits=LIMITS) as running:
        texts = asked(running, wires, ANSWERED)
        for data in (b"", HALF_A_HEAD, HALF_A_BODY):
            connected(running, wires, MOST, data)
        assert running.get("/health")[0] == 200
        wait_for(lambda: len(running.server.server_state.connections) <= MOST)
        engine.passes.release(1000)  # type: ignore[union-attr]
        for wire in texts:
            assert read_all(wire).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_a_reply_that_is_being_read_is_not_cut_for_those_that_wait(wires: ExitStack) -> None:
    engine = ScriptedServed(length=10**8)
    limits = Limits(max_connections=MOST, max_prompt=1 << 26, drain_seconds=5)
    with serving(engine, limits=limits) as running:
        body = json.dumps({"prompt": "x" * 6_000_000}).encode()
        wire = wires.enter_context(running.connect(4096))
        wire.sendall(head("POST", "/v1/completions", JSON, f"content-length: {len(body)}") + body)
        wait_for(lambda: engine.orders and not running.worker._answers)
        connected(running, wires, 2 * MOST, HALF_A_HEAD)
        assert running.get("/health")[0] == 200
        assert len(read_all(wire)) > 6_000_000
