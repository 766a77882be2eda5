"""One connection: cut if its request does not come, or makes others wait for theirs."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .guarding.guarded import FULL
from .limits import Limits
from .replying.event_stream import ABORT

HEAD_SECONDS = 20.0
"""Within which the head of a request has to come."""
REST_SECONDS = 60.0
"""Within which the rest of a reply has to be read."""


class Connection(H11Protocol):
    """One that is closed if no request comes, or only the beginning of one.

    Beyond the limit a new one takes the place of the one that has kept the server waiting longest
    for a request, whole: so those that ask for nothing keep out nobody. Where all are being
    answered, the new one is closed.
    """

    _head: asyncio.TimerHandle | None = None
    _rest: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, limits: Limits, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limits, self._since = limits, 0.0

    @property
    def waits(self) -> bool:
        """True: it is the client's turn."""
        cycle = self.cycle
        answered = cycle is None or cycle.response_complete
        return (answered and not self.transport.get_write_buffer_size()) or (
            cycle is not None and cycle.more_body
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The first head has to come."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._since = self.loop.time()
        self._await_head()
        if len(self.connections) > self._limits.max_connections:
            self._longest_waiting().transport.abort()

    def data_received(self, data: bytes) -> None:
        """More of a request, or of several."""
        super().data_received(data)
        self._await_head()

    def handle_events(self) -> None:
        """Whoever answers may close the connection at once, and knows of too many requests."""
        super().handle_events()
        if self.scope is not None:
            extensions: dict[str, Any] = self.scope.setdefault("extensions", {})
            extensions[ABORT] = self.transport.abort
            extensions[FULL] = self._is_full()

    def on_response_complete(self) -> None:
        """What is not read of it does not keep a connection that is to close."""
        super().on_response_complete()
        self._since = self.loop.time()
        if self._rest is not None:
            self._rest.cancel()
        self._rest = self.loop.call_later(REST_SECONDS, self._abort_unread)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._stop()
        if self._rest is not None:
            self._rest.cancel()
        super().connection_lost(exc)

    def _others(self) -> list[Connection]:
        """All that are open and not about to close, itself among them."""
        found = [one for one in self.connections if isinstance(one, Connection)]
        return [one for one in found if not one.transport.is_closing()]

    def _longest_waiting(self) -> Connection:
        """Itself, if there is no other."""
        waiting = [one for one in self._others() if one.waits]
        return min(waiting, key=lambda one: one._since, default=self)

    def _is_full(self) -> bool:
        """True: so many others are being answered as may be."""
        most = self._limits.max_answered
        if len(self.connections) <= most:
            return False
        return sum(not one.waits for one in self._others() if one is not self) >= most

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
