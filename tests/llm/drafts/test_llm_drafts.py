"""Drafts, whatever they are, change how many passes a text takes and nothing else of it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_model import byte_model
from hypothesis import given
from hypothesis import strategies as st
from small_engine import (
    CHOICES,
    NEW,
    PROMPTS,
    SAMPLED,
    Script,
    drafted,
    make_engine,
    texts_of,
)
from tried import slow_but, tried
from zoo import zoo_model

from layer_streamer.llm.drafts.drafting import MOST_DRAFTED, Drafting
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.request import Known

TIERS: dict[str, dict[str, Any]] = {
    "device": {"kv": "device"},
    "host": {"kv": "host"},
    "eight bits": {"kv": "host", "kv_int8": True, "reproducible": True},
    "chunks": {"kv": "device", "prefill_chunk": 3},
}


def right(rest: list[int], most: int) -> list[int]:
    return rest[:most]


def wrong(rest: list[int], most: int) -> list[int]:
    return [(token + 1) % 200 for token in rest[:most]]


def mixed(seed: int) -> Any:
    """Right for a while, then not; of any length, more than is asked for, none."""
    dice = random.Random(seed)

    def how(rest: list[int], most: int) -> list[int]:
        good = rest[: dice.randrange(6)]
        return good + [dice.randrange(200) for _ in range(dice.randrange(most + 3))]

    return how


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def shared(path: Path) -> Iterator[StreamingEngine]:
    with make_engine(path, lookup=True) as engine:
        yield engine


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    "how",
    [right, wrong, *(pytest.param(mixed(n), marks=pytest.mark.slow) for n in (1, 2))],
    ids=["right", "wrong", "mixed", "mixed otherwise"],
)
def test_the_text_is_the_one_without_drafts(shared: Any, choice: str, how: Any) -> None:
    plain = texts_of(shared, **CHOICES[choice])
    drafted(shared, plain, how, **CHOICES[choice])


@pytest.mark.parametrize("tier", slow_but("eight bits", TIERS))
def test_it_is_so_wherever_keys_and_values_are(path: Path, tier: str) -> None:
    with make_engine(path, lookup=True, **TIERS[tier]) as engine:
        for how, options in ((right, {"temperature": 0.0}), (mixed(3), SAMPLED)):
            drafted(engine, texts_of(engine, **options), how, **options)


@pytest.mark.parametrize(
    ("name", "tier"),
    [
        ("qwen2-window", "device"),
        ("gemma3_text", "host"),
        pytest.param("mistral", "device", marks=pytest.mark.slow),
        pytest.param("mistral", "host", marks=pytest.mark.slow),
        pytest.param("gemma3_text", "device", marks=pytest.mark.slow),
        pytest.param("qwen2-window", "host", marks=pytest.mark.slow),
    ],
)
def test_it_is_so_where_layers_have_windows(tmp_path: Path, name: str, tier: str) -> None:
    """Texts go on beyond the windows, and drafts that are cut back have been in the rings."""
    zoo_model(name).save_pretrained(tmp_path)
    with make_engine(tmp_path, lookup=True, **TIERS[tier]) as engine:
        plain = texts_of(engine, temperature=0.0)
        for how in (right, wrong):
            drafted(engine, plain, how, temperature=0.0)
        drawn: dict[str, Any] = {"temperature": 1.0, "seed": 1}
        drafted(engine, texts_of(engine, **drawn), mixed(4), **drawn)


@pytest.fixture(scope="module")
def exact(path: Path) -> Iterator[StreamingEngine]:
    """Whose logits are the same bits with and without drafts, so that no tie is drawn otherwise."""
    with make_engine(path, lookup=True, reproducible=True) as engine:
        yield engine


@tried(4, 12, seed=st.integers(0, 10**6), new=st.integers(1, 40), stop=st.booleans())
def test_any_drafts_leave_any_text_as_it_is(exact: Any, seed: int, new: int, stop: bool) -> None:
    options: dict[str, Any] = {"temperature": 0.8, "seed": seed, "max_new_tokens": new}
    plain = texts_of(exact, **options)
    if stop and len(plain[0].text) > 4:
        options["stop"] = plain[0].text[2:4]
        plain = texts_of(exact, **options)
    drafted(exact, plain, mixed(seed), **options)


def test_right_drafts_take_as_few_passes_as_there_is_room_for(shared: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.0, "return_details": True}
    shared.scheduler.drafting = None
    for prompt in PROMPTS:
        plain = shared.generate(prompt, **options)
        shared.scheduler.drafting = Drafting({"script": Script([[*prompt, *plain.ids]], right)})
        found = shared.generate(prompt, **options)
        shared.scheduler.drafting = None
        assert found.ids == plain.ids
        assert found.passes == min(len(plain.ids), 2)
        assert found.agreed == len(plain.ids) - found.passes


def test_a_pass_looks_at_no_more_drafted_tokens_than_was_planned_for(shared: Any) -> None:
    plain = texts_of(shared, temperature=0.0)
    forward, most = shared._runner.forward, 0

    def counting(entries: Any, *, drafts: Sequence[Any], **options: Any) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(map(len, drafts)))
        return forward(entries, drafts=drafts, **options)

    shared._runner.forward = counting
    try:
        drafted(shared, plain, lambda rest, asked: [0] * 100, temperature=0.0)
    finally:
        del shared._runner.forward
    assert MOST_DRAFTED // 2 < most <= MOST_DRAFTED


def test_wrong_drafts_cost_no_pass(shared: Any) -> None:
    plain = texts_of(shared, temperature=0.0)
    script = drafted(shared, plain, wrong, temperature=0.0)
    assert script.judged and all(agreed == 0 for _, agreed in script.judged)


@pytest.mark.parametrize("where", ["propose", "accepted", "forget"])
def test_a_drafter_that_raises_costs_its_draft_and_not_the_row(
    shared: Any, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = texts_of(shared, temperature=0.0)

    class Broken(Script):
        pass

    def fail(*args: object) -> Any:
        raise ZeroDivisionError("a drafter")

    setattr(Broken, where, fail)
    script = Broken([[*p, *d.ids] for p, d in zip(PROMPTS, plain, strict=True)], right)
    shared.scheduler.drafting = Drafting({"script": script})
    try:
        found = shared.generate(PROMPTS, max_new_tokens=NEW, temperature=0.0, return_details=True)
    finally:
        shared.scheduler.drafting = None
    assert [done.ids for done in found] == [done.ids for done in plain]
    assert "a drafter" in caplog.text


def test_a_draft_for_which_there_is_no_memory_is_dropped(shared: Any) -> None:
    plain = texts_of(shared, temperature=0.0)
    forward = shared._runner.forward

    def small(entries: Any, **options: Any) -> torch.Tensor:
        if any(row.length and len(ids) > 1 for row, ids in entries):
            raise torch.OutOfMemoryError("no room for so many")
        return forward(entries, **options)

    shared._runner.forward = small
    try:
        drafted(shared, plain, right, temperature=0.0)
    finally:
        del shared._runner.forward


def test_a_kept_row_goes_on_from_what_its_text_is(shared: Any) -> None:
    """A draft reaches beyond the end of the text: what is kept ends where the text does."""
    prompt = PROMPTS[2]
    options: dict[str, Any] = {"temperature": 0.0, "reuse_prefix": True, "return_details": True}
    shared.scheduler.drafting = None
    plain = shared.generate(prompt, max_new_tokens=8, **options)
    longer = [*prompt, *plain.ids, 5, 6]
    after = shared.generate(longer, max_new_tokens=8, **options)
    shared.generate([1], max_new_tokens=1)
    texts = [[*prompt, *plain.ids, *([9] * 30)], [*longer, *after.ids]]
    shared.scheduler.drafting = Drafting({"script": Script(texts, right)})
    try:
        assert shared.generate(prompt, max_new_tokens=8, **options).ids == plain.ids
        assert shared.generate(longer, max_new_tokens=8, **options).ids == after.ids
    finally:
        shared.scheduler.drafting = None


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)), st.data())
def test_ids_of_prompt_and_text_are_as_if_they_were_one_list(
    prompt: list[int], new: list[int], data: st.DataObject
) -> None:
    known, both = Known(tuple(prompt), new), [*prompt, *new]
    assert list(known) == both
    bounds = st.none() | st.integers(-25, 25)
    for _ in range(4):
        step = data.draw(st.sampled_from([None, 1, 2, -1]))
        part = slice(data.draw(bounds), data.draw(bounds), step)
        assert known[part] == both[part]
    for i in range(-len(both), len(both)):
        assert known[i] == both[i]
    with pytest.raises(IndexError):
        known[len(both)]
    new.append(3)
    assert len(known) == len(both) + 1 and known[-1] == 3
