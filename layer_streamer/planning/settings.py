"""The streamer's settings as a value: validated once, never changed."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Unpack, cast

import torch

from ..errors import ConfigError
from .budget import parse_bytes
from .layout import CASTABLE
from .options import OPTIONS, Options, ReadMode, check_names

Count = int | Literal["default"] | None
"""Layers of a pool as the published constructor takes them: its None is no such pool, as 0 is."""

DEFAULT_N_GPU = 2
DEFAULT_N_GPU_OF_SEVERAL = 4
"""Links that share a host are uneven from moment to moment: measured, see docs/benchmarks."""
DEFAULT_N_CPU_PINNED = 4
DEFAULT_READ_THREADS = 8
DEFAULT_READ_CHUNK = 8 << 20
RING_CHUNKS = {"direct": 1 << 20, "buffered": 8 << 20}
"""Default bytes a read where layers pass through a ring, by read mode: all of it should stay in the
CPU's cache, but what is read from the page cache comes so fast that each read's own cost counts."""
RING_SLOTS_PER_READER = 2
"""One that is being filled, one that is being copied."""


@dataclass(frozen=True, slots=True, init=False)
class Settings:
    """A streamer's options, each at a value that is allowed; what follows from them alone.

    For the three pools None is the default, and 0 is no such pool. What these are by default
    follows from the machine and from each other, so that no number says it: the planner does.
    """

    asked: Options
    """Of all options (the table is :mod:`.options`) the value, or the default of the keyword."""

    def __init__(self, **options: Unpack[Options]) -> None:
        """One that is None is at its default. Raises ConfigError, TypeError for an unknown name."""
        check_names(options)
        whole: dict[str, Any] = {name: option.default for name, option in OPTIONS.items()}
        for name, value in options.items():
            if value is not None:
                if kind := OPTIONS[name].kind:
                    kind.check(name, value)
                whole[name] = value
        # The one check that needs torch, which the table does without.
        if (dtype := options.get("dtype")) is not None and dtype not in CASTABLE:
            raise ConfigError(
                f"dtype={dtype}: must be float32, float16, bfloat16 or None (as stored)"
            )
        if whole["experts"] == "demand" and whole["host_layers"]:
            raise ConfigError(
                "host_layers: with experts='demand', experts come to the device alone"
            )
        object.__setattr__(self, "asked", MappingProxyType(whole))

    def but(self, **options: Unpack[Options]) -> Settings:
        """The same except for these."""
        return Settings(**self.asked | options)

    @property
    def num_device(self) -> int:
        """Layers to be held ahead on each device."""
        n_gpu, device = self.asked["n_gpu"], self.asked["device"]
        if n_gpu is not None:
            return n_gpu
        if device is None or isinstance(device, str | torch.device):
            return DEFAULT_N_GPU
        return DEFAULT_N_GPU if len(device) < 3 else DEFAULT_N_GPU_OF_SEVERAL

    @property
    def through_ring(self) -> bool:
        """True if there is no host pool: layers from disk are read and copied part by part."""
        return not self.asked["n_cpu"] and not self.asked["n_cpu_pinned"]

    @property
    def num_pinned(self) -> int:
        """Layers held ahead in pinned host memory (where there is a pool)."""
        pinned = self.asked["n_cpu_pinned"]
        return DEFAULT_N_CPU_PINNED if pinned is None else pinned

    @property
    def num_pageable(self) -> int:
        """Layers held ahead in pageable host memory."""
        return self.asked["n_cpu"] or 0

    @property
    def host_slots(self) -> dict[str, int]:
        """Slots of each host pool by its name, in the order that layers pass through them: one more
        than are held ahead. None where they pass through a ring."""
        ahead = {"host": self.num_pageable, "pinned": self.num_pinned}
        return {name: n + 1 for name, n in ahead.items() if n and not self.through_ring}

    @property
    def names_host_pools(self) -> bool:
        """True if the caller asked for host pools of a certain size, 0 among them."""
        return self.asked["n_cpu_pinned"] is not None or self.asked["n_cpu"] is not None

    @property
    def read_mode(self) -> ReadMode:
        """What was asked for; "auto" is what suits the memory there is."""
        return cast(ReadMode, self.asked["read_mode"])

    def reserves(self, num_devices: int) -> tuple[int, ...]:
        """By device, the caller's part of ``device_budget``. ConfigError for a list of another
        length."""
        asked: Any = self.asked["reserve_bytes"] or 0
        some = tuple(asked) if isinstance(asked, list | tuple) else (asked,) * num_devices
        if len(some) != num_devices:
            raise ConfigError(
                f"reserve_bytes={asked!r}: {len(some)} numbers for {num_devices} devices"
            )
        return tuple(parse_bytes("reserve_bytes", one) for one in some)

    @property
    def num_readers(self) -> int:
        return self.asked["read_threads"] or DEFAULT_READ_THREADS

    @property
    def chunk_nbytes(self) -> int:
        return self.asked["read_chunk"] or DEFAULT_READ_CHUNK


def read_count(count: Count) -> int | None:
    """A pool of the published constructor as :class:`Settings` has it."""
    return None if count == "default" else count or 0
