"""Who gets what in which pass, over a runner whose passes take as long as a script says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_runner import SimulatedRunner, Taken, request_of, streamed, text_of

from layer_streamer import ClosedError
from layer_streamer.llm.errors import EngineError, QueueFullError
from layer_streamer.llm.kv.blocks import BLOCK
from layer_streamer.llm.request import Request
from layer_streamer.llm.scheduling.events import Events
from layer_streamer.llm.scheduling.scheduler import Scheduler

TEXTS = st.tuples(
    st.integers(0, 12),  # the step before which it comes
    st.integers(1, 1500),  # tokens of its prompt
    st.integers(1, 6),  # of its text
    st.none() | st.integers(0, 20),  # steps after which it is cancelled
)


def prompt_of(count: int, seed: int = 0) -> list[int]:
    return [(seed + i * i) % 5 for i in range(count)]


def finish(scheduler: Scheduler, most: int = 10_000) -> None:
    """Steps until nothing is left to do."""
    for _ in range(most):
        if not scheduler.running and not scheduler.waiting:
            return
        scheduler.step()
    raise AssertionError("it has not ended")


class Coming:
    """Requests that come and go, each at its step; fails when a rule is broken."""

    def __init__(self, runner: SimulatedRunner, texts: Sequence[Any], max_waiting: int) -> None:
        self.runner, self.texts, self.events = runner, texts, Events()
        self.scheduler = runner.scheduler(max_waiting=max_waiting)
        self.requests = [request_of(prompt_of(n, i), new) for i, (_, n, new, _) in enumerate(texts)]
        self.came, self.admitted = list[Request](), list[Request]()
        self.stalls = 0
        """Passes that brought the oldest prompt less than a block."""
        runner.before_pass = self.look

    def look(self) -> None:
        """Before each pass: rows are those of requests that are there, and none was overtaken."""
        open_ones = [r for r in self.came if not r.cancelled and not r.finish_reason]
        assert set(self.runner.kv.rows) == {r.row for r in open_ones} - {None}
        self.admitted += [r for r in self.came if r.row and r not in self.admitted]

    def step(self, number: int) -> None:
        """Whoever comes and goes, then a pass, which brings each row that decodes its token."""
        scheduler, passes = self.scheduler, len(self.runner.passes)
        for request, (start, _, _, after) in zip(self.requests, self.texts, strict=True):
            if start == number:
                self.submit(request)
            if after is not None and start + after == number:
                scheduler.cancel(request)
        had = {r: len(r.new_ids) for r in scheduler.running if r.decodes}
        oldest = next((r for r in scheduler.running if not r.decodes), None)
        before = oldest.behind if oldest is not None else 0
        scheduler.step()
        assert len(self.runner.passes) - passes <= 1
        assert all(len(r.new_ids) == count + 1 for r, count in had.items()), "it had to wait"
        if oldest is not None and not oldest.new_ids and not oldest.cancelled:
            self.stalls += before - oldest.behind < min(before, BLOCK)

    def submit(self, request: Request) -> None:
        was_full = len(self.scheduler.waiting) == self.scheduler.max_waiting
        try:
            self.scheduler.submit(request, self.events)
            self.came.append(request)
        except QueueFullError:
            assert was_full

    def check(self) -> None:
        """At the end."""
        heard = set[Request]()
        while self.events:
            heard.add(self.events.take()[0])
        for request, (_, n, new, _) in zip(self.requests, self.texts, strict=True):
            expected = text_of(request.prompt_ids, new)
            if request.cancelled or request not in self.came:
                assert request.new_ids == expected[: len(request.new_ids)]
                continue
            fits = -(-(n + new) // BLOCK) * BLOCK <= self.runner.most_tokens
            assert request in heard and (request.error is None) == fits
            assert request.new_ids == (expected if fits else [])
        order = [self.came.index(request) for request in self.admitted]
        assert order == sorted(order), "one was overtaken"


@settings(deadline=None, max_examples=40)
@given(
    st.lists(TEXTS, min_size=1, max_size=10),
    st.integers(6, 24),
    st.integers(1, 6),
    st.integers(1, 10),
)
def test_whatever_comes_and_goes_everybody_gets_his_text_in_his_turn(
    texts: list[Any], blocks: int, max_rows: int, max_waiting: int
) -> None:
    coming = Coming(SimulatedRunner(blocks * BLOCK, max_rows), texts, max_waiting)
    for number in range(200):
        coming.step(number)
        if number > 12 and not coming.scheduler.running and not coming.scheduler.waiting:
            break
    assert not coming.scheduler.running and not coming.scheduler.waiting
    assert coming.stalls <= 3, "one for each size of a pass that is measured"
    assert list(coming.runner.kv.rows) == []
    coming.check()


def test_a_long_prompt_lengthens_no_pass_of_rows_that_decode_by_more_than_the_share() -> None:
    """Once it is known how long passes take; until then few of them."""
    runner = SimulatedRunner(200 * BLOCK, 16)
    scheduler, events = runner.scheduler(), Events()
    talk = [request_of(prompt_of(30, i), 3000) for i in range(8)]
    for request in talk:
        scheduler.submit(request, events)
    for _ in range(4):
        scheduler.step()
    plain, long_ones = runner.took[-1], list[list[float]]()
    for i in range(3):
        long = request_of(prompt_of(16_384, i), 2)
        scheduler.submit(long, events)
        first = len(runner.took)
        while not long.new_ids:
            scheduler.step()
        long_ones.append(runner.took[first:])
    for took in long_ones:
        assert len([seconds for seconds in took if seconds > 1.3 * plain]) <= 3
        assert max(took) < 1.6 * plain
        assert len(took) < 40, "it took its time"
    assert len([seconds for seconds in long_ones[-1] if seconds > 1.3 * plain]) <= 1
    assert long.new_ids[0] == text_of(long.prompt_ids, 1)[0]


def test_a_prompt_that_nobody_waits_for_is_taken_in_one_pass() -> None:
    runner = SimulatedRunner(64 * BLOCK, 4)
    scheduler, events = runner.scheduler(), Events()
    for count in (9000, 5000):
        scheduler.submit(request_of(prompt_of(count, seed=count // 1000), 1), events)
    scheduler.step()
    assert runner.passes == [[(0, 5000), (0, 9000)]]


def test_prompts_get_a_block_a_pass_however_slow_that_is_and_the_oldest_gets_it_first() -> None:
    def slow(rows: Sequence[Taken]) -> float:
        return 0.01 + sum(count for _, count in rows)

    runner = SimulatedRunner(64 * BLOCK, 4, slow)
    scheduler, events = runner.scheduler(), Events()
    scheduler.submit(request_of([1], 50), events)
    for _ in range(3):
        scheduler.step()
    old, young = (request_of(prompt_of(700, i), 1) for i in range(2))
    scheduler.submit(old, events)
    scheduler.submit(young, events)
    first = len(runner.passes)
    while not young.finish_reason:
        scheduler.step()
    parts = [sorted((b, n) for b, n in rows if n > 1) for rows in runner.passes[first:]]
    assert parts == [[(0, 256)], [(256, 256)], [(0, 68), (512, 188)], [(68, 256)], [(324, 256)],
                     [(580, 120)]]  # fmt: skip


def test_how_long_passes_take_without_prompts_is_measured_now_and_then() -> None:
    runner = SimulatedRunner(512 * BLOCK, 4, lambda rows: 0.1 + sum(n for _, n in rows) * 1e-3)
    scheduler, events = runner.scheduler(), Events()
    scheduler.submit(request_of([1], 1000), events)
    scheduler.step()
    scheduler.submit(request_of(prompt_of(100 * BLOCK), 1), events)
    for _ in range(90):
        scheduler.step()
    plain = [i for i, rows in enumerate(runner.passes[1:]) if len(rows) == 1]
    assert plain == [0, 65]


def test_one_that_does_not_fit_is_overtaken_by_none() -> None:
    runner = SimulatedRunner(4 * BLOCK, 4)
    scheduler, events = runner.scheduler(), Events()
    first, large, small = request_of([1], 9), request_of(prompt_of(900), 2), request_of([2], 2)
    for request in (first, large, small):
        scheduler.submit(request, events)
    assert list(scheduler.waiting) == [large, small]
    while first.row and not first.finish_reason:
        scheduler.step()
        assert small.row is None
    finish(scheduler)
    assert small.new_ids == text_of([2], 2) and large.new_ids == text_of(large.prompt_ids, 2)


def test_one_that_can_never_fit_ends_alone_and_holds_up_nobody() -> None:
    runner = SimulatedRunner(4 * BLOCK, 4)
    scheduler, events = runner.scheduler(), Events()
    too_large, small = request_of(prompt_of(2000), 2), request_of([2], 2)
    scheduler.submit(too_large, events)
    assert "2002 tokens: there is no room" in str(too_large.error)
    scheduler.submit(small, events)
    finish(scheduler)
    assert small.new_ids == text_of([2], 2)


def test_a_prompt_whose_length_decides_is_never_taken_in_parts() -> None:
    """It waits for a pass with room for all of it, and no younger prompt goes first."""
    runner = SimulatedRunner(16 * BLOCK, 8, window=1)
    scheduler, events = runner.scheduler(alike=1000), Events()
    for i in range(4):
        scheduler.submit(request_of([i], 20), events)
    for _ in range(3):
        scheduler.step()
    whole, young = request_of(prompt_of(16 * BLOCK - 2), 2), request_of(prompt_of(40), 2)
    scheduler.submit(whole, events)
    scheduler.submit(young, events)
    while not young.new_ids:
        scheduler.step()
        assert whole.passes or not young.passes
    finish(scheduler)
    assert [rows for rows in runner.passes if (0, 16 * BLOCK - 2) in rows]
    assert whole.new_ids == text_of(whole.prompt_ids, 2)
    assert young.new_ids == text_of(young.prompt_ids, 2)


def test_a_request_that_is_cancelled_within_a_pass_is_gone_before_the_next() -> None:
    runner = SimulatedRunner(2 * BLOCK, 4)
    scheduler, events = runner.scheduler(), Events()
    gone, stays, waits = (request_of([i], 5) for i in range(3))
    for request in (gone, stays, waits):
        scheduler.submit(request, events)
    assert list(scheduler.waiting) == [waits]
    runner.in_pass = lambda: scheduler.cancel(gone)
    scheduler.step()
    assert (gone.new_ids, len(stays.new_ids), list(scheduler.running)) == ([], 1, [stays])
    assert list(scheduler.running) == [stays]
    scheduler.step()
    assert list(scheduler.running) == [stays, waits]
    scheduler.cancel(gone)
    scheduler.cancel(gone)
    finish(scheduler)
    assert waits.new_ids == text_of([2], 5)


def test_requests_of_a_client_that_is_gone_are_cancelled() -> None:
    runner = SimulatedRunner(2 * BLOCK, 4)
    scheduler, events, others = runner.scheduler(), Events(), Events()
    for _ in range(2):
        scheduler.submit(request_of([1], 500), others)
    waits = request_of([3], 2)
    scheduler.submit(waits, events)
    scheduler.step()
    del others
    scheduler.step()
    assert list(scheduler.running) == [waits]


@pytest.mark.parametrize("where", ["in_pass", "in_end"])
def test_what_cuts_a_pass_off_before_tokens_were_drawn_costs_nobody_a_token(where: str) -> None:
    """Even where some rows have grown by then."""
    runner = SimulatedRunner(8 * BLOCK, 4)
    scheduler, events = runner.scheduler(), Events()
    requests = [request_of(prompt_of(300, i), 6) for i in range(3)]
    for request in requests:
        scheduler.submit(request, events)

    def interrupt() -> None:
        raise KeyboardInterrupt

    for _ in range(6):
        setattr(runner, where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            scheduler.step()
        setattr(runner, where, lambda: None)
        scheduler.step()
    assert [r.new_ids for r in requests] == [text_of(r.prompt_ids, 6) for r in requests]


def test_what_cuts_a_pass_off_after_tokens_were_drawn_ends_rows_that_did_not_get_theirs() -> None:
    runner = SimulatedRunner(8 * BLOCK, 4)
    scheduler, events = runner.scheduler(), Events()
    requests = [request_of([i], 6) for i in range(3)]
    for request in requests:
        scheduler.submit(request, events)
    scheduler.step()

    class Interrupting(list[int]):
        def append(self, token: int) -> None:
            raise KeyboardInterrupt

    requests[1].new_ids = Interrupting(requests[1].new_ids)
    with pytest.raises(KeyboardInterrupt):
        scheduler.step()
    finish(scheduler)
    assert requests[0].new_ids == text_of([0], 6) and requests[0].error is None
    for request in requests[1:]:
        assert isinstance(request.error, EngineError) and "interrupted" in str(request.error)
        assert not request.raises and len(request.new_ids) == 1
    assert list(runner.kv.rows) == []


def test_a_pass_within_a_pass_is_refused() -> None:
    runner = SimulatedRunner(8 * BLOCK, 4)
    scheduler, events, refused = runner.scheduler(), Events(), list[str]()

    def meddle() -> None:
        for call in (scheduler.step, scheduler.close, lambda: scheduler.submit(request, events)):
            with pytest.raises(RuntimeError) as caught:
                call()
            refused.append(str(caught.value))

    request, runner.in_pass = request_of([1], 2), meddle
    scheduler.submit(request, events)
    finish(scheduler)
    assert request.new_ids == text_of([1], 2) and len(set(refused)) == 1


def test_a_closed_scheduler_ends_all_and_takes_none() -> None:
    runner = SimulatedRunner(BLOCK, 4)
    scheduler, events = runner.scheduler(), Events()
    requests = [request_of([i], 6) for i in range(2)]
    for request in requests:
        scheduler.submit(request, events)
    scheduler.step()
    scheduler.close()
    scheduler.close()
    assert {events.take()[0] for _ in requests} == set(requests)
    assert all(isinstance(r.error, ClosedError) and r.raises for r in requests)
    with pytest.raises(ClosedError):
        scheduler.submit(request_of([1], 1), events)
    scheduler.step()
    assert list(runner.kv.rows) == [] and len(runner.passes) == 1


def test_the_script_is_that_of_a_link_and_of_attention() -> None:
    assert streamed([(0, 1)]) == streamed([(9, 1)] * 8) == 0.1 < streamed([(0, 4096)])
    assert streamed([(9000, 512)]) > streamed([(0, 512)])
