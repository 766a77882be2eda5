"""What a probe measures, as a value; its journal: how far it is, and what there is to be said."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import ConfigError
from ..machine.hostmem import available_host_bytes
from .sampling import Effort

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

HOST_MARGIN = 512 * MIB
"""Host memory that the probe leaves to others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """How much is measured. The defaults take under a minute on a machine with a GPU."""

    quick: bool = False
    seconds: float = 0.7
    """What one measurement on the host is to take."""
    copy_seconds: float = 0.3
    """The same for copies to and from a device, of which there are many."""
    samples: int = 5
    """Samples of a measurement; its result is their median."""
    most_seconds: float = 4.0
    """A measurement of the disk that would take longer at its shortest is left out."""
    read_threads: tuple[int, ...] = (1, 2, 4, 8, 16)
    read_chunks: tuple[int, ...] = (MIB, 4 * MIB, 16 * MIB)
    cold_threads: tuple[int, ...] = (1, 4, 16)
    """Threads of cold reads, where direct ones are the rule."""
    cached_threads: tuple[int, ...] = (1, 2, 4, 8, 16)
    buffered_chunk: int = 4 * MIB
    """Bytes of one cold read, and of one piece of a memcpy."""
    cached_chunk: int = MIB
    """Bytes of one read from the page cache: so few that they stay in the processor's cache, which
    is the fastest that there is. Into slots of many MiB such reads go at two thirds of that."""
    memcpy_threads: tuple[int, ...] = (1, 4, 16)
    copy_sizes: tuple[int, ...] = (
        64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 512 * MIB
    )  # fmt: skip
    product_tokens: tuple[int, ...] = (1, 8)
    """Tokens of products on the processor, beside copies."""
    buffer_nbytes: int = GIB
    """The most host memory that buffers take at any time."""
    cached_nbytes: int = GIB
    """The part of a file that is read again and again from the page cache."""
    file_nbytes: int = 4 * GIB
    """Size of the temporary file, where no path is given."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds) and 0 < self.seconds <= 60):
            raise ConfigError(f"seconds={self.seconds}: must be above 0 and at most 60")

    @property
    def effort(self) -> Effort:
        """Of a measurement on the host."""
        return Effort(self.seconds, self.samples, self.most_seconds)


def quick_config() -> ProbeConfig:
    """The settings of ``--quick``: a few seconds in all, and figures to match."""
    return ProbeConfig(
        quick=True,
        seconds=0.15,
        copy_seconds=0.1,
        samples=3,
        most_seconds=1.0,
        read_threads=(1, 4, 16),
        read_chunks=(MIB, 4 * MIB),
        cold_threads=(4,),
        cached_threads=(1, 4, 16),
        copy_sizes=(64 * KIB, MIB, 16 * MIB, 256 * MIB),
        buffer_nbytes=512 * MIB,
        cached_nbytes=256 * MIB,
        file_nbytes=GIB,
    )


class Journal:
    """What a probe tells its caller while it runs: what it measures now, and its remarks."""

    def __init__(self, on_measure: Callable[[str, int], None] | None = None) -> None:
        self._on_measure = on_measure
        self.num_measurements = 0
        """In all; known once the files are open."""
        self.notes: list[str] = []
        """Remarks on the figures, for the reader."""

    def measuring(self, name: str) -> None:
        """The next measurement begins."""
        if self._on_measure is not None:
            self._on_measure(name, self.num_measurements)

    def note(self, text: str) -> None:
        self.notes.append(text)


def buffer_budget(config: ProbeConfig) -> int:
    """Bytes of host memory to use for buffers now. ConfigError if there is too little to begin."""
    available = available_host_bytes()
    budget = min(config.buffer_nbytes, available - HOST_MARGIN)
    least = 2 * max(min(config.read_chunks), config.buffered_chunk)
    if budget < least:
        raise ConfigError(
            f"host memory: {available} bytes are available, the probe needs at least "
            f"{HOST_MARGIN + least}"
        )
    return budget
