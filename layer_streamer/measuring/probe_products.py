"""The processor's part of a probe: products of few tokens while a device's link is busy.

Both read host memory, so each is slower beside the other than alone: what counts for layers that
are computed in host memory while others stream.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import cycle
from statistics import median
from typing import TypeAlias

import torch
import torch.nn.functional as F

from ..devices.device import Device, Stream
from ..machine.limits import ProductRate
from ..transport.tasks import run_all
from .probe_config import MIB, Journal, ProbeConfig
from .probe_copy import Pair, copy_sizes, device_memory, host_memory, pairs_of
from .threads import leave_a_core

SIDE = 4096
"""Rows and columns of a matrix."""
Multiply: TypeAlias = Callable[[], int]
"""Multiplies by one matrix more, and returns its bytes."""
Ends: TypeAlias = tuple[threading.Event, threading.Event]
"""Set when a measurement is given up, and when all is multiplied."""
COPY_NBYTES = 64 * MIB
"""Of one copy meanwhile."""


def measure_products(
    device: Device, config: ProbeConfig, budget: int, journal: Journal
) -> tuple[ProductRate, ...]:
    """Products of bfloat16 matrices by torch, of so many tokens, and copies to ``device`` at once.

    Neither goes over so little memory that a cache would hold it, if ``budget`` allows.
    """
    name, found = str(device.torch_device), list[ProductRate]()
    matrices = cycle(_matrices(budget // 2))
    with copies_to(device, config, budget // 2) as pairs, leave_a_core():
        for tokens in config.product_tokens:
            journal.measuring(f"{name}: copies beside products of {tokens} tokens")
            multiply = partial(_by_torch, matrices, _ones(tokens, next(matrices).shape[1]))
            found.append(ProductRate(tokens, *measure_beside(device, pairs, multiply, config)))
    return tuple(found)


@contextmanager
def copies_to(device: Device, config: ProbeConfig, nbytes: int) -> Iterator[list[Pair]]:
    """What copies to ``device`` are made of while something is multiplied: out of so many bytes."""
    memory = device_memory(device, copy_sizes(config, min(COPY_NBYTES, nbytes))[-1])
    with closing(host_memory([max(nbytes, memory.nbytes)], device)) as arena:
        yield pairs_of(memory, arena.memory, memory.nbytes)


def measure_beside(
    device: Device, pairs: list[Pair], multiply: Multiply, config: ProbeConfig
) -> tuple[float, float]:
    """Bytes a second that are multiplied, and that are copied meanwhile."""
    stopped, multiplied = threading.Event(), threading.Event()
    seconds = config.seconds / config.samples, config.samples
    work = (
        partial(_multiply, multiply, seconds, (stopped, multiplied)),
        partial(_copy, device, pairs, (stopped, multiplied)),
    )
    products, copies = run_all(work, 2, stopped=stopped)
    return products, copies


def _matrices(nbytes: int) -> list[torch.Tensor]:
    side = SIDE
    while side > 64 and 2 * side * side * 4 > nbytes:
        side //= 2
    count = max(1, nbytes // (2 * side * side))
    one = _ones(side, side)
    with torch.inference_mode(False):
        return [one.clone() for _ in range(count)]


def _ones(*shape: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.ones(*shape, dtype=torch.bfloat16, device="cpu")


def _by_torch(matrices: Iterator[torch.Tensor], x_TD: torch.Tensor) -> int:
    weight_ND = next(matrices)
    F.linear(x_TD, weight_ND)
    return weight_ND.nbytes


def _multiply(multiply: Multiply, effort: tuple[float, int], ends: Ends) -> float:
    """Bytes of weights a second; ends the copies. ``effort``: seconds of a sample, and how many."""
    (seconds, samples), (stopped, multiplied) = effort, ends
    torch.set_num_threads(torch.get_num_threads())  # a thread has to be told of its own
    try:
        # The first is the warm-up.
        rates = [_sample(multiply, seconds, stopped) for _ in range(1 + samples)][1:]
    finally:
        multiplied.set()
    return median(rates)


def _sample(multiply: Multiply, seconds: float, stopped: threading.Event) -> float:
    begin, done = time.perf_counter(), 0
    while True:
        done += multiply()
        taken = time.perf_counter() - begin
        if taken >= seconds or stopped.is_set():
            return done / max(taken, 1e-9)


def _copy(device: Device, pairs: list[Pair], ends: Ends) -> float:
    """Bytes a second, until all is multiplied."""
    stream = device.new_stream()
    device.use_in_this_thread(stream)
    begin = time.perf_counter()
    try:
        count = _copy_on(device, pairs, stream, ends)
    finally:
        stream.synchronize()
    return count * pairs[0][0].nbytes / max(time.perf_counter() - begin, 1e-9)


def _copy_on(device: Device, pairs: list[Pair], stream: Stream, ends: Ends) -> int:
    """How many copies, of which two are under way at a time."""
    events, count = [device.new_event(), device.new_event()], 0
    while count < len(events) or not any(end.is_set() for end in ends):
        event = events[count % len(events)]
        event.synchronize()
        device.copy(*pairs[count % len(pairs)])
        event.record(stream)
        count += 1
    return count
