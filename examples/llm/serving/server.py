"""The server around an app, which ends in good order."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from .connection import Connection
from .limits import Limits
from .working.worker import Worker

KEEP_ALIVE_SECONDS = 5
BACKLOG = 128
"""Connections that are accepted in one go, before any is looked at, and that wait to be."""
CUT_SECONDS = 5
"""For which a server that has ended waits for connections to close."""


class Server(uvicorn.Server):
    """Ends when it is told to, or when its engine does. The first signal lets texts go on for a
    while, and what comes meanwhile is told that the server is about to end; the second cuts."""

    def __init__(self, app: FastAPI, worker: Worker, limits: Limits, **options: Any) -> None:
        """``options``: uvicorn's, such as host and port."""
        http: Any = partial(Connection, limits=limits)
        config = uvicorn.Config(
            app, http=http, ws="none", lifespan="on", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CUT_SECONDS, backlog=BACKLOG, **options,
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
