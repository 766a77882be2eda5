"""What a client has not heard yet of its requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..request import Event, Request


class Events:
    """One client's, of each request one at most: what several passes bring is one piece of text.

    So a client that does not ask for a while takes no more memory than its requests' texts, and the
    event of a request that has ended is its last. Whoever holds this is a client: the requests of
    one that is gone are cancelled. Thread rules: one thread.
    """

    def __init__(self) -> None:
        self._pieces: dict[Request, str] = {}

    def __bool__(self) -> bool:
        """True: there is one."""
        return bool(self._pieces)

    def put(self, request: Request, piece: str) -> None:
        """A request's next piece of text, perhaps none."""
        self._pieces[request] = self._pieces.get(request, "") + piece

    def take(self) -> Event:
        """The one that has waited longest, of those that are there."""
        request = next(iter(self._pieces))
        return request, self._pieces.pop(request)
