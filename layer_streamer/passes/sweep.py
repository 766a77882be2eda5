"""One pass as a loop, on the calling thread."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch

from ..devices.device import NO_GUARD
from ..errors import StreamerError, SupersededError
from ..progress import ProgressBar
from ..transport.pipeline import Pipeline
from ..transport.stage import AHEAD, Heading
from ..transport.weights import Weights
from .caller import Caller
from .claims import Claims, Pass
from .expert_store import ExpertStore
from .inputs import LayerFn, move
from .statics import Statics

CPU = torch.device("cpu")
Sweep: TypeAlias = Generator[tuple[int, Weights], None, None]


class StoppedError(StreamerError):
    """on_copy raised StopIteration (the cause), which a loop would take for its end."""


class Opened(NamedTuple):
    """What an open streamer is made of; dropped as one when it is closed."""

    pipeline: Pipeline
    caller: Caller
    statics: Statics
    experts: ExpertStore | None
    claims: Claims
    track_progress: bool


def sweep(parts: Opened, owner: object, *, guarded: bool, heading: Heading = AHEAD) -> Sweep:
    """Hand out one pass's layers. ``guarded``: make each layer's device the current one for it.
    ``heading``: which way this pass goes, and whether the next goes the other way.

    ``owner``, whose garbage collection closes the parts, lives for as long as the generator does.
    """
    heading = heading._replace(on_host=heading.on_host and bool(parts.pipeline.residents.host))
    caller, current, length = parts.caller, Pass(), parts.pipeline.schedule.length
    devices = parts.pipeline.devices
    bar, unfinished = None, False
    try:
        parts.claims.claim(current)
        caller.begin(heading)
        unfinished = True
        if parts.track_progress:
            bar = ProgressBar(total=length, unit="layer", leave=False)
        order = range(length)
        for index in reversed(order) if heading.back else order:
            with devices[index % len(devices)].guard() if guarded else NO_GUARD:
                try:
                    taken = caller.take()
                except StopIteration as error:
                    raise StoppedError(f"on_copy raised StopIteration({error.value!r})") from error
                yield taken
                del taken
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


def run_layers(
    parts: Opened, owner: object, x: Any, layer_fn: LayerFn, heading: Heading = AHEAD
) -> Any:
    """One pass of ``layer_fn`` from ``x``; its result, on the first device."""
    devices = [device.torch_device for device in parts.pipeline.devices]
    on_host = parts.pipeline.residents.host if heading.on_host else {}
    steps = sweep(parts, owner, guarded=True, heading=heading)
    stopped: BaseException | None = None
    try:
        for index, (layer_idx, weights) in enumerate(steps):
            device = CPU if index in on_host else devices[index % len(devices)]
            x = layer_fn(move(x, device), weights, layer_idx)
    except StoppedError as error:
        stopped = error.__cause__
    finally:
        steps.close()
    if stopped is not None:
        raise stopped
    return move(x, devices[0])


@contextmanager
def led_pass(parts: Opened) -> Iterator[None]:
    """A pass whose experts the device brings by itself, launched by the caller."""
    store = parts.experts
    if store is None or store.lead is None:
        raise StreamerError("the device cannot bring experts by itself: see most_on_device")
    current = Pass()
    try:
        parts.claims.claim(current)
        with store.led_by_device():
            yield
        # While the device works: it reads pages that are locked, and does not fall over others.
        parts.pipeline.files.check_unchanged()
    finally:
        current.over = True


def _end(parts: Opened, current: Pass) -> None:
    """An unfinished pass is over: start prefetching again, if it is still its turn.

    A sweep that is finalized on another thread leaves that to the next pass, which finds out.
    """
    mine = current.thread is threading.current_thread()
    if mine and not parts.pipeline.control.closing and parts.claims.has(current):
        parts.caller.abort()
