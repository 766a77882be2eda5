"""A reply that goes on: sent as it comes, until it ends or nobody reads it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..limits import Limits
from .sse import HEADERS

ABORT = "layer_streamer.abort"
"""In a scope's extensions: closes the connection at once."""


async def has_left(receive: Receive) -> None:
    """Returns when the client has."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_left(making: Coroutine[Any, Any, Response], receive: Receive) -> Response:
    """A whole reply, of which the making is cancelled when the client leaves."""
    whole = asyncio.ensure_future(making)
    gone = asyncio.ensure_future(has_left(receive))
    try:
        await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
        return whole.result() if whole.done() else Response(status_code=499)  # which nobody reads
    finally:
        for task in (whole, gone):
            task.cancel()
        await asyncio.wait({whole, gone})


class EventStream(Response):
    """``leave()`` is called at the end, whatever it is: the stream's own, the client's leaving, or
    that it has not read for ``limits.send_seconds``."""

    def __init__(
        self, events: AsyncGenerator[bytes], leave: Callable[[], object], limits: Limits
    ) -> None:
        super().__init__(None, 200, HEADERS)
        del self.headers["content-length"]
        self._events, self._leave, self._limits = events, leave, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it."""
        gone = asyncio.ensure_future(has_left(receive))
        sending = asyncio.ensure_future(self._send(send))
        try:
            await asyncio.wait({gone, sending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._leave()
            for task in (gone, sending):
                task.cancel()
            await asyncio.wait({gone, sending})
            await self._events.aclose()
        if sending.cancelled():
            return
        try:
            sending.result()
        except TimeoutError:
            abort = scope.get("extensions", {}).get(ABORT)
            if abort is not None:
                abort()  # what was not read would keep the connection

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for body in self._events:
            await self._put(send, body)
        await self._put(send, b"", more=False)

    async def _put(self, send: Send, body: bytes, *, more: bool = True) -> None:
        async with asyncio.timeout(self._limits.send_seconds):
            await send({"type": "http.response.body", "body": body, "more_body": more})
