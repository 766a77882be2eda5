"""How a rate is sampled: jobs on threads, the time at which each ended, equal windows of them."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TypeAlias

from ..transport.tasks import run_all

Job: TypeAlias = Callable[[int, int], object]
"""``job(worker, number)``: piece ``number`` of the work, on thread ``worker``; both from 0."""

FIRST_ROUNDS = 32
"""Jobs that a sampler's first guess of a rate is made from."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long and how often something is measured."""

    seconds: float
    """What one measurement is to take."""
    samples: int
    """Of which the median is taken."""
    most_seconds: float
    """A measurement that would take longer than this even at its shortest is left out."""


class Sampler:
    """Rates of jobs on threads, each measurement sized by the rate that the one before it had."""

    def __init__(self, effort: Effort) -> None:
        self._effort = effort
        self._rate: float | None = None

    def measure(
        self, prepare: Callable[[int], Job], nbytes: int, threads: int, most: int | None = None
    ) -> float | None:
        """Bytes a second of jobs of ``nbytes`` each; None if that takes too long or too many.

        ``prepare(num_jobs)`` makes ready for exactly so many jobs, ``most`` or fewer, and returns
        the job.
        """
        if self._rate is None:
            first = min(FIRST_ROUNDS + 2, most or FIRST_ROUNDS + 2)
            if first < 3:
                return None
            stamps = run_jobs(prepare(first), first, 1)
            (self._rate,) = window_rates(stamps, nbytes, threads=1, samples=1)
        num_jobs = self._num_jobs(self._rate, nbytes, threads, most)
        if num_jobs is None:
            return None
        stamps = run_jobs(prepare(num_jobs), num_jobs, threads)
        self._rate = median(window_rates(stamps, nbytes, threads, self._effort.samples))
        return self._rate

    def _num_jobs(self, rate: float, nbytes: int, threads: int, most: int | None) -> int | None:
        """Jobs for the time there is, in whole rounds of all threads; None: not even the least."""
        effort = self._effort
        rounds = rate * effort.seconds / (effort.samples * threads * nbytes)
        if most is not None:
            rounds = min(rounds, (most // threads - 2) / effort.samples)
            if rounds < 1 and threads * (effort.samples + 2) > most:
                return None
        num_jobs = threads * (max(1, int(rounds)) * effort.samples + 2)
        if rounds < 1 and num_jobs * nbytes / rate > effort.most_seconds:
            return None
        return num_jobs


def window_rates(stamps: Sequence[float], nbytes: int, threads: int, samples: int) -> list[float]:
    """Bytes a second in each of ``samples`` equal windows of the times at which jobs ended.

    The first round (a job a thread) is the warm-up and the last one, in which threads run out of
    work, is not counted either. A window is whole rounds, since threads may run in step.
    """
    rounds = (len(stamps) // threads - 2) // samples
    edges = [threads * (1 + rounds * k) - 1 for k in range(samples + 1)]
    return [
        rounds * threads * nbytes / max(stamps[end] - stamps[begin], 1e-9)
        for begin, end in itertools.pairwise(edges)
    ]


def run_jobs(job: Job, num_jobs: int, threads: int) -> list[float]:
    """Do jobs 0 to ``num_jobs - 1``, in order, on ``threads`` threads; when each ended, sorted.

    If one raises, or the caller is interrupted, the threads end after the job that they are at.
    """
    numbers = itertools.count()
    stopped = threading.Event()

    def work(worker: int) -> list[float]:
        ends = []
        # next() of a count is atomic.
        while not stopped.is_set() and (number := next(numbers)) < num_jobs:
            job(worker, number)
            ends.append(time.perf_counter())
        return ends

    ends = run_all([partial(work, worker) for worker in range(threads)], threads, stopped=stopped)
    return sorted(itertools.chain.from_iterable(ends))
