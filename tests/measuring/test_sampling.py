"""Rates from jobs on threads: every job once, windows of whole rounds, errors and what is left."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from interrupter import Interrupt, Interrupter

from layer_streamer.measuring.sampling import (
    Effort,
    Job,
    Sampler,
    run_jobs,
    window_rates,
)


def probe_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("layer-streamer-task")]


@given(num_jobs=st.integers(0, 60), threads=st.integers(1, 9))
def test_every_job_is_done_once_by_a_worker_there_is(num_jobs: int, threads: int) -> None:
    done: list[tuple[int, int]] = []
    stamps = run_jobs(lambda worker, number: done.append((worker, number)), num_jobs, threads)
    assert Counter(number for _, number in done) == Counter(range(num_jobs))
    assert {worker for worker, _ in done} <= set(range(threads))
    assert stamps == sorted(stamps)
    assert len(stamps) == num_jobs


def test_no_two_workers_have_the_same_number_at_once() -> None:
    busy = [threading.Lock() for _ in range(4)]

    def job(worker: int, number: int) -> None:
        assert busy[worker].acquire(blocking=False)
        busy[worker].release()

    run_jobs(job, 500, 4)


def test_an_error_in_a_job_is_raised_and_ends_the_others() -> None:
    done: list[int] = []
    failed = threading.Event()

    def job(worker: int, number: int) -> None:
        if number == 2:
            failed.set()
            raise ZeroDivisionError
        # Nobody gets far ahead of the job that fails.
        failed.wait(60)
        done.append(number)

    with pytest.raises(ZeroDivisionError):
        run_jobs(job, 10_000_000, 3)
    assert len(done) < 10_000_000
    assert not probe_threads()


def test_after_an_interrupt_at_any_line_no_job_is_at_work() -> None:
    at_work: set[int] = set()

    def job(worker: int, number: int) -> None:
        at_work.add(worker)
        time.sleep(0)  # others run
        at_work.discard(worker)

    for number in itertools.count():
        try:
            with Interrupter(number, "line") as interrupter:
                run_jobs(job, 200, 3)
        except Interrupt:
            assert not probe_threads() and not at_work
        if not interrupter.fired:
            break
    assert number > 20


@given(
    threads=st.integers(1, 16),
    rounds=st.integers(1, 5),
    samples=st.integers(1, 6),
    rate=st.floats(1e6, 1e11),
)
def test_threads_in_lockstep_have_the_rate_that_they_have(
    threads: int, rounds: int, samples: int, rate: float
) -> None:
    nbytes = 1 << 20
    step = threads * nbytes / rate
    stamps = [step * (i // threads) for i in range(threads * (rounds * samples + 2))]
    found = window_rates(stamps, nbytes, threads, samples)
    assert found == pytest.approx([rate] * samples, rel=1e-6)


def test_the_first_and_the_last_round_do_not_count() -> None:
    # Two threads; a slow start, a second a job each, and an end on one thread alone.
    stamps = [100.0, 100.0, 101, 101, 102, 102, 103, 103, 900, 1900]
    assert window_rates(stamps, 10, threads=2, samples=3) == [20, 20, 20]


class Prepared:
    """Counts the jobs that are prepared for, and those that are done."""

    def __init__(self) -> None:
        self.prepared: list[int] = []
        self.done = 0

    def __call__(self, num_jobs: int) -> Job:
        self.prepared.append(num_jobs)
        return self._job

    def _job(self, worker: int, number: int) -> None:
        self.done += 1


@given(st.data())
def test_a_sampler_does_the_jobs_that_it_prepared_for_and_no_more(data: st.DataObject) -> None:
    samples, threads = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    most = data.draw(st.none() | st.integers(1, 100))
    prepared = Prepared()
    # A time this short asks for the least there can be.
    sampler = Sampler(Effort(seconds=1e-12, samples=samples, most_seconds=60))
    rate = sampler.measure(prepared, 4096, threads, most)
    least = threads * (samples + 2)
    if most is None or most >= max(least, 3):
        assert rate is not None
        assert rate > 0
        assert prepared.prepared[1:] == [least]
    else:
        assert rate is None
    if most is not None:
        assert all(num_jobs <= most for num_jobs in prepared.prepared)
    assert prepared.done == sum(prepared.prepared)


def test_a_measurement_takes_more_rounds_where_there_is_more_time() -> None:
    counts = []
    for seconds in (1e-12, 0.02):
        prepared = Prepared()
        Sampler(Effort(seconds, samples=3, most_seconds=60)).measure(prepared, 1, 2)
        counts.append(prepared.prepared[1])
    assert counts[0] == 10
    assert counts[1] > counts[0]
    assert (counts[1] - 4) % 6 == 0


def test_what_would_take_too_long_is_left_out() -> None:
    prepared = Prepared()
    sampler = Sampler(Effort(seconds=1e-12, samples=3, most_seconds=1e-12))
    assert sampler.measure(prepared, 1 << 40, 2) is None
    assert len(prepared.prepared) == 1
