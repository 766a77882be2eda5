"""The streamer's settings as a value: validated once, never changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch

from .errors import ConfigError
from .layout import CASTABLE

OnCopy = Callable[[int, object], None]
"""``on_copy(layer_idx, stream)``: called after a layer's copies are enqueued on ``stream``."""

logger = logging.getLogger(__name__)

DEFAULT_READ_THREADS = 8
DEFAULT_READ_CHUNK = 8 << 20
MAX_SLOTS = 4096
MAX_READ_THREADS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """Sizes of the pools and batches, and how the disk is read."""

    n_gpu: int = 2
    """Layers held ahead on the device, beside the one in use; >= 0."""
    n_cpu_pinned: int | None = 4
    """Layers held ahead in pinned host memory; None or 0: no pinned pool."""
    n_cpu: int | None = None
    """Layers held ahead in pageable host memory; None or 0: no pageable pool."""
    batch_gpu: int | None = None
    """Layers that the copy step hands on at a time; None: one by one."""
    batch_cpu_pinned: int | None = None
    """Layers handed on at a time out of the pinned pool."""
    batch_cpu: int | None = None
    """Layers handed on at a time out of the pageable pool."""
    read_threads: int | None = None
    """Threads that read; None: DEFAULT_READ_THREADS."""
    read_chunk: int | None = None
    """Largest number of bytes one thread reads at a stretch; None: DEFAULT_READ_CHUNK."""

    def __post_init__(self) -> None:
        check_count("n_gpu", self.n_gpu, 0, MAX_SLOTS)
        for name in ("n_cpu_pinned", "n_cpu"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 0, MAX_SLOTS)
        for name in ("batch_gpu", "batch_cpu_pinned", "batch_cpu"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1, MAX_SLOTS)
        if self.read_threads is not None:
            check_count("read_threads", self.read_threads, 1, MAX_READ_THREADS)
        if self.read_chunk is not None:
            check_count("read_chunk", self.read_chunk, 4096, 1 << 30)

    @property
    def num_readers(self) -> int:
        return self.read_threads or DEFAULT_READ_THREADS

    @property
    def chunk_nbytes(self) -> int:
        return self.read_chunk or DEFAULT_READ_CHUNK


@dataclass(frozen=True, slots=True)
class PassConfig:
    """What is streamed beside the layers, and where to."""

    device: str | torch.device | None
    dtype: torch.dtype | None
    """What CASTABLE tensors are cast to; None: as stored."""
    tail: Sequence[str]
    on_copy: OnCopy | None
    track_progress: bool

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in CASTABLE:
            raise ConfigError(
                f"dtype={self.dtype}: must be float32, float16, bfloat16 or None (as stored)"
            )
        if isinstance(self.tail, str):
            raise ConfigError(f"tail={self.tail!r}: must be a list of tensor names")


CONFIG_KEYS = frozenset(field.name for field in fields(PoolConfig))


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
