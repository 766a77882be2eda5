"""Who takes part in each pass over one runner: requests join and leave between passes.

Every pass costs the moving of the whole model, whatever it computes: so all rows share each one,
those that take their prompt as well as those that take one token (:mod:`.composition`). What a row
raises ends that row: the others go on as they would without it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from weakref import ref

from layer_streamer import ClosedError, StreamerError

from ..drafts.drafting import Drafting
from ..errors import EngineError, QueueFullError, without_frames
from ..passes.runner import Runner
from ..request import Request
from ..text.following import Followed
from .allowance import Allowance
from .composition import Composition, compose
from .events import Events
from .places import Places
from .row_passes import Heard, RowPasses

MOST_WAITING = 256
"""Requests."""


class Scheduler:
    """Runs requests to their ends, as many at a time as there is room for; lives as long as an
    engine.

    Requests are let in in the order in which they were submitted, as there are places for their
    keys and values: while one does not fit, none behind it is let in, so that none waits for ever.
    All of a request's places are taken when it is let in.

    A request ends with what is raised for it alone: by its tokenizer or sampler, by a pass over its
    row, or since its logits are not numbers. What the streamer raises ends all. What a request's
    ``on_layer`` raises ends that one; what is no Exception, such as a Ctrl-C, is raised. A pass
    that either cuts off is done again for the others, unless it had begun to draw their tokens:
    what is drawn cannot be drawn again, so they end in an EngineError.

    Thread rules: one thread, between passes; :meth:`cancel` also while one runs.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        drafting: Drafting | None = None,
        alike: float = math.inf,
        max_waiting: int = MOST_WAITING,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Rows are drafted for by ``drafting``, but where passes are captured: there a pass costs
        what its tokens do. ``alike``: a prompt of more tokens is taken in one pass, and begins
        without what was kept, since its length decides how it is computed. At most ``max_waiting``
        requests wait."""
        self._runner, self._alike, self._clock = runner, alike, clock
        self.drafting = None if runner.captures_passes else drafting
        self.max_waiting = max_waiting
        self.places = Places(runner.kv.rows, alike)
        self._passes, self._allowance = RowPasses(runner), Allowance()
        self._open: list[Request] = []
        """As they were submitted. Those that have rows are running, the others wait."""
        self._unsettled: list[Request] = []
        """Of the last pass, those to whom nothing was said of it."""
        self._closed = False

    @property
    def running(self) -> Sequence[Request]:
        """Those that have been let in, the oldest first."""
        return [request for request in self._open if request.row is not None]

    @property
    def waiting(self) -> Sequence[Request]:
        """Those that have not."""
        return [request for request in self._open if request.row is None]

    @property
    def is_full(self) -> bool:
        """True: none is taken at present."""
        return len(self.waiting) >= self.max_waiting

    def submit(self, request: Request, events: Events) -> None:
        """A new request, which is let in at once if there is room and none waits before it. What
        comes of it is put into ``events``.

        QueueFullError if too many wait; ClosedError.
        """
        self._refuse_within()
        if self._closed:
            raise ClosedError("the engine is closed")
        if self.is_full:
            raise QueueFullError(f"{self.max_waiting} requests are waiting: try again later")
        request.events = ref(events)
        if request.error is not None:
            events.put(request, "")
            return
        self._open.append(request)
        self._admit()

    def cancel(self, request: Request) -> None:
        """End a request of which nobody wants to hear any more. Its places are free at once, or
        when the pass has ended that runs. Idempotent, as it is for one that has ended."""
        request.cancelled = True
        if not self._is_passing():
            self._leave(request)

    def step(self) -> None:
        """Let in what fits, and do one pass, if there is anything to do; what it brings is in the
        clients' events.

        Raises what is no Exception.
        """
        self._refuse_within()
        self._admit()
        self._pass()
        self._tidy()

    def close(self) -> None:
        """End all requests with a ClosedError, and take no more. Idempotent."""
        self._refuse_within()
        self._closed = True
        self._end_all(self._open, ClosedError("the engine was closed before this text had ended"))
        self.places.forget()

    def _refuse_within(self) -> None:
        if self._is_passing():
            raise RuntimeError("a pass is under way: wait until it has ended")

    def _is_passing(self) -> bool:
        """True: this is called from within a pass, as by an ``on_layer`` or the collector. The
        stack says so, since an interrupt could leave a flag as it is."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code is Scheduler._pass.__code__ and frame.f_locals["self"] is self:
                return True
            frame = frame.f_back
        return False

    def _admit(self) -> None:
        """Let requests in, in their order, while there is room."""
        self._tidy()
        for request in self.waiting:
            row = self.places.take(request, self.running)
            if row is not None:
                request.row, request.cached = row, row.length
            elif self.running:
                return
            else:
                self._end(
                    request, ValueError(f"{request.places} tokens: there is no room for them")
                )

    def _pass(self) -> None:
        most, allowance = self._runner.most_tokens, self._allowance
        composed = compose(self.running, most, self._alike, self.drafting, allowance)
        if not composed.taking:
            return
        self._passes.chosen, self._unsettled = False, list(composed.taking)
        heard, began = Heard(composed.taking), self._clock()
        for request in composed.taking:
            if not request.passes:
                request.began = began
        try:
            found = self._passes.choose(composed.taking, heard if heard.anyone else None)
        except Exception as error:
            if error is heard.error and heard.request is not None:
                self._end_all([heard.request], error)
            else:
                self._end_all(self._open, error)
            return
        now = self._clock()
        self._hear(composed, now - began)
        pairs = zip(composed.taking, found, strict=True)
        for request, following in sorted(pairs, key=lambda pair: pair[0].uid):
            self._settle(request, following, now)

    def _hear(self, composed: Composition, seconds: float) -> None:
        """A pass took so long."""
        self._allowance.hear(composed.decoding, composed.prompts, composed.context, seconds)
        if self.drafting is not None and not composed.prompts:
            self.drafting.hear(composed.decoding, seconds)

    def _settle(self, request: Request, tokens: Followed | None, now: float) -> None:
        """Tell a request what a pass has brought it."""
        request.passes += 1
        told = tokens is not None and not request.cancelled
        piece = self._follow(request, tokens, now) if tokens is not None and told else ""
        self.places.note(request)
        if told:
            self._put(request, piece)
            if request.finish_reason is not None:
                self._leave(request)
        self._unsettled.remove(request)

    def _follow(self, request: Request, tokens: Followed, now: float) -> str:
        """What follows in a row: its text. The row then holds all of its ids but the last one, as
        without a draft."""
        before, pieces = len(request.new_ids), []
        for token in tokens:
            pieces.append(request.advance(token, now))
            if request.finish_reason is not None:
                break
        if self.drafting is not None and request.draft:
            self._cut(request)
            self.drafting.judge(request, max(len(request.new_ids) - before - 1, 0))
        return "".join(pieces)

    def _cut(self, request: Request) -> None:
        """A row without what is beyond its ids, and its last one: that is always computed."""
        if request.row is not None:
            length = min(request.row.length, len(request.known) - 1)
            self._runner.kv.rows.truncate(request.row, length)

    def _put(self, request: Request, piece: str) -> None:
        events = request.events() if request.events is not None else None
        if events is not None:
            events.put(request, piece)

    def _end(self, request: Request, error: Exception) -> None:
        """End a request with an error of its own."""
        request.fail(error)
        self._put(request, "")
        self._leave(request)

    def _end_all(self, requests: Sequence[Request], error: Exception) -> None:
        """End requests with what is none of theirs."""
        if isinstance(error, StreamerError):
            without_frames(error)
        for request in list(requests):
            request.error, request.finish_reason, request.raises = error, "error", True
            self._put(request, "")
            self._leave(request)

    def _leave(self, request: Request) -> None:
        """Free what a request has, and forget it. Idempotent."""
        if request not in self._open:
            return
        # First, so that what an interrupt leaves is a row of nobody's, which is dropped.
        self._open = [other for other in self._open if other is not request]
        if self.drafting is not None:
            self.drafting.leave(request)
        if request.row is not None:
            if request.keeps and (request.error is None or request.raises):
                self.places.kept.keep(request.row, request.known)
            else:
                self._runner.kv.rows.drop(request.row)

    def _tidy(self) -> None:
        """Between passes: what an interrupt or a client that has gone left behind."""
        for request in list(self._unsettled):
            if request in self._open and not request.cancelled:
                if self._passes.chosen:
                    self._end(request, EngineError("the pass was interrupted after it had drawn"))
                else:
                    self._cut(request)
            self._unsettled.remove(request)
        for request in self._open:
            if request.finish_reason is not None:
                self._put(request, "")  # once more, perhaps: it may not have come to that
            gone = request.events is None or request.events() is None
            if gone or request.cancelled or request.finish_reason is not None:
                self._leave(request)
        used = {request.row for request in self._open} | {self.places.kept.row}
        for row in self._runner.kv.rows:
            if row not in used:
                self._runner.kv.rows.drop(row)
