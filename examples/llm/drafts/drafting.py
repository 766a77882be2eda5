"""When a row is drafted for, and how far; what came of it. The drafter itself only proposes."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from ..request import Request
from .drafter import Drafter

logger = logging.getLogger(__name__)

MOST_DRAFTED = 64
"""Tokens of all rows' drafts together in a pass. A pass over streamed weights costs the same for so
many as for one, wherever it was measured (docs/benchmarks)."""


class Drafting:
    """Asks a drafter for the rows that decode.

    What a drafter raises costs its draft, and nothing else. Thread rules: that of the passes.
    """

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter

    def propose(self, running: Iterable[Request], spare: int) -> None:
        """Give each row that takes one token a draft, if there is one. ``spare``: tokens that the
        pass has room for beside what it takes anyway."""
        rows = [request for request in running if request.new_ids and request.behind == 1]
        if not rows:
            return
        each = min(MOST_DRAFTED, spare) // len(rows)
        for request in rows:
            most = min(each, request.room)
            if most > 0:
                request.draft = self._ask(request, most)
                request.drafted += len(request.draft)

    def judge(self, request: Request, agreed: int) -> None:
        """Of the row's draft, so many tokens are its text's."""
        proposed, request.draft = len(request.draft), ()
        if proposed:
            request.agreed += agreed
            try:
                self._drafter.accepted(request.uid, proposed, agreed)
            except Exception:
                logger.warning("a drafter failed", exc_info=True)

    def leave(self, request: Request) -> None:
        """The row has ended."""
        try:
            self._drafter.forget(request.uid)
        except Exception:
            logger.warning("a drafter failed", exc_info=True)

    def _ask(self, request: Request, most: int) -> tuple[int, ...]:
        try:
            return tuple(self._drafter.propose(request.uid, request.known, most))[:most]
        except Exception:
            logger.warning("a drafter failed: the row goes on without a draft", exc_info=True)
            return ()
