"""The engine's transfers over a device that works as late as the waits permit."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable
from typing import Any

import torch
from fake_device import FakeDevice

from layer_streamer.llm.kv.tokens import Numbers
from layer_streamer.llm.kv.transfers import Pair


class Interrupted(Exception):
    """What a KeyboardInterrupt is to a pass: it comes anywhere on the calling thread."""


class LateTransfers:
    """Transfers of a fake device. Leaves out the waits of ``missing``, interrupts now and then."""

    def __init__(self, device: FakeDevice, seed: int, missing: tuple[str, str] | None) -> None:
        self.device, self.missing = device, missing
        self.back: Any = device.new_stream()
        self.names: dict[int, str] = {}
        self.interrupts = 0.0
        self._random, self._thread = random.Random(seed), threading.current_thread()

    def event(self) -> Any:
        return self.device.new_event()

    def current(self) -> Any:
        return self.device.current_stream()

    def record(self, event: Any, stream: Any) -> None:
        self._interrupt()
        event.record(stream)

    def wait(self, event: Any, stream: Any) -> None:
        caller = threading.current_thread() is self._thread
        who = "back" if stream is self.back else "caller" if caller else "copier"
        if (who, self.names.get(id(event), "")) != self.missing:
            event.wait(stream)
        self._interrupt()

    def block(self, event: Any) -> None:
        if self.missing != ("host", ""):
            event.synchronize()
        self._interrupt()

    def copy(self, pairs: Iterable[Pair], stream: Any) -> None:
        with self.device.on(stream):
            for to, source in pairs:
                self.device.copy(to, source)
                self._interrupt()

    def copy_pieces(
        self, to: torch.Tensor, source: torch.Tensor, pieces: Numbers, stream: Any
    ) -> None:
        self.copy([(to[i : i + n], source[i : i + n]) for i, n in pieces.tolist()], stream)

    def finish(self) -> None:
        self.device.drain()

    def _interrupt(self) -> None:
        mine = threading.current_thread() is self._thread
        if mine and self._random.random() < self.interrupts:
            raise Interrupted
