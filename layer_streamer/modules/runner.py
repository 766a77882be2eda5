"""Runs a model's own forward over a sweep: its blocks ask for their weights as they are entered,
and a backward asks for them again.

Hooks on blocks, and on nothing else. That a hook has run says little of the forward (there may come
an interrupt, an early exit, a generation that nobody goes on with), so all that is known is which
layer was handed out last, and each block that is entered goes on from there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import ConfigError, StreamerError
from ..passes.inputs import move
from ..passes.layer_experts import LayerExperts
from ..streamer import LayerStreamer, keys_of
from .binding import Binder, Source
from .blocks import Block
from .refusals import refuse_gone, refuse_several, refuse_together
from .running.course import Course
from .running.graphs import Return, counts_of, in_backward, nodes_so_far
from .running.hooks import Hooks
from .running.walk import Walk
from .running.walks import Walks


class Runner(Walks):
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

    A backward goes over them from the last to the first, in a pass of its own: it asks for a
    block's weights as it comes to its outputs, and again if it runs the block once more, which is
    what activation checkpoints are for. Where passes have turned so, the next ones are expected to,
    and what lies in slots then is not brought again.

    With several devices, block i's inputs (tensors, also in tuples, lists and dicts) are moved to
    its layer's device, and what the last block returns to the first one.

    Raises, in the forward: StreamerError for a second forward at once, on another thread; for a
    block that is entered within another one; for weights that gradients are asked for; what a
    ``sweep`` raises, with the block's name. In the backward: StreamerError for a block that was not
    checkpointed and whose weights have gone. After each of them the next forward is right.

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
        super().__init__(streamer, [block.name for block in blocks])
        self._place = self._ahead.place
        self._goes = frozenset(
            at for at, tier in enumerate(streamer.plan.tiers) if tier != "device"
        )
        """Places whose layers are other bytes after the hand-out."""
        self._last = len(blocks) - 1
        self._before: tuple[int, list[int]] = (0, [])
        """As the block that runs was entered: nodes so far, how often its weights were held."""
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
        running, busy = self._stop()
        if not running:
            for handle in self._handles:
                handle.remove()
        self.binder.release(but=busy)

    def enter(self, i: int, module: nn.Module) -> None:
        """Block ``i``, which is ``module``, is about to run: hand out its weights."""
        if torch.compiler.is_compiling():
            raise StreamerError(
                f"{self.names[i]}: torch.compile has come to the hooks that hand out weights and "
                "cannot be traced: compile each block's forward alone"
            )
        if in_backward():
            self._run_again(i, module)
            return
        grads = torch.is_grad_enabled()
        if grads:
            self.binder.check_frozen(i)
        current = self._go_on(i, entering=True)
        if current is None or not current.leads_to(i, back=False):
            current = self._begin_ahead(i, trains=grads or module.training)
        current.inside = id(module)
        if self._current is not current:
            self._refuse_second(self._current)
        if current.layer == i:
            current.repeats = True
        else:
            self._advance(current, i)
        self.binder.bind(i, module, current.weights)
        if grads:
            self._before = nodes_so_far(), counts_of(self.binder.bound(i))
        if self._course is not None:
            self._note(i, self._course)

    def come_back(self, i: int, module: nn.Module) -> None:
        """A backward has come to the outputs of block ``i``, which is ``module``: hand out its
        weights."""
        early = self._early.pop(i, None)
        current = self._hand_back(i, module, entering=False)
        if early is not None and early is not current:
            # Nobody else would find out: a checkpoint looks at no versions of what it has saved.
            refuse_together(self.names[i])
        current.told = True

    def _run_again(self, i: int, module: nn.Module) -> None:
        """A backward is about to run block ``i`` once more."""
        current = self._current
        told = current is not None and current.layer == i and current.told
        current = self._hand_back(i, module, entering=True)
        if not told:
            self._early[i] = current

    def _hand_back(self, i: int, module: nn.Module, *, entering: bool) -> Walk:
        """Its weights, in a pass of the backward."""
        if self._first is not None and self._first.type != "cpu":
            refuse_several(self.names[i])
        current = self._current
        if current is not None and not current.way.back:
            self._go_on(i, entering=entering)
        if current is None or not current.leads_to(i, back=True):
            current = self._begin_back()
        if current.layer != i:
            self._advance(current, i)
        if not current.bound:
            self.binder.bind(i, module, current.weights)
            current.bound = True
        return current

    def leave(self, i: int, module: nn.Module, output: Any) -> Any:
        """Block ``i`` has run, or failed. What it returned, where that is to be another."""
        if torch.compiler.is_compiling():
            return None  # ``enter`` has said so
        current = self._current
        failed = output is None and sys.exc_info()[1] is not None
        back = in_backward()
        mine = current is not None and current.thread == get_ident()
        if failed:
            if mine and not back:
                assert current is not None
                self._end(current, finish=False)
                if self._strict:
                    self.binder.unbind(i)
            return None
        last = self._place[i] == self._last
        moved = move(output, self._first) if last and self._first is not None else None
        if back:
            return moved
        if current is None or not mine or current.way.back or current.layer != i:
            self._refuse_second(current)
        current.inside = 0
        self._leave_bound(i, module, output)
        if last and not (current.repeats or self._keeps_last):
            self._end(current, finish=True)
        return moved

    def _leave_bound(self, i: int, module: nn.Module, output: Any) -> None:
        """Its weights are there no more, if a backward may come; that is told of its outputs."""
        grads = torch.is_grad_enabled()
        if grads:
            come_back = Return(i, module, self.come_back, self._refuse_gone)
            since, counts = self._before
            come_back.hold(self.binder.bound(i), counts)
            come_back.register(output, since)
        if self._strict or (grads and self._place[i] in self._goes):
            # A backward may compute with them again, and must not find those of another block.
            self.binder.unbind(i)

    def experts_of(self, i: int) -> LayerExperts | None:
        """Those of block ``i``, which are brought on demand, while its layer is handed out."""
        current = self._current
        return current.experts if current is not None and current.layer == i else None

    def _note(self, i: int, course: Course) -> None:
        course.note(i)
        if course.over:
            self.order, self._course = course.order, None

    def forget(self, i: int) -> None:
        """A backward has done with block ``i``, whose weights go."""
        if self._strict or self._place[i] in self._goes:
            self.binder.unbind(i)

    def _refuse_gone(self, i: int) -> None:
        refuse_gone(self.names[i])
