"""An engine that launches work over late devices, and what that work saw wrong."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from checkpoints import tiny_tensors
from fake_device import FakeDevice, FakeStream
from support import open_checkpoint

from layer_streamer import LayerStreamer, StreamerError

NUM_LAYERS = 5
HANG_SECONDS = 100.0
MUTANT_SECONDS = 0.3
"""What a mutant's passes have at least: twenty times what such passes take on a quiet machine."""
# Larger than a page: smaller layers lie at their own phase in a slot and would not collide.
TENSORS = tiny_tensors(NUM_LAYERS, hidden=48)
POOLS = {
    "pinned": {"n_gpu": 1, "n_cpu_pinned": 2},
    "both": {"n_gpu": 0, "n_cpu_pinned": 1, "n_cpu": 1},
    "pageable": {"n_gpu": 2, "n_cpu_pinned": 0, "n_cpu": 1},
    "ring": {"n_gpu": 1, "n_cpu_pinned": 0, "n_cpu": 0, "read_chunk": 4096},
    "wide ring": {"n_gpu": 0, "n_cpu_pinned": 0, "n_cpu": 0},
}


class LaunchFailed(Exception):
    """What the test's layer_fn raises after it launched work."""


class Engine:
    """A caller that launches work which checks, when it runs, what the slot holds.

    Each layer's work is launched on the layer's own device.
    """

    def __init__(self, devices: Sequence[FakeDevice], seed: int, dtype: torch.dtype | None) -> None:
        self._devices = devices
        self._random = random.Random(seed)
        self._dtype = dtype
        self._there: Sequence[int] = ()
        """Layers that the pass computes in host memory."""
        self._streams = [[d.default_stream, d.new_stream(), d.new_stream()] for d in devices]

    def run(self, streamer: LayerStreamer, passes: int, *, turns: bool = False) -> None:
        """``turns``: passes go forth and back, mostly; else all go ahead."""
        copiers = [lane.copier for lane in streamer._parts.pipeline.lanes]
        computed = streamer.plan.host_layers
        for number in range(passes):
            on_host = bool(computed) and self._random.random() < 0.6
            self._there = computed if on_host else ()
            if number % 3 == 1:
                # torch deals streams out in turn: the caller may be given the copier's.
                for streams, copier in zip(self._streams, copiers, strict=True):
                    streams += [copier.stream] if copier is not None else []
            fails_at = self._random.choice([None, None, 0, 2, NUM_LAYERS - 1])
            with ExitStack() as stack:
                for device, streams in zip(self._devices, self._streams, strict=True):
                    stack.enter_context(device.on(self._random.choice(streams)))
                way = {"back": bool(number % 2), "turns": True} if turns else {}
                if turns and self._random.random() < 0.2:
                    way = {name: self._random.random() < 0.5 for name in way}
                try:
                    with closing(streamer.sweep(**way, on_host=on_host)) as layers:
                        for i, weights in layers:
                            self._layer(weights, i, fails_at, stack)
                except LaunchFailed:
                    continue

    def _layer(self, weights: Any, layer_idx: int, fails_at: int | None, stack: ExitStack) -> int:
        if layer_idx in self._there:
            for key, tensor in weights.items():
                self._check(tensor, layer_idx, key)()  # the host does not work late
            if layer_idx == fails_at:
                raise LaunchFailed
            return 0
        # More than one piece of work a layer, and sometimes a change of stream in between.
        place = layer_idx % len(self._devices)
        device = self._devices[place]
        for key, tensor in weights.items():
            device.launch(self._check(tensor, layer_idx, key))
            if self._random.random() < 0.3:
                before = device.current_stream()
                stream = self._random.choice(self._streams[place])
                self._order(device, before, stream)
                stack.enter_context(device.on(stream))
        if layer_idx == fails_at:
            raise LaunchFailed
        return 0

    def launch(self, weights: Any, layer_idx: int, fails_at: int | None = None) -> int:
        """A layer_fn that launches its checks on the current stream."""
        device = self._devices[layer_idx % len(self._devices)]
        for key, tensor in weights.items():
            device.launch(self._check(tensor, layer_idx, key))
        if layer_idx == fails_at:
            raise LaunchFailed
        return 0

    def _order(self, device: FakeDevice, before: FakeStream, after: FakeStream) -> None:
        """A change of stream within a layer is ordered by the user: new work waits for old."""
        event = device.new_event()
        event.record(before)
        after.wait_event(event)

    def _check(self, tensor: torch.Tensor, layer_idx: int, key: str) -> Callable[[], None]:
        expected = TENSORS[f"model.layers.{layer_idx}.{key}"]
        expected = expected if self._dtype is None else expected.to(self._dtype)

        def look() -> None:
            if not torch.equal(tensor, expected):
                self._devices[0].errors.append(f"layer {layer_idx} {key}: not its own bytes")

        return look


def find_errors(
    checkpoint: Path, seed: int, options: Mapping[str, Any], seconds: float = HANG_SECONDS
) -> list[str]:
    """Run passes over fake devices with this schedule; what their work saw wrong.

    ``options``: of the streamer, and ``devices`` (1), their number, and whether passes turn
    (``turns``). StreamerError for passes that
    hang for ``seconds``.
    """
    options = dict(options)
    devices = FakeDevice.several(options.pop("devices", 1), seed)
    turns = options.pop("turns", False)
    streamer = open_on(devices, checkpoint, options)
    # A pass that hangs (as a mutation may make it) is ended by closing the streamer.
    guard = threading.Timer(seconds, streamer.close)
    guard.start()
    try:
        with streamer:
            engine = Engine(devices, seed, options.get("dtype"))
            engine.run(streamer, passes=7 if turns else 4, turns=turns)
    finally:
        guard.cancel()
    devices[0].drain()
    return devices[0].errors


def time_without_errors(checkpoint: Path, options: Mapping[str, Any]) -> float:
    """Run five schedules, in which nothing may go wrong; the seconds after which passes hang here
    and now: twenty times what the slowest of them took."""
    slowest = 0.0
    for seed in range(5):
        began = time.monotonic()
        assert not find_errors(checkpoint, seed, options)
        slowest = max(slowest, time.monotonic() - began)
    return max(MUTANT_SECONDS, 20 * slowest)


def seen_errors(checkpoint: Path, options: Mapping[str, Any], seconds: float) -> Iterator[bool]:
    """For schedule after schedule, whether it saw an error or hung for so long."""
    for seed in range(200):
        try:
            yield bool(find_errors(checkpoint, seed, options, seconds))
        except (StreamerError, RuntimeError, IndexError):
            yield True


def open_on(device: Any, checkpoint: Path, options: Mapping[str, Any]) -> LayerStreamer:
    """A streamer with few threads."""
    return open_checkpoint(device, checkpoint, read_threads=2, **options)
