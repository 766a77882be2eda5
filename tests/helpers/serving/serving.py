"""A server in a thread of this process, and what talks with it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
from scripted_served import QUICK, ScriptedServed

from layer_streamer.llm.serving.app import make_app
from layer_streamer.llm.serving.guarding.guard import Guard
from layer_streamer.llm.serving.limits import Limits
from layer_streamer.llm.serving.metrics import Metrics
from layer_streamer.llm.serving.server import Server, bind
from layer_streamer.llm.serving.working.worker import Worker


class QuickServer(Server):
    """Looks ten times as often whether it is to end."""

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            await asyncio.sleep(0.01)


class Running:
    """A server that answers."""

    def __init__(self, engine: Any, server: Server, worker: Worker, port: int) -> None:
        self.engine, self.server, self.worker, self.port = engine, server, worker, port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> openai.OpenAI:
        given = {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | options
        return openai.OpenAI(**given)

    def connect(self, buffer: int | None = None) -> socket.socket:
        """A connection, which gives up after a time that no machine needs; ``buffer``: bytes that
        wait for who reads."""
        found = socket.socket()
        if buffer is not None:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        found.settimeout(60)
        found.connect(("127.0.0.1", self.port))
        return found

    def raw(self, data: bytes) -> bytes:
        """What comes for these bytes, until the server closes."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_all(connection)

    def post(self, path: str, body: Any, *headers: str) -> tuple[int, bytes]:
        """Status and body of a POST; ``body``: JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = ["content-type: application/json", *headers, f"content-length: {len(data)}"]
        return parted(self.raw(head("POST", path, *named) + data))

    def get(self, path: str, *headers: str) -> tuple[int, bytes]:
        """Status and body of a GET."""
        return parted(self.raw(head("GET", path, *headers)))


def head(method: str, path: str, *headers: str, host: str = "localhost") -> bytes:
    """The head of a request, after which the server is to close."""
    lines = [f"{method} {path} HTTP/1.1", f"host: {host}", "connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape")


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def parted(reply: bytes) -> tuple[int, bytes]:
    """Status and body of a reply; chunks are joined."""
    top, _, body = reply.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in top.lower():
        rest, body = body, b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size, 16)
            body, rest = body + rest[:length], rest[length + 2 :]
    return int(top.split()[1]), body


def events(body: bytes) -> list[Any]:
    """The documents of a stream; fails for what is no event, or does not end with [DONE]."""
    lines = [line for line in body.decode("ascii").split("\n\n") if line]
    assert all(line.startswith(("data: ", ": ")) for line in lines)
    data = [line[6:] for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]" or "error" in json.loads(data[-1])
    return [json.loads(line) for line in data if line != "[DONE]"]


@contextmanager
def serving(
    engine: Any = None, *, limits: Limits = QUICK, guard: Guard | None = None
) -> Iterator[Running]:
    """A server of an engine (or of what opens one), which has been opened."""
    engine = ScriptedServed() if engine is None else engine
    open_engine = engine if callable(engine) else lambda: engine
    metrics = Metrics()
    worker = Worker(open_engine, limits, metrics)
    app = make_app(worker, guard or Guard(), limits, metrics, embeddings=True)
    server = QuickServer(app, worker, limits)
    listening = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        running = Running(engine, server, worker, listening.getsockname()[1])
        wait_for(lambda: server.started and (worker.status == "ready" or callable(engine)))
        yield running
    finally:
        if isinstance(engine, ScriptedServed) and engine.passes is not None:
            engine.passes.release(10_000)
        server.end()
        thread.join(60)
        assert not thread.is_alive(), "the server does not end"


def wait_for(condition: Any) -> None:
    """Wait for what comes by itself."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
