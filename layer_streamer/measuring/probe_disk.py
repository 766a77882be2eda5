"""The disk's part of a probe: direct and cold reads by threads and chunk, reads from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from ..machine.limits import ReadRate, ThreadRate
from ..transport.memory import HostArena
from .probe_config import Journal, ProbeConfig
from .probe_copy import host_memory
from .probe_files import Chunk, ProbeFiles, drop_from_cache, is_cached
from .sampling import Job, Sampler, run_jobs

GUESS_CHUNKS = 8
"""Chunks that are read and dropped to see if the file system lets go of them."""


@dataclass(frozen=True, slots=True)
class ReadPoint:
    """One measurement of the disk."""

    mode: str
    """As in :class:`~..machine.limits.ReadRate`, and "cached"."""
    threads: int
    chunk_nbytes: int

    def __str__(self) -> str:
        return f"{self.mode} reads, {several(self.threads)} x {size(self.chunk_nbytes)}"


class DiskProbe:
    """The measurements that files and memory allow, and their execution.

    ``budget``: host memory for buffers, bytes. ``in_memory``: the files are memory, never cold.
    Thread rules: one thread; it starts others.
    """

    def __init__(
        self,
        files: ProbeFiles,
        config: ProbeConfig,
        budget: int,
        journal: Journal,
        *,
        in_memory: bool = False,
    ) -> None:
        self._files = files
        self._config = config
        self._budget = budget
        self._journal = journal
        self._buffered_chunk = _fitting(files, config.buffered_chunk)
        self._cached_chunk = _fitting(files, config.cached_chunk)
        self.reads = self._plan_reads(not in_memory and self._can_be_cold())
        self.cached = [
            ReadPoint("cached", threads, self._cached_chunk)
            for threads in config.cached_threads
            if self._fits(threads, self._cached_chunk)
        ]

    @property
    def num_measurements(self) -> int:
        return len(self.reads) + len(self.cached)

    def measure_reads(self) -> tuple[ReadRate, ...]:
        """Direct and cold reads, each chunk of the files once before any is read again."""
        sampler, rates, left_out = Sampler(self._config.effort), [], []
        with closing(self._arena(self.reads)) as arena:
            for point in self.reads:
                self._journal.measuring(str(point))
                size = point.chunk_nbytes
                # Round the ring a second time, a cold read would come from the cache.
                most = self._files.num_chunks(size) if point.mode == "cold" else None
                prepare = partial(self._prepare, arena, point)
                rate = sampler.measure(prepare, size, point.threads, most)
                if rate is None:
                    left_out.append(str(point))
                else:
                    rates.append(ReadRate(point.mode, point.threads, size, rate))
        if left_out:
            self._journal.note(f"left out, too slow or the files too small: {'; '.join(left_out)}")
        if rates and self._files.read_again:
            self._journal.note(
                f"the {self._files.nbytes / 1e9:.2f} GB there are were read more than once: "
                "a cache below the file system (a drive's, a hypervisor's) may have helped"
            )
        return tuple(rates)

    def measure_cached(self) -> tuple[ThreadRate, ...]:
        """Reads of what has just been read, from the page cache."""
        size = self._cached_chunk
        count = max(1, min(self._config.cached_nbytes // size, self._files.num_chunks(size)))
        chunks = self._files.take(size, count)
        sampler, rates = Sampler(self._config.effort), []
        with closing(self._arena(self.cached)) as arena:
            read = partial(self._read, chunks, arena, "cached")
            run_jobs(read, count, max((point.threads for point in self.cached), default=1))
            if any(is_cached(chunk) is False for chunk in chunks):
                self._journal.note("page-cache reads: the system did not keep what was read")
            for point in self.cached:
                self._journal.measuring(str(point))
                rate = sampler.measure(lambda num_jobs: read, size, point.threads)
                if rate is not None:
                    rates.append(ThreadRate(point.threads, rate))
        return tuple(rates)

    def _plan_reads(self, cold: bool) -> list[ReadPoint]:
        config, refused = self._config, self._files.direct_refused
        grid = [
            (threads, chunk)
            for chunk in config.read_chunks
            for threads in config.read_threads
            if self._files.num_chunks(chunk) and self._fits(threads, chunk)
        ]
        if not cold:
            self._journal.note("cold reads: not measured, the system keeps the file in its cache")
        if refused is not None:
            instead = "cold reads through the page cache instead" if cold else "nothing instead"
            self._journal.note(f"direct reads are refused ({refused}): {instead}")
            return [ReadPoint("cold", *pair) for pair in grid if cold]
        beside = [
            ReadPoint("cold", threads, self._buffered_chunk)
            for threads in config.cold_threads
            if cold and self._fits(threads, self._buffered_chunk)
        ]
        return [ReadPoint("direct", *pair) for pair in grid] + beside

    def _can_be_cold(self) -> bool:
        """True unless the system is seen to keep what it is told to drop (tmpfs, a mapped file)."""
        size = self._buffered_chunk
        chunks = self._files.take(size, min(GUESS_CHUNKS, self._files.num_chunks(size)))
        with closing(self._arena([ReadPoint("cached", 1, size)])) as arena:
            run_jobs(partial(self._read, chunks, arena, "cached"), len(chunks), 1)
        drop_from_cache(chunks)
        return not any(is_cached(chunk) for chunk in chunks)

    def _prepare(self, arena: HostArena, point: ReadPoint, num_jobs: int) -> Job:
        chunks = self._files.take(point.chunk_nbytes, num_jobs)
        if point.mode == "cold":
            drop_from_cache(chunks)
        return partial(self._read, chunks, arena, point.mode)

    def _read(
        self, chunks: Sequence[Chunk], arena: HostArena, mode: str, worker: int, number: int
    ) -> None:
        chunk = chunks[number % len(chunks)]
        begin = worker * chunk.nbytes
        self._files.read(chunk, arena.bytes[0][begin : begin + chunk.nbytes], mode)

    def _arena(self, points: Sequence[ReadPoint]) -> HostArena:
        """Room for a chunk for each thread."""
        nbytes = max((point.threads * point.chunk_nbytes for point in points), default=1)
        return host_memory([nbytes])

    def _fits(self, threads: int, chunk: int) -> bool:
        return threads * chunk <= self._budget


def _fitting(files: ProbeFiles, chunk: int) -> int:
    """``chunk``, or the largest file if that is smaller."""
    return min(chunk, max(file.nbytes for file in files.files))


def size(nbytes: int) -> str:
    """Bytes as KiB or MiB, whichever is whole."""
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


def several(threads: int) -> str:
    """ "1 thread", "4 threads"."""
    return f"{threads} thread{'s' if threads > 1 else ''}"
