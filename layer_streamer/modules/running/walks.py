"""Which pass a model's blocks are in: one at a time, begun, gone on with, and over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from threading import get_ident
from typing import NoReturn

from ...errors import ClosedError, StreamerError
from ...streamer import LayerStreamer
from ..refusals import name_block
from .calls import called_within, computes, thread_name
from .graphs import at_its_end
from .walk import Walk, ways_of

FORWARDS = 2
"""How many that might have had a backward come without one until none is expected any more."""


class Walks(ABC):
    """The passes over one sequence of blocks.

    Thread rules: those of forwards; ``close`` from any thread.
    """

    def __init__(self, streamer: LayerStreamer, names: Sequence[str]) -> None:
        """``names``: of the blocks, by layer."""
        self.names = tuple(names)
        """Of the blocks."""
        self._streamer = streamer
        self._ahead, self._back = ways_of(streamer.plan.layers)
        self._current: Walk | None = None
        self._keeps_last = False
        """The last layer is not given back as its block returns, which may be entered again."""
        self._closed = False
        self._early: dict[int, Walk] = {}
        """Blocks that a backward has run once more before their gradients came, by the pass that
        they had their weights from."""
        self._forwards = FORWARDS
        """That might have had a backward, since the last one had."""

    @abstractmethod
    def close(self) -> None:
        """No more passes; called again where a forward finds that out."""

    @abstractmethod
    def forget(self, i: int) -> None:
        """A backward has done with block ``i``, whose layer is given back."""

    def _go_on(self, i: int, *, entering: bool) -> Walk | None:
        """The pass that a forward on this thread is in, or left behind; None if there is none.

        ``entering``: a hook of block ``i``'s call asks. StreamerError if another forward is under
        way, or block ``i`` is entered within another.
        """
        current = self._current
        if current is None:
            return None
        if current.thread != get_ident():
            if computes(current.thread):
                self._refuse_second(current)
            return None
        if current.inside and called_within(current.inside, entering=entering):
            at = "a block" if current.layer is None else self.names[current.layer]
            raise StreamerError(
                f"{self.names[i]} is entered within the forward of {at}, which still needs its "
                "weights: only one of them can stream, name it by stacks="
            )
        return current

    def _begin_ahead(self, i: int, *, trains: bool) -> Walk:
        """A new pass, of which layer ``i`` is wanted first. ``trains``: there may be a backward,
        and is expected to be, if there were some."""
        self._early.clear()
        turns = trains and self._forwards < FORWARDS
        self._forwards += turns
        self._end_last()
        self._current = current = Walk(
            self._streamer.sweep(turns=turns, on_host=False), self._ahead
        )
        # To come back to the last block after it was given back is a whole pass: once is enough.
        current.repeats = self._ahead.place[i] == len(self._ahead.order) - 1 > 0
        return current

    def _begin_back(self) -> Walk:
        """A new pass of the backward that this thread is in."""
        self._forwards = 0
        self._end_last()
        self._current = current = Walk(
            self._streamer.sweep(back=True, turns=True, on_host=False), self._back
        )
        at_its_end(lambda: self._end_back(current))
        return current

    def _advance(self, current: Walk, i: int) -> None:
        """Give back what is handed out, and take layer ``i``; those in between go unused."""
        try:
            self._leave_behind(current)
            if current.advance(i):
                return
        except StreamerError as error:
            name_block(error, self.names)
            raise
        self._refuse_second(self._current)

    def _end(self, current: Walk, *, finish: bool) -> None:
        """The pass is over. ``finish``: it is whole, if its last layer was handed out."""
        try:
            self._leave_behind(current)
            if current.end(finish=finish) and not current.way.back:
                self._keeps_last = current.repeats
        except StreamerError as error:
            name_block(error, self.names)
            raise
        except ValueError:
            self._refuse_second(current)  # another thread takes a layer of it just now
        self._current = None

    def _stop(self) -> tuple[bool, int | None]:
        """No more passes. Idempotent, any thread. Whether a forward is under way, and the layer
        whose block is in it now."""
        self._closed = True
        current, self._current = self._current, None
        if current is None:
            return False, None
        running = computes(current.thread)
        with suppress(ValueError):  # another thread takes a layer just now: it finds out
            current.sweep.close()
        return running, current.layer if running and current.inside else None

    def _refuse_second(self, current: Walk | None) -> NoReturn:
        """``current`` is another forward's, or was closed."""
        if self._closed:
            self.close()  # what was left because this forward was under way
            raise ClosedError("the model's weights do not stream any more: it was closed")
        where = thread_name(current.thread) if current is not None else "another thread"
        raise StreamerError(
            f"two forwards at once: one is running on {where}, and its blocks can hold the weights "
            "of one forward only; put a lock around the model"
        )

    def _end_last(self) -> None:
        if self._closed:
            self._refuse_second(None)
        if self._current is not None:
            self._end(self._current, finish=True)

    def _end_back(self, current: Walk) -> None:
        """The backward that began the pass has ended."""
        self._early.clear()
        if self._closed:
            self._refuse_second(None)  # what came of the block that was run once more is not known
        if self._current is current:
            self._end(current, finish=True)

    def _leave_behind(self, current: Walk) -> None:
        if current.way.back and current.layer is not None:
            self.forget(current.layer)
