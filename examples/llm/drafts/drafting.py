"""When a row is drafted for, by whom and how far; what came of it. Drafters themselves only
propose."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence

from ..kv.rows import Row
from ..request import Request
from .drafted import Drafted
from .drafter import Drafter
from .forced import Forced, Held
from .pace import Pace
from .tree import NOTHING, Tree, as_tree
from .worth import Worth

logger = logging.getLogger(__name__)

MOST_DRAFTED = 64
"""Tokens of all rows' drafts together in a pass. A pass over streamed weights costs the same for so
many as for one, wherever it was measured (docs/benchmarks)."""
GRAMMAR = "grammar"
"""As a source: what a row's constraint leaves no choice in."""
AGAIN = 16
"""Drafts after which another source than the best one is asked first, for once."""


class Drafting:
    """Asks drafters for the rows that decode.

    What has to follow in a row, by what its text is held to, is its draft before all else. Then the
    source that has saved most time lately is asked first, and the next one if it has nothing.
    With ``pace`` a draft is as long as promises most tokens a second by what was measured, or as
    its source finds, where that weighs it itself; and a source that costs more than it saves is
    left alone for a while, so that a text takes at most a few percent longer than without. Before
    the first draft there is a pass without one, to compare
    with. What a drafter raises costs its draft, and nothing else. Thread rules: that of the passes.
    """

    def __init__(
        self,
        sources: Mapping[str, Drafter],
        pace: Pace | None = None,
        rows: dict[int, Row] | None = None,
        salts: dict[int, bytes] | None = None,
        *,
        trees: bool = True,
        logits: int | None = None,
    ) -> None:
        """``sources``: drafters by what they are called, the most trusted first; without ``pace``
        they are asked in that order, for all that there is room for. ``rows``: has, while they are
        drafted for, the rows of the model's cache by their keys, and ``salts`` what their requests
        have of them. ``trees`` False: passes look
        at chains only, of a tree at its first branch. ``logits``: of how many tokens a pass has
        room for the logits, those that rows without a draft need among them; None: of any."""
        self._held: dict[int, Held] = {}
        self._forced = Forced(self._held)
        self._sources, self._pace, self._trees, self._logits = sources, pace, trees, logits
        self._in_cache = {} if rows is None else rows
        self._salts = {} if salts is None else salts
        self._worths = {name: Worth(pace or Pace()) for name in sources}
        self._spent: dict[int, float] = {}
        """Seconds that a row's draft took to make, by the row's key."""
        self._rows = 1
        self._count = 0

    def propose(self, running: Sequence[Request], spare: int) -> None:
        """Give each row that takes one token a draft, if there is one. ``spare``: tokens that the
        pass has room for beside what it takes anyway."""
        rows = [request for request in running if request.new_ids and request.behind == 1]
        if not rows:
            return
        if self._logits is not None:
            spare = min(spare, self._logits - len(running))
        each, self._rows = min(MOST_DRAFTED, spare) // len(rows), len(rows)
        chosen = self._pace is None or self._pace.knows(len(rows))
        for request in rows:
            most = min(each, request.room)
            if most > 0 and request.row is not None:
                self._in_cache[request.uid] = request.row
                self._salts[request.uid] = request.salt
                if not self._force(request, most) and chosen:
                    self._draft(request, most)

    def hear(self, tokens: int, seconds: float) -> None:
        """A pass of so many tokens, in which rows did nothing but decode, took so long."""
        if self._pace is not None:
            self._pace.hear(tokens, seconds)
        for worth in self._worths.values():
            worth.wait(seconds)

    def judge(self, request: Request, agreed: int) -> None:
        """Of the row's draft, so many tokens are its text's."""
        draft, name, request.draft = request.draft, request.source, NOTHING
        seconds = self._spent.pop(request.uid, 0.0)
        if not draft:
            return
        proposed = len(draft)
        request.drafts.setdefault(name, Drafted()).add(proposed, agreed)
        if name == GRAMMAR:
            return  # it takes no time, and is asked first whatever comes of it
        whole = agreed == draft.deepest
        self._worths[name].hear(proposed, agreed, seconds, self._rows, whole=whole)
        try:
            self._sources[name].accepted(request.uid, proposed, agreed)
        except Exception:
            logger.warning("a drafter failed", exc_info=True)

    def leave(self, request: Request) -> None:
        """The row has ended."""
        self._spent.pop(request.uid, None)
        self._in_cache.pop(request.uid, None)
        self._salts.pop(request.uid, None)
        self._held.pop(request.uid, None)
        for source in self._sources.values():
            try:
                source.forget(request.uid)
            except Exception:
                logger.warning("a drafter failed", exc_info=True)

    def _force(self, request: Request, most: int) -> bool:
        """The draft of what has to follow, if anything has to."""
        constraint = request.sampler.constraint
        if constraint is None or not constraint.acts:
            return False
        self._held[request.uid] = constraint
        request.draft, request.source = self._ask(self._forced, request, most), GRAMMAR
        return bool(request.draft)

    def _draft(self, request: Request, most: int) -> None:
        """The draft of the first source that has one."""
        for name in self._order():
            worth, length = self._worths[name], most
            if self._pace is not None and not self._sources[name].weighs:
                length = worth.length(most, self._rows)
            if not length:
                continue
            began = time.perf_counter()
            request.draft, request.source = self._ask(self._sources[name], request, length), name
            seconds = time.perf_counter() - began
            if request.draft:
                self._spent[request.uid] = seconds
                return
            worth.lose(seconds)

    def _order(self) -> Iterable[str]:
        """Sources to ask, one after the other."""
        if self._pace is None:
            return self._sources
        self._count += 1
        paying = [name for name, worth in self._worths.items() if worth.pays]
        order = sorted(paying, key=lambda name: -self._worths[name].promise)
        return order[::-1] if self._count % AGAIN == 0 else order

    def _ask(self, source: Drafter, request: Request, most: int) -> Tree:
        try:
            found = source.propose(request.uid, request.known, most)
            tree = as_tree(found)
            return (tree if self._trees else tree.trunk()).first(most)
        except Exception:
            logger.warning("a drafter failed: the row goes on without a draft", exc_info=True)
            return NOTHING
