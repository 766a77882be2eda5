"""A Ctrl-C at every place of a call's way through the scheduler: what it leaves, and for others."""

from __future__ import annotations

from contextlib import suppress
from itertools import count
from typing import Any

import pytest
from interrupter import Interrupt, Interrupter
from simulated_runner import SimulatedRunner, request_of, text_of

from layer_streamer.llm.errors import EngineError
from layer_streamer.llm.kv.blocks import BLOCK
from layer_streamer.llm.request import Request
from layer_streamer.llm.scheduling.client import Client
from layer_streamer.llm.scheduling.scheduler import Scheduler


class Story:
    """One call is asked while another is under way; rows are fewer than their prompts."""

    def __init__(self) -> None:
        self.runner = SimulatedRunner(12 * BLOCK, 3)
        self.scheduler = self.runner.scheduler()
        self.others = [request_of([i], 4) for i in range(2)]
        self.own = [request_of([i] * (1 + 300 * i), 2, keeps=i == 2) for i in range(4)]
        self.other = Client(self.scheduler, self.others).events()
        next(self.other)

    def ask(self) -> None:
        """The whole of one's own."""
        for _ in Client(self.scheduler, self.own).events():
            pass

    def check(self) -> None:
        """The other goes on, or has heard why not; then all is as at first."""
        for _ in self.other:
            pass
        for request in self.others:
            check_text(request)
            assert request.finish_reason
        check_idle(self.scheduler)
        kept = self.own[2].prompt_ids
        again = [request_of([*kept, *text_of(kept, 2), 5], 3, keeps=True)]
        again += [request_of([i] * (1 + 300 * i), 3) for i in range(3)]
        for _ in Client(self.scheduler, again).events():
            pass
        assert [r.new_ids for r in again] == [text_of(r.prompt_ids, 3) for r in again]
        assert list(self.runner.kv.rows) == []


def check_text(request: Request) -> None:
    """It has its text, or an error and as much as it had."""
    whole = text_of(request.prompt_ids, request.max_new_tokens)
    if request.error is None:
        assert request.new_ids == whole
    else:
        assert isinstance(request.error, EngineError)
        assert request.new_ids == whole[: len(request.new_ids)]


def check_idle(scheduler: Scheduler) -> None:
    scheduler.step()
    assert not scheduler.running and not scheduler.waiting
    kept: Any = scheduler.places.kept.row
    assert set(scheduler._runner.kv.rows) <= {kept}


def interrupted_everywhere(kind: str, step: int) -> int:
    """How many places there were."""
    for number in count(0, step):
        story = Story()
        interrupter = Interrupter(number, kind, ("llm/drafts", "llm/text"))
        with suppress(Interrupt), interrupter:
            story.ask()
        if not interrupter.fired:
            return number
        story.check()
    raise AssertionError


def test_an_interrupt_at_any_line_leaves_nothing_and_costs_others_at_most_an_error() -> None:
    assert interrupted_everywhere("line", 151) > 1000


@pytest.mark.slow
def test_an_interrupt_at_any_bytecode_does_so_too() -> None:
    assert interrupted_everywhere("opcode", 5) > 10_000


def test_an_interrupt_that_comes_while_one_is_dealt_with_leaves_nothing_to_wait_for() -> None:
    """What was not cancelled then is, before the next pass."""
    story = Story()

    class Hammered(Scheduler):
        def cancel(self, request: Request) -> None:
            raise Interrupt

    story.scheduler.__class__ = Hammered
    mine = Client(story.scheduler, story.own).events()
    next(mine)
    with pytest.raises(Interrupt):
        mine.close()
    del mine
    story.check()
