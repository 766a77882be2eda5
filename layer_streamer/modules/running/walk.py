"""One pass, as far as a forward or a backward has come with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import get_ident
from typing import NamedTuple

from ...passes.layer_experts import LayerExperts, apart
from ...passes.sweep import Sweep
from ...transport.weights import Weights

BEFORE_ALL = -1


class Way(NamedTuple):
    """In which order passes come to the layers."""

    order: Sequence[int]
    place: Mapping[int, int]
    """By layer, its place in the order."""
    back: bool
    """It is that of a backward."""


def ways_of(order: Sequence[int]) -> tuple[Way, Way]:
    """Of forwards, and of backwards."""
    ahead, back = tuple(order), tuple(order)[::-1]
    places = [{i: place for place, i in enumerate(some)} for some in (ahead, back)]
    return Way(ahead, places[0], back=False), Way(back, places[1], back=True)


class Walk:
    """A pass on its way. Of the thread that began it, or, on its way back, of a backward's."""

    __slots__ = (
        "at", "bound", "experts", "inside", "repeats", "sweep", "thread", "told", "way", "weights",
    )  # fmt: skip

    def __init__(self, sweep: Sweep, way: Way) -> None:
        self.sweep = sweep
        self.way = way
        self.thread = get_ident()
        self.at = BEFORE_ALL
        """Place in the pass of the layer that is handed out; the number of layers, if that is not
        known or over."""
        self.weights: Weights
        """Of that layer."""
        self.experts: LayerExperts | None = None
        """Of that layer, if they are brought on demand."""
        self.bound = False
        """That layer's block has its weights, on the way back."""
        self.told = False
        """Gradients of that layer's block have come, on the way back."""
        self.inside = 0
        """``id`` of the block that was entered and, for all that is known, not left."""
        self.repeats = False
        """A block was entered again while its layer was handed out."""

    @property
    def layer(self) -> int | None:
        """The one that is handed out; None, if that is not known or over."""
        order = self.way.order
        return order[self.at] if BEFORE_ALL < self.at < len(order) else None

    @property
    def mine(self) -> bool:
        """Whether the calling thread may go on with it. Those of a backward are torch's."""
        return self.way.back or self.thread == get_ident()

    def leads_to(self, i: int, *, back: bool) -> bool:
        """Whether it goes this way, and comes to layer ``i``, or has it handed out."""
        return self.way.back == back and self.way.place[i] >= self.at

    def advance(self, i: int) -> bool:
        """Give back what is handed out, and take layer ``i``; those in between go unused. False:
        the pass is over before that. Raises what a sweep raises."""
        self.at, self.bound, self.told = len(self.way.order), False, False
        for found, weights in self.sweep:
            if found == i:
                self.weights, self.experts = apart(weights)
                self.at = self.way.place[i]
                return True
        return False

    def end(self, *, finish: bool) -> bool:
        """It is over. ``finish``: it is whole, if its last layer was handed out. Whether it was.
        Raises what a sweep raises; ValueError if another thread takes a layer of it just now."""
        at, self.at = self.at, len(self.way.order)
        whole = finish and at == len(self.way.order) - 1 and self.mine
        if whole:
            next(self.sweep, None)
        self.sweep.close()
        return whole
