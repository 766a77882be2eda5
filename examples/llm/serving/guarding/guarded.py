"""The guard in front of an app: bodies are read here, whole and within limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..api_error import ApiError
from ..limits import Limits
from ..replying.sse import to_json
from .guard import OPEN, Guard, check_depth

FULL = "layer_streamer.full"
"""In a request's extensions: as many others are being answered as may be at a time."""


def error_reply(error: ApiError) -> Response:
    """An error as a whole reply."""
    return Response(
        to_json(error.body),
        error.status,
        {"cache-control": "no-store"} | error.headers,
        media_type="application/json",
    )


class Guarded:
    """ASGI middleware. The app finds who asks in ``scope["state"]["owner"]``."""

    def __init__(
        self, app: ASGIApp, guard: Guard, limits: Limits, hear: Callable[[int], object]
    ) -> None:
        """``hear`` gets the status of each reply."""
        self._app, self._guard, self._limits, self._hear = app, guard, limits, hear

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer with what is wrong with it."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await self._answer(scope, receive, self._heard(send))

    def _heard(self, send: Send) -> Send:
        async def heard(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._hear(message["status"])
            await send(message)

        return heard

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
        try:
            owner = self._guard.check(scope["method"], scope["path"], headers)
            if scope.get("extensions", {}).get(FULL) and scope["path"] not in OPEN:
                raise ApiError(
                    503, "too many requests at a time: try again", code="connections",
                    headers={"retry-after": "1"},
                )  # fmt: skip
            if scope["method"] == "POST":
                receive = replay(await self._body(headers, receive), receive)
        except ApiError as error:
            await error_reply(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["owner"] = owner
        await self._app(scope, receive, send)

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        most = self._limits.max_body
        too_large = ApiError(413, f"the body has more than {most} bytes", code="too_large")
        told = headers.get("content-length", "0")
        if not told.isdigit() or len(told) > 18 or int(told) > most:
            raise too_large
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                body = await _whole(receive, most)
        except TimeoutError as error:
            raise ApiError(408, "the body did not come in time") from error
        if body is None:
            raise too_large
        check_depth(body, self._limits.max_depth)
        return body


async def _whole(receive: Receive, most: int) -> bytes | None:
    """A body; None for one that is longer."""
    parts, length, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client has left")
        parts.append(message.get("body", b""))
        length += len(parts[-1])
        if length > most:
            return None
        more = message.get("more_body", False)
    return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """Gives a body that has been read, then what comes."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
