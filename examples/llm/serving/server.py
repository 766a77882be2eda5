"""The server around an app: connections that hang are cut, and it ends in good order."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import Limits
from .replying.event_stream import ABORT
from .working.worker import Worker

HEAD_SECONDS = 20.0
"""Within which the head of a request has to come."""
REST_SECONDS = 60.0
"""Within which the rest of a reply has to be read."""
KEEP_ALIVE_SECONDS = 5
CUT_SECONDS = 5
"""For which a server that has ended waits for connections to close."""


class Connection(H11Protocol):
    """One that is closed if no request comes, or only the beginning of one."""

    _head: asyncio.TimerHandle | None = None
    _rest: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The first head has to come."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """More of a request, or of several."""
        super().data_received(data)
        self._await_head()

    def handle_events(self) -> None:
        """Whoever answers may close the connection at once."""
        super().handle_events()
        if self.scope is not None:
            extensions: dict[str, Any] = self.scope.setdefault("extensions", {})
            extensions[ABORT] = self.transport.abort

    def on_response_complete(self) -> None:
        """What is not read of it does not keep a connection that is to close."""
        super().on_response_complete()
        if self._rest is not None:
            self._rest.cancel()
        self._rest = self.loop.call_later(REST_SECONDS, self._abort_unread)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._stop()
        if self._rest is not None:
            self._rest.cancel()
        super().connection_lost(exc)

    def _abort_unread(self) -> None:
        if self.transport.is_closing():
            self.transport.abort()

    def _await_head(self) -> None:
        """Give a head its time, from its first byte on; between requests uvicorn's own applies."""
        waits = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None
        if not waits or self.transport.is_closing():
            self._stop()
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _stop(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


class Server(uvicorn.Server):
    """Ends when it is told to, or when its engine does. The first signal lets texts go on for a
    while, and what comes meanwhile is told that the server is about to end; the second cuts."""

    def __init__(self, app: FastAPI, worker: Worker, limits: Limits, **options: Any) -> None:
        """``options``: uvicorn's, such as host and port."""
        config = uvicorn.Config(
            app, http=Connection, ws="none", lifespan="on", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CUT_SECONDS, **options,
        )  # fmt: skip
        super().__init__(config)
        self._worker, self._limits = worker, limits
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve, also while the engine opens."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._watching = asyncio.create_task(self._end_in_order())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal."""
        if self._told.is_set() or self._loop is None:
            super().handle_exit(sig, frame)
        else:
            self.end()

    def end(self) -> None:
        """As the first signal does; nothing for one that has ended. Any thread."""
        if self._loop is not None:
            with suppress(RuntimeError):  # its loop is closed
                self._loop.call_soon_threadsafe(self._told.set)

    async def _end_in_order(self) -> None:
        told = [asyncio.create_task(event.wait()) for event in (self._told, self._worker.ended)]
        await asyncio.wait(told, return_when=asyncio.FIRST_COMPLETED)
        for task in told:
            task.cancel()
        await self._worker.drain(self._limits.drain_seconds)
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A listening address; OSError, which names it, for one that cannot be had. 0: any port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise OSError(f"{host}:{port}: cannot listen there ({error.strerror or error})") from error
    return found
