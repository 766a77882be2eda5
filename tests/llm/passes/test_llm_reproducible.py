"""A row's logits and text are the same bits, whatever shares its passes and wherever keys are."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from assets import open_runner, relative_error, tiny_checkpoint
from byte_model import byte_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_engine import PROMPTS, drafts_always, make_engine
from zoo import CASES, IDS, MIXTURES, reference, zoo_model

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.metadata import load_config
from layer_streamer.llm.passes.aligned_attention import KEYS
from layer_streamer.llm.passes.chunking import Chunking
from layer_streamer.llm.passes.runner import Runner
from layer_streamer.llm.weights.arithmetic import TILE, Reproducible, multiply_tiles

LENGTH = 150
"""Of the text: longer than windows, and than a block of keys."""
TEXT = (IDS * 2)[:LENGTH]
PATHS: dict[str, dict[str, Any]] = {
    "device": {"chunking": Chunking(tokens=64)},
    "host": {"host_layers": (0, 1, 2), "chunking": Chunking(tokens=7)},
    "some on the host": {"host_layers": (1,), "chunking": Chunking(group_rows=True)},
    "eight bits": {"host_layers": (0, 1, 2), "int8": True, "chunking": Chunking(tokens=7)},
}
DRAWN = [
    ("llama", torch.float32, "some on the host"),
    ("gemma3_text", torch.bfloat16, "host"),
    ("mistral", torch.bfloat16, "eight bits"),
    ("qwen2_moe", torch.float32, "device"),
]
ALL = [(name, dtype, path) for name in CASES for dtype in (torch.float32, torch.bfloat16)
       for path in PATHS if "dynamic" not in name and (name, dtype, path) not in DRAWN]  # fmt: skip


@contextmanager
def opened(directory: Path, case: tuple[str, torch.dtype, str]) -> Iterator[Runner]:
    name, dtype, path = case
    tiny_checkpoint(directory, zoo_model(name).to(dtype))
    options = dict(PATHS[path])
    options["chunking"] = replace(options["chunking"], reproducible=True)
    config = load_config(directory)
    with open_runner(directory, config, tokens=1024, max_rows=3, dtype=dtype, **options) as runner:
        yield runner


def whole(runner: Runner) -> torch.Tensor:
    """Logits after each token of the text, in one pass of its own."""
    row = runner.kv.rows.add(LENGTH)
    assert row is not None
    found = runner.forward([(row, TEXT)], every_position=True)
    runner.kv.rows.drop(row)
    return found


def torn(runner: Runner, seed: int, most: int) -> torch.Tensor:
    """The same in passes of 1 to ``most`` tokens, beside other rows; some of the tokens behind
    them were drafts, which are cut back."""
    dice = random.Random(seed)
    row, found = runner.kv.rows.add(LENGTH + 8), []
    beside = [runner.kv.rows.add(400) for _ in range(dice.randrange(3))]
    assert row is not None
    while row.length < LENGTH:
        at = row.length
        own = TEXT[at : at + dice.randint(1, most)]
        wrong = dice.choices(IDS, k=dice.randrange(5))
        entries = [(row, [*own, *wrong])]
        for other in beside:
            if other is not None and dice.random() < 0.6 and other.length < 300:
                place = dice.randrange(len(entries) + 1)
                entries.insert(place, (other, dice.choices(IDS, k=dice.randint(1, 9))))
        logits = runner.forward(entries, every_position=True)
        pieces = dict(zip((r.uid for r, _ in entries), logits.split([len(p) for _, p in entries]),
                          strict=True))  # fmt: skip
        found.append(pieces[row.uid][: len(own)])
        assert runner.kv.rows.truncate(row, at + len(own)) == at + len(own)
    for taken in (row, *beside):
        if taken is not None:
            runner.kv.rows.drop(taken)
    return torch.cat(found)


def check(directory: Path, case: tuple[str, torch.dtype, str], seeds: Sequence[int]) -> None:
    with opened(directory, case) as runner:
        expected = whole(runner)
        for seed in seeds:
            assert torch.equal(torn(runner, seed, (1, 4, 40)[seed % 3]), expected)
    if case[1] == torch.float32 and not (case[0] in MIXTURES and case[2] == "eight bits"):
        bound = 0.1 if case[2] == "eight bits" else 1e-5
        assert relative_error(expected, reference(zoo_model(case[0]), TEXT)) <= bound


@pytest.mark.parametrize("case", DRAWN, ids=str)
def test_logits_are_the_same_bits_however_a_text_is_torn(tmp_path: Path, case: Any) -> None:
    check(tmp_path, case, (1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_it_is_so_for_every_model_and_tier(tmp_path: Path, case: Any) -> None:
    check(tmp_path, case, range(3))


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with opened(tmp_path_factory.mktemp("zoo"), DRAWN[0]) as running:
        yield running


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), most=st.integers(3, 60))
def test_any_tear_gives_the_same_bits(runner: Runner, seed: int, most: int) -> None:
    assert torch.equal(torn(runner, seed, most), whole(runner))


def test_keys_and_values_on_any_tier_give_the_same_bits(tmp_path: Path) -> None:
    found = []
    for path in ("device", "host", "some on the host"):
        with opened(tmp_path, ("gemma3_text", torch.bfloat16, path)) as running:
            found.append(whole(running))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@settings(max_examples=150)
@given(st.integers(0, 10**6), st.integers(1, 3 * TILE), st.integers(1, 90), st.integers(1, 90),
       st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))  # fmt: skip
def test_a_tokens_product_is_the_same_in_any_place_of_a_tile(seed, tokens, rows, width, dtype):
    dice = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, width, generator=dice).to(dtype) for n in (tokens, rows))
    order = torch.randperm(tokens, generator=dice)
    some = order[: 1 + seed % tokens]
    expected, found = x.new_empty(tokens, rows), x.new_empty(len(some), rows)
    multiply_tiles(x, w, expected)
    multiply_tiles(x[some], w, found)
    assert torch.equal(found, expected[some])


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 90),
       st.sampled_from(["silu", "gelu_pytorch_tanh"]))  # fmt: skip
def test_a_tokens_norm_and_activation_are_the_same_among_any_others(seed, tokens, width, kind):
    dice = torch.Generator().manual_seed(seed)
    x, up = torch.randn(2, tokens, width, generator=dice)
    weight, way = torch.rand(width, generator=dice), Reproducible(torch.device("cpu"))
    alone = slice(seed % tokens, seed % tokens + 1)
    assert torch.equal(way.rms_norm(x, weight, 1e-5)[alone], way.rms_norm(x[alone], weight, 1e-5))
    gate: Callable[..., torch.Tensor] = F.silu if kind == "silu" else F.gelu
    one, every = way.gated(x[alone].clone(), up[alone], kind), way.gated(x.clone(), up, kind)
    assert torch.equal(every[alone], one)
    torch.testing.assert_close(every, gate(x) * up, atol=2e-3, rtol=2e-3)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("tiny"))


REPEATING = [prompt * 4 for prompt in PROMPTS[:3]]


def texts(engine: StreamingEngine, **options: Any) -> list[Any]:
    """Those of all prompts in a batch, then each by itself."""
    options = {"max_new_tokens": 10, "return_details": True} | options
    together = [done.ids for done in engine.generate(REPEATING, **options)]
    seeds = range(options.get("seed", 0), 99)
    alone = [
        engine.generate(prompt, **(options | {"seed": seed})).ids
        for prompt, seed in zip(REPEATING, seeds, strict=False)
    ]
    return [together, alone]


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16]
)
def test_texts_are_the_same_with_and_without_lookup_alone_and_in_a_batch(
    path: Path, dtype: torch.dtype
) -> None:
    greedy: list[Any] = []
    drawn: list[Any] = []
    for lookup, kv in ((False, "device"), (True, "host")):
        options = {"lookup": lookup, "kv": kv, "prefill_chunk": 5 if kv == "host" else None}
        with make_engine(path, reproducible=True, dtype=dtype, **options) as engine:
            if lookup:
                drafts_always(engine)
            greedy += texts(engine, temperature=0.0)
            drawn += texts(engine, temperature=0.7, top_k=30, seed=3)
            details = engine.generate(REPEATING[2], max_new_tokens=20, return_details=True)
            assert bool(details.agreed) == lookup, "nothing was drafted"
    assert greedy == greedy[:1] * len(greedy) and drawn == drawn[:1] * len(drawn)
    assert greedy[0] != drawn[0]


@pytest.mark.parametrize("draft", ["model", pytest.param("self", marks=pytest.mark.slow)])
def test_texts_are_the_same_with_drafts_of_models(path: Path, draft: str) -> None:
    found: list[Any] = []
    for chosen in (None, path if draft == "model" else draft):
        with make_engine(path, reproducible=True, draft=chosen, lookup=bool(chosen)) as engine:
            if chosen is not None:
                drafts_always(engine)
            found += texts(engine, temperature=0.0)
            found += texts(engine, temperature=0.7, top_k=30, seed=3)
    assert found[:2] == found[4:6] and found[2:4] == found[6:]
    assert found[0] == found[1] and found[2] == found[3]


def test_the_plan_has_room_for_tiles(path: Path) -> None:
    taken = []
    for reproducible in (False, True):
        with make_engine(path, reproducible=reproducible) as engine:
            taken.append(engine.plan.device["temporaries"])
    # Two blocks of keys and values in float32, of two groups of heads of 8 numbers, are in it.
    assert taken[1] >= taken[0] + 4 * 2 * 2 * KEYS * 2 * 8


def test_a_rotation_by_the_length_of_a_pass_is_refused_beyond_where_it_begins(
    tmp_path: Path,
) -> None:
    tiny_checkpoint(tmp_path, zoo_model("llama-dynamic"))
    with pytest.raises(ValueError, match=r"reproducible=True: .* beyond max_length=32"):
        make_engine(tmp_path, reproducible=True, max_length=33)
    make_engine(tmp_path, reproducible=True, max_length=32, kv_tokens=32).close()


def test_rows_of_a_runner_that_is_reproducible_cannot_be_captured() -> None:
    with pytest.raises(ValueError, match="captured"):
        Chunking(captured_rows=2, reproducible=True)
