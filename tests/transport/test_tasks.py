"""run_all: every result, the first error, interrupts; and no thread left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer.transport import tasks
from layer_streamer.transport.tasks import run_all, start_thread

SECONDS = 100.0


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("layer-streamer-task")]


class Boom(Exception):
    """What the tests' own tasks raise."""


@settings(deadline=None, max_examples=40)
@given(count=st.integers(0, 30), threads=st.integers(1, 9))
def test_every_result_is_told_to_the_calling_thread_and_returned_in_order(
    count: int, threads: int
) -> None:
    results: list[int] = []
    callers: set[threading.Thread] = set()

    def on_done(result: int) -> None:
        results.append(result)
        callers.add(threading.current_thread())

    returned = run_all([partial(int, i) for i in range(count)], threads, on_done=on_done)
    assert returned == sorted(results) == list(range(count))
    assert callers <= {threading.current_thread()}


@pytest.mark.parametrize(
    ("count", "threads", "expected"), [(3, 8, 3), (8, 3, 3), (1, 1, 1), (0, 4, 0)]
)
def test_no_more_threads_are_started_than_there_are_tasks_or_are_allowed(
    monkeypatch: pytest.MonkeyPatch, count: int, threads: int, expected: int
) -> None:
    started: list[threading.Thread] = []
    monkeypatch.setattr(
        tasks, "start_thread", lambda thread: (started.append(thread), thread.start())
    )
    run_all([lambda: None] * count, threads)
    assert len(set(started)) == len(started) == expected


def test_with_as_many_threads_as_tasks_each_has_one_of_its_own() -> None:
    threads = run_all([threading.current_thread] * 9, 9)
    assert len(set(threads)) == 9


def test_the_first_error_is_raised_and_tasks_not_begun_are_dropped() -> None:
    done: list[int] = []

    def task(i: int) -> int:
        if i == 2:
            raise Boom(i)
        done.append(i)
        return i

    with pytest.raises(Boom, match="2"):
        run_all([partial(task, i) for i in range(100)], 1)
    assert done == [0, 1]


def test_an_error_waits_for_the_tasks_under_way_and_for_no_others() -> None:
    under_way, failed = threading.Event(), threading.Event()
    ended: list[str] = []

    def fail() -> None:
        assert under_way.wait(SECONDS)
        failed.set()
        raise Boom

    def go_on() -> None:
        under_way.set()
        assert failed.wait(SECONDS)
        ended.append("under way")

    late = partial(ended.append, "late")
    with pytest.raises(Boom):
        run_all([go_on, fail, *[late] * 50], 2)
    assert ended[:1] == ["under way"]


def test_an_error_tells_the_tasks_under_way() -> None:
    stopped, under_way, told = threading.Event(), threading.Event(), list[bool]()

    def fail() -> None:
        assert under_way.wait(SECONDS)
        raise Boom

    def go_on() -> None:
        under_way.set()
        told.append(stopped.wait(SECONDS))

    with pytest.raises(Boom):
        run_all([go_on, fail], 2, stopped=stopped)
    assert told == [True]


def test_after_an_error_on_every_thread_one_of_them_is_raised() -> None:
    barrier = threading.Barrier(4, timeout=SECONDS)

    def fail(i: int) -> None:
        barrier.wait()
        raise Boom(i)

    with pytest.raises(Boom):
        run_all([partial(fail, i) for i in range(4)], 4)


def test_a_task_that_raises_what_ends_an_interpreter_is_an_error_like_any_other() -> None:
    def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        run_all([leave], 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, Boom])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_an_interrupt_in_on_done_stops_the_rest(error: type[BaseException], at: int) -> None:
    begun: list[int] = []
    gate = threading.Semaphore(at + 1)

    def task(i: int) -> int:
        assert gate.acquire(timeout=SECONDS)
        begun.append(i)
        return i

    def on_done(result: int) -> None:
        if result == at:
            # What is begun by now may end: the rest must not be.
            gate.release()
            raise error

    with pytest.raises(error):
        run_all([partial(task, i) for i in range(100)], 1, on_done=on_done)
    assert len(begun) <= at + 2
    assert begun[: at + 1] == list(range(at + 1))


class Late(threading.Thread):
    """One that the system runs late, and whose start is interrupted before that."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.gate = threading.Event()
        started, wait = self._started, self._started.wait  # type: ignore[attr-defined]

        def interrupted(timeout: float | None = None) -> bool:
            started.wait = wait
            threading.Timer(0.1, self.gate.set).start()
            raise KeyboardInterrupt

        started.wait = interrupted

    def _bootstrap(self) -> None:
        self.gate.wait(SECONDS)
        super()._bootstrap()  # type: ignore[misc]


def test_a_thread_whose_start_was_interrupted_can_be_joined() -> None:
    late = Late()
    with pytest.raises(KeyboardInterrupt):
        start_thread(late)
    late.join(SECONDS)  # RuntimeError of one that has not begun
    assert not late.is_alive()


def test_a_thread_that_was_never_made_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it was waited for"))
    with pytest.raises(KeyboardInterrupt):
        start_thread(threading.Thread())
