"""One pass as a loop, on the calling thread."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import nullcontext
from typing import NamedTuple, TypeAlias

from ..errors import SupersededError
from ..progress import ProgressBar
from ..transport.pipeline import Pipeline
from ..transport.pool import Weights
from .caller import Caller
from .claims import Claims, Pass
from .statics import Statics

Sweep: TypeAlias = Generator[tuple[int, Weights], None, None]


class Parts(NamedTuple):
    """What an open streamer is made of; dropped as one when it is closed."""

    pipeline: Pipeline
    caller: Caller
    statics: Statics
    claims: Claims
    track_progress: bool

    def closed(self) -> bool:
        return self.pipeline.control.closing


def sweep(parts: Parts, owner: object, *, guarded: bool) -> Sweep:
    """Hand out one pass's layers. ``guarded``: make each layer's device the current one for it.

    ``owner``, whose garbage collection closes the parts, lives for as long as the generator does.
    """
    caller, current, length = parts.caller, Pass(), parts.pipeline.schedule.length
    devices = parts.pipeline.devices
    bar, unfinished = None, False
    try:
        parts.claims.claim(current)
        caller.begin()
        unfinished = True
        if parts.track_progress:
            bar = ProgressBar(total=length, unit="layer", leave=False)
        for index in range(length):
            with devices[index % len(devices)].guard() if guarded else nullcontext():
                yield caller.take()
                if not parts.claims.has(current):
                    raise SupersededError("this sweep was overtaken by a newer pass")
                caller.give_back()
            if bar is not None:
                bar.update()
        caller.finish()
        unfinished = False
    finally:
        if unfinished:
            _end(parts, current)
        current.over = True
        if bar is not None:
            bar.close()


def _end(parts: Parts, current: Pass) -> None:
    """An unfinished pass is over: start prefetching again, if it is still its turn.

    A sweep that is finalized on another thread leaves that to the next pass, which finds out.
    """
    mine = current.thread is threading.current_thread()
    if mine and not parts.closed() and parts.claims.has(current):
        parts.caller.abort()
