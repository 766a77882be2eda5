"""The streamer's settings as a value: validated once, never changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ..errors import ConfigError
from .budget import parse_bytes
from .layout import CASTABLE

OnCopy = Callable[[int, object], None]
"""``on_copy(layer_idx, stream)``: called after a layer's copies are enqueued on ``stream``."""

ReadMode = Literal["auto", "buffered", "direct", "mapped"]
"""How files are read: see :attr:`Settings.read_mode`."""
Bytes = int | str
"""A number of bytes, or a string such as "6GiB"."""
DeviceName = str | torch.device

Count = int | Literal["default"] | None
"""Layers of a pool as the published constructor takes them: its None is no such pool, as 0 is."""

logger = logging.getLogger(__name__)

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
MAX_SLOTS = 4096
MAX_READ_THREADS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Every option of a streamer. For the three pools None is the default, and 0 is no such pool.

    What these are by default follows from the machine and from each other, so that no number says
    it: the planner does.
    """

    device: DeviceName | Sequence[DeviceName] | None = None
    """Where layers go; of several devices layer i goes to the one at i % their number. None: the
    GPU if there is one, else the CPU."""
    dtype: torch.dtype | None = None
    """What CASTABLE tensors are cast to; None: as stored."""
    n_gpu: int | None = None
    """Layers held ahead on each device, beside the one in use; >= 0. None: DEFAULT_N_GPU, or fewer
    where ``device_budget`` is too small for that."""
    n_cpu_pinned: int | None = None
    """Layers held ahead in pinned host memory. With no host pool at all, layers pass through a
    small pinned ring, a part at a time. None: no pool, or that of a mapped checkpoint; beside
    ``n_cpu``, and on the CPU, DEFAULT_N_CPU_PINNED."""
    n_cpu: int | None = None
    """Layers held ahead in pageable host memory. None: 0."""
    batch_gpu: int | None = None
    """Layers that the copy step hands on at a time; None: one by one."""
    batch_cpu_pinned: int | None = None
    """Layers handed on at a time out of the pinned pool."""
    batch_cpu: int | None = None
    """Layers handed on at a time out of the pageable pool."""
    device_budget: Bytes | None = None
    """Bytes of each device that may be used; what slots leave holds layers for good. "auto": what
    is free less a margin. None: slots alone."""
    host_budget: Bytes | None = None
    """Bytes of host memory that may be used, likewise. None: slots, or a mapped checkpoint."""
    reserve_bytes: Bytes = 0
    """The caller's part of ``device_budget``."""
    read_mode: ReadMode = "auto"
    """"buffered" reads through the page cache, "direct" past it, "mapped" takes the page cache
    itself for the host's memory; "auto" is what suits the memory there is."""
    read_threads: int | None = None
    """Threads that read. With ``read_chunk`` None as well, direct reads take what a probe of this
    file system found to be the fastest; else None means DEFAULT_READ_THREADS."""
    read_chunk: int | None = None
    """Largest number of bytes one thread reads at a stretch; None: DEFAULT_READ_CHUNK."""
    tail: Sequence[str] = ()
    """Tensors to stream after the last layer."""
    layers: Sequence[int] | None = None
    """Indices of the checkpoint's layers to stream, in this order, each once; None: all of them."""
    on_copy: OnCopy | None = None
    track_progress: bool = False

    @classmethod
    def from_options(cls, **options: Any) -> Settings:
        """Settings from keyword options; one that is None is at its default. TypeError for a name
        that is no option's."""
        fields = cls.__dataclass_fields__
        return cls(**{n: v for n, v in options.items() if v is not None or n not in fields})

    def __post_init__(self) -> None:
        for name, low, high in (
            ("n_gpu", 0, MAX_SLOTS),
            ("n_cpu_pinned", 0, MAX_SLOTS),
            ("n_cpu", 0, MAX_SLOTS),
            ("batch_gpu", 1, MAX_SLOTS),
            ("batch_cpu_pinned", 1, MAX_SLOTS),
            ("batch_cpu", 1, MAX_SLOTS),
            ("read_threads", 1, MAX_READ_THREADS),
            ("read_chunk", 4096, 1 << 30),
        ):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), low, high)
        for name in ("device_budget", "host_budget"):
            if getattr(self, name) not in (None, "auto"):
                parse_bytes(name, getattr(self, name))
        parse_bytes("reserve_bytes", self.reserve_bytes)
        self._check_kinds()

    def _check_kinds(self) -> None:
        if self.read_mode not in get_args(ReadMode):
            modes = ", ".join(get_args(ReadMode))
            raise ConfigError(f"read_mode={self.read_mode!r}: must be one of {modes}")
        if self.dtype is not None and self.dtype not in CASTABLE:
            raise ConfigError(
                f"dtype={self.dtype}: must be float32, float16, bfloat16 or None (as stored)"
            )
        if isinstance(self.tail, str):
            raise ConfigError(f"tail={self.tail!r}: must be a list of tensor names")

    @property
    def num_device(self) -> int:
        """Layers to be held ahead on each device."""
        if self.n_gpu is not None:
            return self.n_gpu
        if self.device is None or isinstance(self.device, str | torch.device):
            return DEFAULT_N_GPU
        return DEFAULT_N_GPU if len(self.device) < 3 else DEFAULT_N_GPU_OF_SEVERAL

    @property
    def through_ring(self) -> bool:
        """True if there is no host pool: layers from disk are read and copied part by part."""
        return not self.n_cpu and not self.n_cpu_pinned

    @property
    def num_pinned(self) -> int:
        """Layers held ahead in pinned host memory (where there is a pool)."""
        return DEFAULT_N_CPU_PINNED if self.n_cpu_pinned is None else self.n_cpu_pinned

    @property
    def num_pageable(self) -> int:
        """Layers held ahead in pageable host memory."""
        return self.n_cpu or 0

    @property
    def names_host_pools(self) -> bool:
        """True if the caller asked for host pools of a certain size, 0 among them."""
        return self.n_cpu_pinned is not None or self.n_cpu is not None

    @property
    def num_readers(self) -> int:
        return self.read_threads or DEFAULT_READ_THREADS

    @property
    def chunk_nbytes(self) -> int:
        return self.read_chunk or DEFAULT_READ_CHUNK


def read_count(count: Count) -> int | None:
    """A pool of the published constructor as :class:`Settings` has it."""
    return None if count == "default" else count or 0


def check_count(name: str, value: object, low: int, high: int) -> None:
    """ConfigError unless ``value`` is an int from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={value!r}: must be an int from {low} to {high}")
    if not low <= value <= high:
        raise ConfigError(f"{name}={value}: must be from {low} to {high}")


def cap_batch(name: str, batch: int | None, slots: int) -> int:
    """Layers to hand on at a time: no more than the pool holds, or it would wait for ever."""
    if batch is None:
        return 1
    if batch > slots:
        logger.info("%s=%d is more than its pool's %d slots: capped", name, batch, slots)
    return min(batch, slots)


def note_unused_batch(name: str, batch: int | None, pool: str) -> None:
    """Say that a batch has no effect because its pool is not there."""
    if batch is not None:
        logger.info("%s=%d has no effect: there is no %s", name, batch, pool)
