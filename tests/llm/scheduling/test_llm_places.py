"""Requests that begin alike compute what they have in common once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from byte_model import byte_model
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_runner import SimulatedRunner
from small_engine import make_engine
from test_llm_scheduler import finish, request_of

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.errors import NotFiniteError
from layer_streamer.llm.kv.blocks import BLOCK
from layer_streamer.llm.request import Request
from layer_streamer.llm.scheduling.events import Events
from layer_streamer.llm.tuning import Workload

START = [(7 * i * i + i) % 5 for i in range(3 * BLOCK)]
"""What most prompts begin with."""


def run(runner: SimulatedRunner, *prompts: list[int], **fields: Any) -> list[Request]:
    """All at once, to their ends."""
    scheduler, events = runner.scheduler(), Events()
    requests = [request_of(ids, 3) for ids in prompts]
    for request in requests:
        for name, value in fields.items():
            setattr(request, name, value)
        scheduler.submit(request, events)
    finish(scheduler)
    return requests


def test_requests_that_come_together_take_what_is_common_once() -> None:
    runner = SimulatedRunner(32 * BLOCK, 8)
    found = run(runner, *([*START, i, 1, 2] for i in range(5)))
    assert [request.cached for request in found] == [0, *[3 * BLOCK] * 4]
    tokens = sum(count for rows in runner.passes for _, count in rows)
    assert tokens == len(START) + 5 * 3 + 5 * 2, "prompts, and two more of each text"


def test_one_that_comes_later_finds_what_others_have_left() -> None:
    runner = SimulatedRunner(16 * BLOCK, 4)
    (first,) = run(runner, [*START, 1, 2])
    talk = [*START, 1, 2, *first.new_ids]
    (second,) = run(runner, [*talk, *[3] * BLOCK, 4])
    (third,) = run(runner, [*talk, *[3] * BLOCK, 4, *second.new_ids, 1])
    assert (first.cached, second.cached, third.cached) == (0, 3 * BLOCK, 4 * BLOCK)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    runner = SimulatedRunner(16 * BLOCK, 4)
    run(runner, START)
    (again,) = run(runner, START)
    assert again.cached == 2 * BLOCK, "the last block would hold the last token"


def test_what_has_another_salt_is_computed_anew() -> None:
    runner = SimulatedRunner(16 * BLOCK, 4)
    run(runner, [*START, 1], salt=b"one")
    (other,) = run(runner, [*START, 1], salt=b"other")
    (same,) = run(runner, [*START, 1], salt=b"one")
    assert (other.cached, same.cached) == (0, 3 * BLOCK)


def test_one_does_not_wait_for_another_salt() -> None:
    runner = SimulatedRunner(16 * BLOCK, 4)
    scheduler, events = runner.scheduler(), Events()
    for salt in (b"one", b"other"):
        request = request_of([*START, 1], 3)
        request.salt = salt
        scheduler.submit(request, events)
    assert len(scheduler.running) == 2


def test_what_a_row_has_failed_with_is_not_for_others() -> None:
    runner = SimulatedRunner(16 * BLOCK, 4)
    scheduler, events = runner.scheduler(), Events()
    first = request_of([*START, 1], 9)
    scheduler.submit(first, events)
    scheduler.step()
    choose = scheduler._passes.choose
    scheduler._passes.choose = lambda *_: [[NotFiniteError("no numbers")]]  # type: ignore[assignment]
    scheduler.step()
    scheduler._passes.choose = choose  # type: ignore[method-assign]
    assert isinstance(first.error, NotFiniteError)
    second = request_of([*START, 1], 3)
    scheduler.submit(second, events)
    assert second.cached == 0


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 300)), min_size=1,
             max_size=12),
    st.integers(5, 24),
)  # fmt: skip
def test_texts_are_those_of_requests_that_run_alone(
    asked: list[tuple[int, int, int]], blocks: int
) -> None:
    prompts = [[*START[: n * BLOCK], *[kind] * rest] for n, kind, rest in asked]
    together = run(SimulatedRunner(blocks * BLOCK, 3), *prompts)
    for prompt, request in zip(prompts, together, strict=True):
        (alone,) = run(SimulatedRunner(5 * BLOCK, 1), prompt)
        assert request.new_ids == alone.new_ids
        assert request.cached % BLOCK == 0 and request.cached < len(prompt)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StreamingEngine]:
    path: Path = byte_model(
        tmp_path_factory.mktemp("tiny"), num_hidden_layers=2, max_position_embeddings=2048
    )
    options = {"max_length": 1024, "kv_tokens": 4096, "reproducible": True}
    with make_engine(path, **options) as engine:
        yield engine


def test_three_texts_of_a_prompt_cost_one_prefill(exact: StreamingEngine) -> None:
    prompt = [(3 * i) % 200 for i in range(2 * BLOCK + 9)]
    options: dict[str, Any] = {"max_new_tokens": 4, "seed": 1, "temperature": 1.0}
    three = exact.generate(prompt, n=3, return_details=True, **options)
    assert [done.cached_tokens for done in three] == [0, 2 * BLOCK, 2 * BLOCK]
    again = exact.generate(prompt, return_details=True, **options)
    assert again.cached_tokens == 2 * BLOCK and again.ids == three[0].ids


def test_a_second_turn_computes_what_is_new(exact: StreamingEngine) -> None:
    first = [(5 * i + 1) % 200 for i in range(3 * BLOCK - 10)]
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0, "return_details": True}
    answer = exact.generate(first, **options)
    turn = [*first, *answer.ids, 7, 7, 7]
    second = exact.generate(turn, **options)
    assert second.cached_tokens == 3 * BLOCK
    exact.scheduler.places.forget()
    anew = exact.generate(turn, **options)
    assert anew.cached_tokens == 0 and anew.ids == second.ids


def test_each_run_of_a_tune_computes_the_whole_prompt(
    exact: StreamingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = Workload(exact, prompt_tokens=600, new_tokens=1, alive=lambda: None)
    tokens, forward = list[int](), exact._runner.forward

    def spy(entries: Any, **options: Any) -> Any:
        tokens.append(sum(len(ids) for _, ids in entries))
        return forward(entries, **options)

    monkeypatch.setattr(exact._runner, "forward", spy)
    for _ in range(2):
        workload.run()
    assert tokens == [600, 600]
