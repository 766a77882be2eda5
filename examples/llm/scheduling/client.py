"""One call's requests on their way through a scheduler that others use as well."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable

from ..request import Event, Request
from .events import Events
from .scheduler import Scheduler


class Client:
    """Offers requests as there is room for them, and hears of these.

    Whoever asks a client for its next event has passes done while there is none; the events of
    others wait in theirs. Thread rules: that of the passes.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        requests: Iterable[Request],
        on_layer: Callable[[int], object] | None = None,
    ) -> None:
        """``requests`` are taken one by one, while events are asked for: the next one when those
        before it have been let in. ``on_layer`` hears of the layers of the first one's first
        pass."""
        self._scheduler, self._requests = scheduler, iter(requests)
        self._on_layer = on_layer
        self._events = Events()
        self._open: list[Request] = []
        """Those whose last event has not been given out; the last one may be waiting."""
        self._all_offered = False
        self._asking_failed: Exception | None = None

    def events(self) -> Generator[Event]:
        """Every event, until all requests have ended; to be asked for once.

        Raises what ended a request that is not its own; and what the iterator of requests has
        raised, when those that it gave before have ended. When it is left, what has not ended is
        cancelled.
        """
        try:
            while True:
                if not self._events:
                    self._offer()
                if self._events:
                    request, piece = self._take()
                    if request in self._open:
                        if request.finish_reason is not None:
                            self._open.remove(request)
                        yield request, piece
                elif self._open or not self._all_offered:
                    self._scheduler.step()
                else:
                    break
        finally:
            for request in self._open:
                self._scheduler.cancel(request)
        if self._asking_failed is not None:
            raise self._asking_failed

    def _offer(self) -> None:
        """Submit requests, until one has to wait or there is an event."""
        while not self._all_offered and not self._events and not self._scheduler.is_full:
            if self._open and self._open[-1].waits:
                return
            try:
                request = next(self._requests, None)
            except Exception as error:
                self._asking_failed, request = error, None
            if request is None:
                self._all_offered = True
                return
            if request.error is None:
                request.on_layer, self._on_layer = self._on_layer, None
            self._open.append(request)
            self._scheduler.submit(request, self._events)

    def _take(self) -> Event:
        request, piece = self._events.take()
        if request.raises:
            assert request.error is not None
            raise request.error
        return request, piece
