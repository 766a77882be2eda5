"""Runs a model's own forward over a sweep: its blocks ask for their weights as they are entered.

Hooks on blocks, and on nothing else. That a hook has run says little of the forward (there may come
an interrupt, an early exit, a generation that nobody goes on with), so all that is known is which
layer was handed out last, and each block that is entered goes on from there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from threading import get_ident
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import ClosedError, ConfigError, StreamerError
from ..passes.inputs import move
from ..passes.layer_experts import LayerExperts, apart
from ..passes.sweep import Sweep
from ..streamer import LayerStreamer, keys_of
from ..transport.weights import Weights
from .binding import Binder, Source
from .blocks import Block
from .calls import called_within, computes, thread_name
from .course import Course
from .hooks import Hooks
from .refusals import name_block, refuse_backward

_graph_task = torch._C._current_graph_task_id
"""The backward that the calling thread is in; -1 outside of any."""
BEFORE_ALL = -1


class _Pass:
    """One pass, as far as a forward has come with it. Of the thread that began it."""

    __slots__ = ("at", "experts", "inside", "repeats", "sweep", "thread", "weights")

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.thread = get_ident()
        self.at = BEFORE_ALL
        """Place in the pass of the layer that is handed out; the number of layers, if that is not
        known or over."""
        self.weights: Weights
        """Of that layer."""
        self.experts: LayerExperts | None = None
        """Of that layer, if they are brought on demand."""
        self.inside = 0
        """``id`` of the block that was entered and, for all that is known, not left."""
        self.repeats = False
        """A block was entered again while its layer was handed out."""


class Runner:
    """Has the blocks of one sequence get their weights from a streamer, whatever calls them.

    Block i is layer i. A forward goes through the blocks in the order of the streamer's passes
    (``layers=``), one pass each time:

    * the next block is handed the next layer, and the one before is given back;
    * the same block again (it is shared, or called twice for guidance) keeps its layer;
    * a later block skips those in between, which are taken and given back unused;
    * an earlier block begins a new pass. So does whatever comes after the last block, whose layer
      is given back as it returns, unless blocks are repeated: prefetch of the next pass goes on
      while the model computes what follows;
    * an error of a block ends the pass.

    With several devices, block i's inputs (tensors, also in tuples, lists and dicts) are moved to
    its layer's device, and what the last block returns to the first one.

    Raises, in the forward: StreamerError for a second forward at once, on another thread; for a
    block that is entered during a backward, or within another block; what a ``sweep`` raises, with
    the block's name. After each of them the next forward is right.

    Thread rules: one forward at a time, on any thread; ``close`` from any. To compile blocks, use
    ``block.forward = torch.compile(block.forward)``: hooks must stay outside.
    """

    def __init__(
        self,
        streamer: LayerStreamer,
        blocks: Sequence[Block],
        sources: Mapping[str, Source] | None = None,
        *,
        strict: bool = False,
    ) -> None:
        """``streamer``: its layers are the blocks, their keys are names of parameters relative to
        the block; it is not closed by this. ``sources``: as of :class:`Binder`. ``strict``: a block
        has its weights until its forward ends, so that whoever uses them later gets an error with
        their name. Else, where no gradients are kept, what uses them later is not found out.

        ConfigError if layers and blocks do not fit together.
        """
        layers = streamer.manifest.layers
        self._order = streamer.plan.layers
        if len(layers) != len(blocks) or sorted(self._order) != [*range(len(blocks))]:
            raise ConfigError(
                f"{len(blocks)} blocks, {len(layers)} layers, of which a pass hands out "
                f"{len(self._order)}: each block needs its layer"
            )
        self._streamer = streamer
        self._place = {i: place for place, i in enumerate(self._order)}
        self._goes = frozenset(
            at for at, tier in enumerate(streamer.plan.tiers) if tier != "device"
        )
        """Places whose layers are other bytes after the hand-out."""
        self.names = tuple(block.name for block in blocks)
        """Of the blocks."""
        self._last = len(blocks) - 1
        self._current: _Pass | None = None
        self._keeps_last = False
        self._closed = False
        self._strict = strict
        self._course: Course | None = Course(len(blocks))
        self.order: tuple[int, ...] | None = None
        """In which the first forward came to the blocks; None before, or if it left some out."""
        some = streamer.devices
        self._first = some[0] if len(some) > 1 else None
        devices = [some[self._place[i] % len(some)] for i in range(len(blocks))]
        self.binder = Binder(blocks, keys_of(streamer), sources, devices)
        """Of these blocks: says what its memory takes."""
        self._handles: list[RemovableHandle] = []
        for i, (block, device) in enumerate(zip(blocks, devices, strict=True)):
            hooks = Hooks(i, self.enter, self.leave, device if self._first is not None else None)
            self._handles += hooks.register(block.module)

    @property
    def detours(self) -> int:
        """Passes that a forward like the first takes: one, if its order is the streamer's."""
        places = [self._place[i] for i in self.order or self._order]
        return 1 + sum(later < place for place, later in pairwise(places))

    def names_in_order(self) -> tuple[str, ...]:
        """The blocks' names, in the order of the first forward, or else in the streamer's."""
        return tuple(self.names[i] for i in self.order or self._order)

    def close(self) -> None:
        """Remove the hooks, and put the blocks' parameters on meta again. Idempotent, any thread.

        A forward that is under way, here or on another thread, raises ClosedError at the end of its
        block or the begin of the next, and only then is that block's part of it done.
        """
        self._closed = True
        current, self._current = self._current, None
        running = current is not None and computes(current.thread)
        if current is not None:
            with suppress(ValueError):  # another thread takes a layer just now: it finds out
                current.sweep.close()
        if not running:
            for handle in self._handles:
                handle.remove()
        busy = current is not None and running and current.inside and current.at <= self._last
        self.binder.release(but=self._order[current.at] if current is not None and busy else None)

    def enter(self, i: int, module: nn.Module) -> None:
        """Block ``i``, which is ``module``, is about to run: hand out its weights."""
        if torch.compiler.is_compiling():
            raise StreamerError(
                f"{self.names[i]}: torch.compile has come to the hooks that hand out weights and "
                "cannot be traced: compile each block's forward alone"
            )
        if _graph_task() != -1:
            refuse_backward(self.names[i])
        place = self._place[i]
        current = self._go_on(i)
        if current is None or place < current.at:
            current = self._begin(place)
        current.inside = id(module)
        if self._current is not current:
            self._refuse_second(self._current)
        if place == current.at:
            current.repeats = True
        else:
            self._advance(current, place)
        self.binder.bind(i, module, current.weights)
        if self._course is not None:
            self._note(i, self._course)

    def leave(self, i: int, output: Any) -> Any:
        """Block ``i`` has run, or failed. What it returned, where that is to be another."""
        if torch.compiler.is_compiling():
            return None  # ``enter`` has said so
        current = self._current
        failed = output is None and sys.exc_info()[1] is not None
        mine = current is not None and current.thread == get_ident()
        if failed:
            if mine and _graph_task() == -1:
                assert current is not None
                self._end(current, finish=False)
                if self._strict:
                    self.binder.unbind(i)
            return None
        place = self._place[i]
        if current is None or not mine or current.at != place:
            self._refuse_second(current)
        current.inside = 0
        if self._strict or (place in self._goes and torch.is_grad_enabled()):
            # A backward may compute with them again, and must not find those of another block.
            self.binder.unbind(i)
        if place < self._last:
            return None
        if not (current.repeats or self._keeps_last):
            self._end(current, finish=True)
        return move(output, self._first) if self._first is not None else None

    def experts_of(self, i: int) -> LayerExperts | None:
        """Those of block ``i``, which are brought on demand, while its layer is handed out."""
        current = self._current
        there = current is not None and current.at == self._place[i]
        return current.experts if current is not None and there else None

    def _note(self, i: int, course: Course) -> None:
        course.note(i)
        if course.over:
            self.order, self._course = course.order, None

    def _go_on(self, i: int) -> _Pass | None:
        """The pass that a forward on this thread is in, or left behind; None if there is none."""
        current = self._current
        if current is None:
            return None
        if current.thread != get_ident():
            if computes(current.thread):
                self._refuse_second(current)
            return None
        if current.inside and called_within(current.inside):
            known = current.at <= self._last
            at = self.names[self._order[current.at]] if known else "a block"
            raise StreamerError(
                f"{self.names[i]} is entered within the forward of {at}, which still needs its "
                "weights: only one of them can stream, name it by stacks="
            )
        return current

    def _begin(self, place: int) -> _Pass:
        """A new pass, of which the layer at this place is wanted first."""
        if self._closed:
            self._refuse_closed()
        old = self._current
        if old is not None:
            self._end(old, finish=True)
        current = _Pass(self._streamer.sweep())
        # To come back to the last block after it was given back is a whole pass: once is enough.
        current.repeats = place == self._last > 0
        self._current = current
        return current

    def _advance(self, current: _Pass, place: int) -> None:
        """Give back what is handed out, and take the layer at this place of the pass; those in
        between go unused."""
        current.at = len(self.names)
        wanted = self._order[place]
        try:
            for i, weights in current.sweep:
                if i == wanted:
                    current.weights, current.experts = apart(weights)
                    current.at = place
                    return
        except StreamerError as error:
            name_block(error, self.names)
            raise
        self._refuse_second(self._current)

    def _end(self, current: _Pass, *, finish: bool) -> None:
        """The pass is over. ``finish``: it is whole, if its last layer was handed out."""
        at, current.at = current.at, len(self.names)
        try:
            if finish and at == self._last and current.thread == get_ident():
                self._keeps_last = current.repeats
                next(current.sweep, None)
            current.sweep.close()
        except StreamerError as error:
            name_block(error, self.names)
            raise
        except ValueError:
            self._refuse_second(current)  # another thread takes a layer of it just now
        self._current = None

    def _refuse_second(self, current: _Pass | None) -> NoReturn:
        if self._closed:
            self._refuse_closed()
        where = thread_name(current.thread) if current is not None else "another thread"
        raise StreamerError(
            f"two forwards at once: one is running on {where}, and its blocks can hold the weights "
            "of one forward only; put a lock around the model"
        )

    def _refuse_closed(self) -> NoReturn:
        self.close()  # what was left because this forward was under way
        raise ClosedError("the model's weights do not stream any more: it was closed")
