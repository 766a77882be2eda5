"""Parts of work that a thread does ahead of whoever needs them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from llm.growth import Growth

HANG_SECONDS = 20.0
NAME = "llm-kv-growth"


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    for thread in threads():
        thread.join(HANG_SECONDS)
    assert not threads()


class Steps:
    """Parts of a growth of which the first one waits for a gate."""

    def __init__(self) -> None:
        self.gate, self.there = threading.Event(), threading.Event()
        self.done: list[int] = []

    def first(self) -> None:
        self.there.set()
        assert self.gate.wait(HANG_SECONDS)
        self.done.append(0)

    def part(self, number: int) -> Callable[[], None]:
        return self.first if number == 0 else lambda: self.done.append(number)


def test_a_part_that_is_needed_before_the_thread_comes_to_it_is_left_to_the_caller() -> None:
    steps = Steps()
    growth = Growth({number: steps.part(number) for number in range(3)})
    growth.start()
    assert steps.there.wait(HANG_SECONDS)
    growth.wait(1)
    growth.wait(7)
    assert steps.done == []
    steps.gate.set()
    growth.wait(0)
    assert steps.done[0] == 0
    for thread in threads():
        thread.join()
    growth.stop()
    assert steps.done == [0, 2]


def test_what_stops_begins_nothing_more_and_ends_what_was_begun() -> None:
    steps = Steps()
    growth = Growth({number: steps.part(number) for number in range(3)})
    growth.start()
    assert steps.there.wait(HANG_SECONDS)
    opener = threading.Thread(target=lambda: open_when_claimed(growth, steps.gate))
    opener.start()
    growth.stop()
    assert steps.done == [0]
    opener.join()
    growth.stop()


def test_after_an_error_no_further_part_is_begun_and_the_one_who_needs_it_hears_of_it() -> None:
    done: list[int] = []

    def broken() -> None:
        raise MemoryError("broken")

    growth = Growth({0: broken, 1: lambda: done.append(1)})
    growth.start()
    for thread in threads():
        thread.join(HANG_SECONDS)
    assert done == []
    growth.wait(1)
    with pytest.raises(MemoryError, match="broken"):
        growth.wait(0)
    growth.stop()


def open_when_claimed(growth: Growth, gate: threading.Event) -> None:
    while not growth._parts[2].claim.locked():
        pass
    gate.set()


def test_a_growth_that_was_never_started_can_be_waited_for_and_stopped() -> None:
    steps = Steps()
    for number in (0, 1):
        growth = Growth({n: steps.part(n) for n in range(2)})
        growth.wait(number)
        growth.stop()
        growth.wait(number)
    growth.start()
    for thread in threads():
        thread.join()
    assert steps.done == [], "one that begins late finds everything claimed"
