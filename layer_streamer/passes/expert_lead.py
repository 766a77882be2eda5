"""Experts that the device itself brings to its slots: it keeps their table for a while.

So nobody waits for the host between the choice of experts and their use, and a whole pass can be
captured in a CUDA graph: the host only launches it, and reads afterwards what has happened.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from operator import mul
from typing import Any, NamedTuple

import numpy as np
import torch

from ..checkpoint.experts import ExpertLayer
from ..devices.device import Device, Numbers
from ..errors import ConfigError
from ..experts.policies import Key
from ..experts.slots import Held
from .expert_home import MappedExperts
from .expert_pool import ExpertPool
from .expert_report import ExpertReport

logger = logging.getLogger(__name__)

EMPTY = -(1 << 60)
"""Below all times: rank of the slot that is given first."""


class _Led(NamedTuple):
    """A pool, as the device has it."""

    pool: ExpertPool
    layers: tuple[int, ...]
    experts: int
    """Of each of these at most."""
    table: Any
    pieces: Any


class DeviceLead:
    """Tables of slots on a device, and where it finds experts in page-locked memory.

    Thread rules: the thread that runs passes. Whatever interrupts it, tables on the device are as
    its last kernels have left them, and the host's count as empty until they have heard of that.
    """

    def __init__(
        self,
        pools: Mapping[int, ExpertPool],
        layers: Mapping[int, ExpertLayer],
        home: MappedExperts,
        device: Device,
    ) -> None:
        """ValueError where experts lie in no way that kernels go by."""
        self._kernels = import_module("layer_streamer.devices.slot_kernels")
        self._layers, self._device, self._leads = layers, device, False
        own = {id(pool): pool for pool in pools.values()}
        where = device.torch_device
        with torch.inference_mode(False):
            self._led = [
                self._open(pool, tuple(i for i in layers if pools[i] is pool), home)
                for pool in own.values()
            ]
            self.most_ids = min(self._kernels.MOST_PAIRS, *(len(led.pool) for led in self._led))
            rows = torch.zeros(len(layers), 2 + 3 * self.most_ids, dtype=torch.int32, device=where)
            self._told = dict(zip(layers, rows, strict=True))
            """By layer, what kernels have told of it."""
            self._rows = rows
            copies = [torch.empty_like(rows, device="cpu") for _ in range(2)]
            self._heard = [c.pin_memory() if where.type == "cuda" else c for c in copies]
            """Copies for the host, of this pass and the one before."""
        self._done = [device.new_event() for _ in self._heard]
        self._passes, self.in_pass = 0, False

    def _open(self, pool: ExpertPool, layers: tuple[int, ...], home: MappedExperts) -> _Led:
        kernels, where = self._kernels, self._device.torch_device
        experts = max(self._layers[i].num_experts for i in layers)
        if len(pool) > kernels.MOST_SLOTS:
            raise ValueError(f"{len(pool)} slots in one table")
        sources, targets = _places(home, self._layers, layers, experts)
        every = [*sources.ravel(), *targets.ravel(), pool.slot_nbytes, pool.slab.data_ptr()]
        word = int(np.gcd.reduce(np.array([*every, max(kernels.WORDS)], dtype=np.int64)))
        chunks = kernels.cut(targets[:, 1].tolist(), word)
        pieces = kernels.Pieces(
            torch.from_numpy(sources).to(where),
            torch.from_numpy(targets).to(where),
            torch.tensor(chunks, dtype=torch.int32, device=where),
            word,
        )
        keys, slots = len(layers) * experts, len(pool)
        table = kernels.Table(
            torch.full((keys,), -1, dtype=torch.int32, device=where),
            torch.full((slots,), -1, dtype=torch.int32, device=where),
            torch.zeros(slots, dtype=torch.int64, device=where),
            torch.zeros(2, dtype=torch.int64, device=where),
        )
        return _Led(pool, layers, experts, table, pieces)

    def prove(self, home: MappedExperts) -> None:
        """ValueError unless the first expert of each pool comes to a slot as the host has it."""
        kernels = self._kernels
        for led in self._led:
            keys, ranks = torch.full_like(led.table.slots, -1), led.table.ranks
            table = kernels.Table(
                keys, torch.full_like(keys[:1], -1), ranks[:1] - 1, ranks.new_zeros(2)
            )
            ids, told = ranks.new_zeros(1), torch.zeros(5, dtype=torch.int32, device=ranks.device)
            slab = torch.zeros(led.pool.slot_nbytes, dtype=torch.uint8, device=ranks.device)
            kernels.place(table, ids, kernels.Layer(0, led.experts, 0), torch.empty_like(ids), told)
            kernels.fill(led.pieces, told, slab, led.pool.slot_nbytes)
            for to, memory in home.places(led.layers[0], 0):
                if not torch.equal(slab[to : to + memory.nbytes].cpu(), memory):
                    raise ValueError("a kernel read something else than the host's memory")

    @property
    def leads(self) -> bool:
        """True: the device has the tables."""
        return self._leads

    def take(self) -> None:
        """The device goes on with the slots, once the current stream is there."""
        if self._leads:
            return
        for led in self._led:
            held = led.pool.lend()
            assert held is not None
            self._upload(led, held)
        self._leads = True

    def begin(self) -> None:
        """A pass begins."""
        self.in_pass = True

    def end(self) -> None:
        """Its work has been enqueued."""
        self.in_pass = False
        turn = (self._passes + 1) % 2
        self._device.launch(partial(self._heard[turn].copy_, self._rows, non_blocking=True))
        self._done[turn].record(self._device.current_stream())
        self._device.launch(self._rows.zero_)
        self._passes += 1

    def give_back(self, *, spoilt: bool = False) -> None:
        """The host has the tables again: waits for all work on the slots. ``spoilt``: what is in
        these is not what tables say."""
        self.in_pass = False
        if not self._leads:
            return
        stream = self._device.current_stream()
        for done in self._done:
            done.wait(stream)
        stream.synchronize()
        for led in self._led:
            empty = Held(tuple(range(len(led.pool))), {}, {})
            led.pool.take_back(empty if spoilt else self._download(led))
        self._leads = False

    def load(self, layer_idx: int, ids_P: torch.Tensor) -> torch.Tensor:
        """The slots of experts that the current stream has brought when it comes to what follows.
        ConfigError for more than ``most_ids``."""
        if len(ids_P) > self.most_ids:
            raise ConfigError(
                f"layer {layer_idx}: {len(ids_P)} ids at once, the device brings {self.most_ids}"
            )
        kernels, told, count = self._kernels, self._told[layer_idx], self._layers[layer_idx]
        led = next(led for led in self._led if layer_idx in led.layers)
        first = led.layers.index(layer_idx) * led.experts
        layer = kernels.Layer(first, count.num_experts, led.pool.protected)
        ids_P = ids_P.contiguous()
        slots_P = torch.empty_like(ids_P)

        def work() -> None:
            kernels.place(led.table, ids_P, layer, slots_P, told)
            kernels.fill(led.pieces, told, led.pool.slab, led.pool.slot_nbytes)

        with self._device.guard():
            self._device.launch(work)
        return slots_P

    def report(self) -> ExpertReport:
        """What the last pass has asked for: waits for it. Any thread."""
        heard, number = self._heard[0].numpy(), -1
        while number != self._passes:  # meanwhile another has ended
            number = self._passes
            self._done[number % 2].synchronize()
            heard = self._heard[number % 2].numpy().copy()
        missing, counts = heard[:, 0].tolist(), heard[:, 1].tolist()
        first = 2 + 2 * self.most_ids
        ids = heard[:, first : first + max(counts)].tolist()
        each = [layer.expert_nbytes for layer in self._layers.values()]
        rows = zip(self._layers, ids, counts, strict=True)
        return ExpertReport(
            sum(counts),
            sum(counts) - sum(missing),
            sum(map(mul, missing, each)),
            needed=tuple((i, tuple(row[:count])) for i, row, count in rows if count),
        )

    def _upload(self, led: _Led, held: Held) -> None:
        """A table as the host has it."""
        again = int(self._kernels.AGAIN.value)
        slots = np.full(len(led.layers) * led.experts, -1, dtype=np.int32)
        keys = np.full(len(led.pool), -1, dtype=np.int32)
        ranks = np.zeros(len(led.pool), dtype=np.int64)
        ranks[list(held.free)] = EMPTY + np.arange(len(held.free))
        time = 0
        for group, base in ((held.once, 0), (held.again, again)):
            for key, slot in group.items():
                number = self._number(led, key)
                slots[number], keys[slot], ranks[slot] = slot, number, base + time
                time += 1
        clock = np.array([time, len(held.again)])
        for there, here in zip(led.table, (slots, keys, ranks, clock), strict=True):
            self._device.launch(partial(there.copy_, torch.from_numpy(here)))

    def _download(self, led: _Led) -> Held:
        """A table as the device has it, which has done all its work."""
        _, keys, ranks, _ = (part.tolist() for part in led.table)
        again = int(self._kernels.AGAIN.value)
        free, once, later = list[int](), dict[Key, int](), dict[Key, int]()
        for slot in sorted(range(len(ranks)), key=ranks.__getitem__):
            if ranks[slot] < 0:
                free.append(slot)
                continue
            layer, expert = divmod(keys[slot], led.experts)
            group = later if ranks[slot] >= again else once
            group[led.layers[layer], expert] = slot
        return Held(tuple(free), once, later)

    @staticmethod
    def _number(led: _Led, key: Key) -> int:
        return led.layers.index(key[0]) * led.experts + key[1]


def open_lead(
    pools: Mapping[int, ExpertPool],
    layers: Mapping[int, ExpertLayer],
    home: object,
    device: Device,
) -> DeviceLead | None:
    """None, and a line says why, where a device cannot do without the host."""
    problem = "Triton is not installed (pip install triton)"
    if not isinstance(home, MappedExperts):
        problem = "not all experts are in page-locked memory"
    elif find_spec("triton") is not None:
        if all(map(device.reads_host, home.regions)):
            return _proved(pools, layers, home, device)
        problem = "it does not read the host's memory"
    logger.info("%s does not bring experts by itself: %s", device.torch_device, problem)
    return None


def _proved(
    pools: Mapping[int, ExpertPool],
    layers: Mapping[int, ExpertLayer],
    home: MappedExperts,
    device: Device,
) -> DeviceLead | None:
    """None, with a warning, where it does not work: compilers and drivers fail in ways of their
    own."""
    try:
        with device.guard():
            lead = DeviceLead(pools, layers, home, device)
            lead.prove(home)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        problem = f"{type(error).__name__}: {lines[-1] if lines else ''}"
        logger.warning("%s does not bring experts by itself: %s", device.torch_device, problem)
        return None
    return lead


def _places(
    home: MappedExperts, layers: Mapping[int, ExpertLayer], own: Sequence[int], experts: int
) -> tuple[Numbers, Numbers]:
    """Addresses of the pieces of ``experts`` experts of each layer, (keys, pieces); where in a slot
    each piece goes, and its bytes, (pieces, 2). ValueError: that differs between experts."""
    sources = list[list[int]]()
    targets = _targets(home, own[0])
    for layer_idx in own:
        count = layers[layer_idx].num_experts
        for expert in range(count):
            found = list(home.places(layer_idx, expert))
            if [(to, memory.nbytes) for to, memory in found] != targets:
                raise ValueError("experts that share slots are in pieces of different sizes")
            sources.append([memory.data_ptr() for _, memory in found])
        sources += [sources[-1]] * (experts - count)  # nobody asks for these
    return np.array(sources, dtype=np.int64), np.array(targets, dtype=np.int64)


def _targets(home: MappedExperts, layer_idx: int) -> list[tuple[int, int]]:
    return [(to, memory.nbytes) for to, memory in home.places(layer_idx, 0)]
