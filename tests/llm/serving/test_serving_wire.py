"""What goes over the wire: framing, cut connections, slow readers, and what is no request."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
from scripted_served import ScriptedServed
from serving import Running, events, head, parted, read_all, serving, wait_for

from layer_streamer.llm.serving.guarding.guard import Guard
from layer_streamer.llm.serving.limits import Limits
from layer_streamer.llm.serving.server import bind

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "a bc 😀"}]}
STREAM = HI | {"stream": True}
JSON = "content-type: application/json"
KEPT = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
"""After it the connection stays open."""


def error(body: bytes) -> Any:
    found = json.loads(body)["error"]
    assert set(found) == {"message", "type", "param", "code"} and "\n" not in found["message"]
    return found


def test_a_stream_is_events_up_to_done(server: Running) -> None:
    reply = server.raw(head("POST", CHAT, JSON, f"content-length: {len(json.dumps(STREAM))}")
                       + json.dumps(STREAM).encode())  # fmt: skip
    top = reply.partition(b"\r\n\r\n")[0].lower()
    assert b"content-type: text/event-stream; charset=utf-8" in top
    assert b"cache-control: no-cache" in top and b"x-accel-buffering: no" in top
    assert b"server:" not in top
    status, body = parted(reply)
    chunks = events(body)
    assert status == 200 and body.endswith(b"data: [DONE]\n\n")
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert text == "a bc 😀 " and chunks[0]["choices"][0]["delta"]["role"] == "assistant"


def test_pings_come_while_there_is_nothing_to_say() -> None:
    engine = ScriptedServed(gate=True)
    with serving(engine, limits=Limits(ping_seconds=0.01)) as running, running.connect() as wire:
        data = json.dumps(STREAM).encode()
        wire.sendall(head("POST", CHAT, JSON, f"content-length: {len(data)}") + data)
        seen = b""
        while seen.count(b": ping\n\n") < 3:
            seen += wire.recv(65536)
        assert b'"role":"assistant"' in seen
        engine.passes.release(9)  # type: ignore[union-attr]
        assert parted(seen + read_all(wire))[1].endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("body", [HI, STREAM])
def test_a_cut_connection_frees_its_row(body: dict[str, Any]) -> None:
    engine = ScriptedServed(gate=True)
    with serving(engine) as running:
        data = json.dumps(body).encode()
        with running.connect() as wire:
            wire.sendall(head("POST", CHAT, JSON, f"content-length: {len(data)}") + data)
            assert engine.submitted.acquire(timeout=60)
        wait_for(lambda: engine.cancelled and not engine.running)
        assert running.get("/health")[0] == 200


def test_a_reader_that_stands_still_is_cut_off_and_stalls_nobody() -> None:
    words = " ".join(["x" * 100_000] * 60)
    engine = ScriptedServed(length=10**8)
    limits = Limits(send_seconds=0.1, max_prompt=1 << 26)
    with serving(engine, limits=limits) as running, running.connect(4096) as wire:
        data = json.dumps(STREAM | {"messages": [{"role": "user", "content": words}]}).encode()
        wire.sendall(head("POST", CHAT, JSON, f"content-length: {len(data)}") + data)
        assert engine.submitted.acquire(timeout=60)
        status, body = running.post(CHAT, HI)
        assert status == 200 and json.loads(body)["choices"][0]["message"]["content"] == "a bc 😀 "
        wait_for(lambda: not running.worker._answers)
        wait_for(lambda: not running.server.server_state.connections)


def test_a_whole_reply_that_is_not_read_does_not_keep_its_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("layer_streamer.llm.serving.connection.REST_SECONDS", 0.1)
    words = "x" * 6_000_000
    limits = Limits(max_prompt=1 << 26)
    engine = ScriptedServed(length=10**8)
    with serving(engine, limits=limits) as running, running.connect(4096) as wire:
        data = json.dumps({"prompt": words}).encode()
        length = f"content-length: {len(data)}"
        wire.sendall(head("POST", "/v1/completions", JSON, length) + data)
        wait_for(lambda: engine.orders and not running.worker._answers)
        wait_for(lambda: not running.server.server_state.connections)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 400, ""), (b"{", 400, "JSON"), (b"\xff\xfe", 400, "UTF-8"), (b"[1]", 400, ""),
        (b"null", 400, ""), (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, ""),
        (b"[" * 100_000, 400, "deeper"), (b'{"messages": 1e999}', 400, "messages"),
        (b'{"messages": [{"role": "user", "content": "a"}], "n": ' + b"9" * 5000 + b"}", 400, ""),
        (b'{"messages": [{"role": "user", "content": "a"}], "seed": NaN}', 400, "seed"),
    ],
)  # fmt: skip
def test_bodies_that_are_no_request_are_refused_in_openais_shape(
    server: Running, body: bytes, status: int, says: str
) -> None:
    got, reply = server.post(CHAT, body)
    assert got == status
    if status != 200:
        assert says in error(reply)["message"] and error(reply)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (head("POST", CHAT, "content-type: text/plain", "content-length: 2") + b"{}", 415),
        (head("POST", CHAT, "content-type: application/x-www-form-urlencoded",
              "origin: https://evil.example", "content-length: 3") + b"a=b", 403),
        (head("GET", "/v1/models", host="evil.example"), 403),
        (head("GET", "/v1/models", "origin: null"), 403),
        (head("GET", "/v1/models", "sec-fetch-site: cross-site"), 403),
        (head("OPTIONS", CHAT, "origin: https://evil.example",
              "access-control-request-method: POST"), 403),
        (head("DELETE", CHAT), 405), (head("GET", CHAT), 405), (head("GET", "/docs"), 404),
        (head("GET", "/redoc"), 404), (head("GET", "/../etc/passwd"), 404),
        (head("POST", CHAT, JSON, "content-length: 9999999999"), 413),
    ],
)  # fmt: skip
def test_what_may_not_be_asked_is_refused(server: Running, request_: bytes, status: int) -> None:
    got, body = parted(server.raw(request_))
    assert got == status
    assert error(body)["message"]


def test_what_is_no_http_gets_an_answer_and_the_server_lives(server: Running) -> None:
    for data in (b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
                 head("GET", "/", "host: again")):  # fmt: skip
        assert server.raw(data).startswith(b"HTTP/1.1 4")
    assert server.get("/health")[0] == 200


def test_a_body_in_chunks_that_grows_too_large_is_cut_off() -> None:
    with serving(limits=Limits(max_body=1000)) as running:
        chunk = b"400\r\n" + b"[" + b" " * 1023 + b"\r\n"
        data = head("POST", CHAT, JSON, "transfer-encoding: chunked") + chunk * 3
        status, body = parted(running.raw(data))
        assert status == 413 and error(body)["code"] == "too_large"


def test_two_requests_in_one_go_are_answered_in_their_order(server: Running) -> None:
    data = json.dumps(HI).encode()
    first = (f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n{JSON}\r\n"
             f"content-length: {len(data)}\r\n\r\n").encode() + data  # fmt: skip
    reply = server.raw(first + head("GET", "/v1/models"))
    assert reply.index(b"chat.completion") < reply.index(b'"object":"list"')


def test_a_head_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layer_streamer.llm.serving.connection.HEAD_SECONDS", 0.05)
    with serving() as running:
        for before, beginning in ((b"", b""), (b"", b"GET /hea"), (KEPT, b"GET /hea")):
            with running.connect() as wire, suppress(ConnectionResetError):
                if before:
                    wire.sendall(before)
                    assert wire.recv(65536).startswith(b"HTTP/1.1 200")
                wire.sendall(beginning)
                read_all(wire)
        wait_for(lambda: not running.server.server_state.connections)


def test_pages_of_a_named_site_may_ask_and_are_told_so() -> None:
    with serving(guard=Guard(origins=["https://chat.example"])) as running:
        asks = "access-control-request-headers: authorization, x-stainless-os"
        reply = running.raw(head("OPTIONS", CHAT, "origin: https://chat.example",
                                 "access-control-request-method: POST", asks))  # fmt: skip
        assert reply.startswith(b"HTTP/1.1 200") and b"x-stainless-os" in reply
        reply = running.raw(head("GET", "/v1/models", "origin: https://chat.example"))
        assert b"access-control-allow-origin: https://chat.example" in reply
        assert running.get("/v1/models", "origin: https://other.example")[0] == 403


def test_the_description_is_there_and_names_every_path(server: Running) -> None:
    status, body = server.get("/openapi.json")
    assert status == 200
    assert {CHAT, "/v1/completions", "/v1/models", "/health", "/metrics", "/tokenize",
            "/detokenize"} <= set(json.loads(body)["paths"])  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings", "/detokenize"])
def test_an_object_without_what_must_be_there_is_told_what(server: Running, path: str) -> None:
    status, body = server.post(path, {})
    found = error(body)
    assert status == 400 and found["code"] == "missing_required_parameter"
    assert found["param"] in ("messages", "prompt", "input", "tokens")
    for empty in (b"", b"null"):
        assert error(server.post(path, empty)[1])["code"] == "invalid_json"


def test_tokens_and_texts_go_to_and_fro(server: Running) -> None:
    status, body = server.post("/tokenize", {"content": "hé", "add_special": True})
    assert status == 200 and json.loads(body) == {"tokens": [1, 104, 233], "count": 3}
    status, body = server.post("/detokenize", {"tokens": [104, 233]})
    assert status == 200 and json.loads(body) == {"content": "hé"}
    assert server.post("/detokenize", {"tokens": [1 << 40]})[0] == 400


def test_what_is_counted_is_told(server: Running) -> None:
    server.post(CHAT, HI)
    status, body = server.get("/metrics")
    lines = dict(line.rsplit(" ", 1) for line in body.decode().splitlines() if line[0] != "#")
    assert status == 200 and float(lines["layer_streamer_pass_seconds_count"]) >= 3
    assert float(lines['layer_streamer_texts_total{reason="stop"}']) >= 1
    assert float(lines["layer_streamer_kv_tokens"]) == 4096
    assert float(lines['layer_streamer_replies_total{status="200"}']) >= 1


class OneVectorAtATime(ScriptedServed):
    """Waits before each."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.asked, self.goes_on = 0, threading.Event(), threading.Event()

    def embed(self, prompts: Sequence[Sequence[int]]) -> Iterator[Sequence[float]]:
        for _ in prompts:
            self.made += 1
            self.asked.set()
            assert self.goes_on.wait(60)
            yield [1.0]


def test_a_client_that_leaves_is_made_no_more_vectors_for() -> None:
    engine = OneVectorAtATime()
    with serving(engine) as running:
        with running.connect() as wire:
            data = json.dumps({"input": ["a"] * 99}).encode()
            wire.sendall(
                head("POST", "/v1/embeddings", JSON, f"content-length: {len(data)}") + data
            )
            assert engine.asked.wait(60)
        wait_for(lambda: not running.worker._pending)
        engine.goes_on.set()
        assert running.post(CHAT, HI)[0] == 200 and engine.made == 1


def test_while_the_model_opens_health_says_so_and_orders_are_refused() -> None:
    opens, engine = threading.Event(), ScriptedServed()

    def open_engine() -> ScriptedServed:
        assert opens.wait(60)
        return engine

    with serving(open_engine) as running:
        try:
            status, body = running.get("/health")
            assert (status, error(body)["message"]) == (503, "Loading model")
            assert running.post(CHAT, HI)[0] == 503
        finally:
            opens.set()
        wait_for(lambda: running.get("/health")[0] == 200)


def test_a_server_that_is_told_to_end_lets_texts_go_on_and_takes_no_more() -> None:
    engine = ScriptedServed(gate=True)
    with serving(engine) as running, running.connect() as wire:
        data = json.dumps(STREAM).encode()
        wire.sendall(head("POST", CHAT, JSON, f"content-length: {len(data)}") + data)
        assert engine.submitted.acquire(timeout=60)
        running.server.end()
        wait_for(lambda: running.worker.status == "draining")
        assert running.get("/health")[0] == 503 and running.post(CHAT, HI)[0] == 503
        engine.passes.release(9)  # type: ignore[union-attr]
        assert read_all(wire).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert engine.closed.is_set() and not engine.cancelled


def test_what_has_not_ended_in_time_is_told_why() -> None:
    engine = ScriptedServed(gate=True)
    with serving(engine, limits=Limits(drain_seconds=0.05)) as running, running.connect() as wire:
        data = json.dumps(STREAM).encode()
        wire.sendall(head("POST", CHAT, JSON, f"content-length: {len(data)}") + data)
        assert engine.submitted.acquire(timeout=60)
        running.server.end()
        last = events(parted(read_all(wire))[1])[-1]
        assert last["error"]["code"] == "draining"
    assert engine.closed.is_set()


def test_a_second_signal_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layer_streamer.llm.serving.server.CUT_SECONDS", 1)
    engine = ScriptedServed(gate=True)
    with serving(engine) as running, running.connect() as wire:
        data = json.dumps(STREAM).encode()
        wire.sendall(head("POST", CHAT, JSON, f"content-length: {len(data)}") + data)
        assert engine.submitted.acquire(timeout=60)
        running.server.handle_exit(signal.SIGTERM, None)
        wait_for(lambda: running.worker.status == "draining")
        running.server.handle_exit(signal.SIGTERM, None)
        assert b"[DONE]" not in read_all(wire)
        wait_for(engine.closed.is_set)


def test_an_engine_that_breaks_ends_the_server() -> None:
    with serving() as running:
        status, body = running.post(CHAT, {"messages": [{"role": "user", "content": "a BREAK"}]})
        assert status == 500 and error(body)["type"] == "server_error"
        wait_for(lambda: running.server.should_exit)


def test_an_address_that_is_taken_is_named() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1:{port}: cannot listen there"):
            bind("127.0.0.1", port)
