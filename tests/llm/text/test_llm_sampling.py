import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from layer_streamer.llm.generation_config import read_generation_config
from layer_streamer.llm.text.sampling import Sampler, choose_tokens
from layer_streamer.llm.text.sampling_options import (
    OF_TRANSFORMERS,
    Sampling,
    default_sampling,
    merge_options,
)


def draws(sampler: Sampler, logits: torch.Tensor, count: int = 200) -> list[int]:
    return [int(sampler.choose(logits)) for _ in range(count)]


def hot(seed: int | None = None, **options: float) -> Sampler:
    return Sampler(Sampling(**({"temperature": 1.0} | options)), seed=seed)


def test_temperature_zero_takes_the_largest_logit():
    assert int(Sampler().choose(torch.tensor([0.0, 3.0, 2.9]))) == 1


def test_the_same_seed_gives_the_same_draws():
    logits = torch.randn(50)
    assert draws(hot(5), logits) == draws(hot(5), logits)


def test_two_samplers_without_a_seed_differ():
    logits = torch.zeros(1000)
    assert draws(hot(), logits, 20) != draws(hot(), logits, 20)


def test_draws_follow_the_softmax_at_the_temperature():
    logits = torch.tensor([0.0, 2.0, -100.0]) * math.log(2) / 2
    counts = torch.bincount(torch.tensor(draws(hot(0, temperature=0.5), logits, 3000)), minlength=3)
    assert counts[2] == 0
    assert abs(counts[1] / counts[0] - 4.0) < 0.5


def test_a_row_draws_the_same_whatever_is_in_the_batch_beside_it():
    logits = torch.randn(3, 40)
    alone = [int(hot(seed).choose(row)) for seed, row in enumerate(logits)]
    assert choose_tokens(logits, [hot(seed) for seed in range(3)]) == alone
    assert choose_tokens(logits[1:], [hot(1), Sampler()]) == [alone[1], int(logits[2].argmax())]


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.sampled_from([0, 1, 3, 50, 500]),
    st.sampled_from([1.0, 0.9, 0.5, 1e-9]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.sampled_from([1.0, 1.3, 0.7]),
)
def test_what_may_be_drawn_is_what_transformers_leaves(seed, temperature, k, p, min_p, penalty):
    torch.manual_seed(seed)
    logits, seen = torch.randn(50) * 3, torch.randint(0, 50, (7,))
    warpers = LogitsProcessorList([
        RepetitionPenaltyLogitsProcessor(penalty),
        TemperatureLogitsWarper(temperature),
        *([TopKLogitsWarper(k)] if k else []),
        TopPLogitsWarper(p),
        MinPLogitsWarper(min_p),
    ])  # fmt: skip
    expected = warpers(seen[None], logits[None].clone())[0].softmax(0)
    sampler = hot(
        seed, temperature=temperature, top_k=k, top_p=p, min_p=min_p, repetition_penalty=penalty
    )
    sampler.see(seen.tolist())
    found = {int(sampler.choose(logits))}
    assert found <= set(expected.nonzero()[:, 0].tolist())
    if expected.count_nonzero() == 1:
        assert found == {int(expected.argmax())}


def test_draws_with_filters_follow_what_transformers_leaves():
    torch.manual_seed(0)
    logits = torch.randn(30) * 2
    warped = LogitsProcessorList([TopKLogitsWarper(9), TopPLogitsWarper(0.9)])(
        torch.zeros(1, 0, dtype=torch.long), logits[None].clone()
    )
    expected = warped[0].softmax(0)
    found = torch.bincount(
        torch.tensor(draws(hot(1, top_k=9, top_p=0.9), logits, 4000)), minlength=30
    )
    assert (found / 4000 - expected).abs().max() < 0.03


def test_a_penalty_counts_the_tokens_that_were_drawn():
    sampler = Sampler(Sampling(repetition_penalty=1e6), seed=0)
    sampler.see([0])
    assert draws(sampler, torch.tensor([9.0, 3.0, 2.0, 1.0]), 3) == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"top_p": 0}, "top_p=0: must be above 0"),
        ({"top_p": 1.1}, "top_p=1.1: must be from 0 to 1"),
        ({"min_p": -1}, "min_p=-1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0: must be above 0"),
        ({"topk": 3}, "unknown sampling option 'topk' .*top_k"),
    ],
)
def test_an_option_that_makes_no_sense_is_named_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        merge_options(Sampling(), options)
    assert "\n" not in str(caught.value)


def test_defaults_are_those_of_the_generation_config():
    config = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "eos_token_id": 2}
    assert default_sampling(config) == Sampling(temperature=0.7, top_k=20, top_p=0.8)
    greedy = default_sampling(config | {"do_sample": False})
    assert greedy == Sampling(temperature=0, top_k=20, top_p=0.8)
    assert default_sampling({"repetition_penalty": 1.1}).repetition_penalty == 1.1
    merged = merge_options(default_sampling(config), {"temperature": 0, "top_p": None})
    assert merged == Sampling(temperature=0, top_k=20, top_p=0.8)


@pytest.mark.parametrize("named", [{}, {"top_k": None}, {"top_k": 7}, {"top_k": 0}])
def test_a_top_k_that_is_not_named_is_that_of_transformers(named):
    """Its own generation fills a config up so: what is null counts as not named."""
    config = GenerationConfig(do_sample=True, **named)
    config.update(**config._get_default_generation_params(), defaults_only=True)
    for samples in (True, False):
        assert default_sampling(named | {"do_sample": samples}).top_k == config.top_k


TINY = [5e-324, 1e-45, 1e-38, 1.2e-38, 1e-20, 1e-8, 1e-6]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([*TINY, "top_p"]),
    st.sampled_from(
        [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1.1}]
    ),
    st.sampled_from([1.0, 300.0, 3e37]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
)
def test_next_to_0_the_likeliest_token_is_drawn(seed, least, options, spread, dtype, masked):
    torch.manual_seed(seed)
    spread = min(spread, torch.finfo(dtype).max / 4)
    logits = (torch.rand(40) * 2 - 1) * spread
    if masked:
        logits[:20] = -math.inf
    logits[seed % 20 + 20] = 2 * spread
    logits = logits.to(dtype)
    tiny = {"top_p": 5e-324} if least == "top_p" else {"temperature": least}
    sampler = hot(seed, **(options | tiny))
    sampler.see([0, 1])
    assert int(sampler.choose(logits)) == seed % 20 + 20


@pytest.mark.parametrize("temperature", [1e30, 1e38, 1e300, 1.7e308])
def test_at_a_huge_temperature_all_tokens_are_alike_but_those_that_are_ruled_out(temperature):
    logits = torch.tensor([5.0, -math.inf, 1.0, -5.0])
    assert set(draws(hot(0, temperature=temperature), logits)) == {0, 2, 3}


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e-38, 1e38, 1e300])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalty_of_any_size_leaves_a_token_to_be_drawn(penalty, temperature):
    logits = torch.tensor([3.0, 0.0, -2.0, -math.inf, 2.5])
    sampler = Sampler(Sampling(temperature=temperature, repetition_penalty=penalty), seed=1)
    sampler.see([0, 1, 2, 3])
    expected = {4} if penalty > 1 else {0}
    first = int(sampler.choose(logits))
    assert first in ({0, 1, 4} if temperature and penalty > 1 else expected)


NOT_NUMBERS = [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf], [1.0, math.nan]]


@pytest.mark.parametrize("row", NOT_NUMBERS)
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 1}])
def test_a_row_that_is_no_numbers_has_no_token_and_the_others_have_theirs(row, options):
    logits = torch.tensor([[1.0, 2.0], row, [-math.inf, 0.5]])
    found = choose_tokens(logits, [Sampler(), hot(1, **options), hot(2)])
    assert found == [1, None, 1]


def test_what_a_sampler_raises_is_the_choice_of_its_row():
    class Broken(Sampler):
        def choose(self, logits_V):
            raise RuntimeError("no memory")

    broken = Broken(Sampling(temperature=1.0))
    first, second, third = choose_tokens(torch.eye(3), [Sampler(), broken, hot(1, top_k=1)])
    assert (first, third) == (0, 2) and isinstance(second, RuntimeError)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, -(2**70), np.int64(-1), np.uint8(7)])
def test_a_seed_is_any_whole_number_of_which_64_bits_count(seed):
    same = int(seed) % 2**64
    logits = torch.zeros(1000)
    assert draws(hot(seed), logits, 9) == draws(hot(same), logits, 9)


@pytest.mark.parametrize("seed", [1.5, "3", True, np.bool_(True), [1]])
def test_another_seed_is_refused_in_one_line(seed):
    with pytest.raises(ValueError, match=r"seed=.*must be an int"):
        Sampler(Sampling(), seed=seed)


def test_numbers_of_numpy_are_taken_as_pythons_own():
    found = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), min_p=np.float64(0.25))
    assert found == Sampling(temperature=0.5, top_k=3, min_p=0.25)
    assert {type(found.temperature), type(found.top_k)} == {float, int}
    with pytest.raises(ValueError, match=r"top_p=.*must be a number"):
        Sampling(top_p=np.bool_(True))
    with pytest.raises(ValueError, match="temperature=inf"):
        Sampling(temperature=10**400)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
FIELDS = (*OF_TRANSFORMERS, "do_sample", "eos_token_id", "num_beams")
ODD = st.sampled_from([-1, 0, 1, 2, 0.5, 20.0, "0.6", "2", [2, None], [[2]], 1e400, 10**400, True])


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON | ODD))
def test_of_any_generation_config_each_value_is_used_or_named_with_the_file(tmp_path_factory, said):
    directory = tmp_path_factory.getbasetemp()
    (directory / "generation_config.json").write_text(json.dumps(said))
    found = read_generation_config(directory)
    for name, value in said.items():
        noted = any("generation_config.json" in n and f"{name}=" in n for n in found.notes)
        if value is None or noted:
            continue
        if name == "eos_token_id":
            assert found.eos_ids == set(value if isinstance(value, list) else [value])
        elif name == "num_beams":
            assert value == 1
        elif name == "temperature" and not said.get("do_sample"):
            assert found.sampling.temperature == 0
        elif name != "do_sample":
            assert getattr(found.sampling, name) == value or not found.sampling.temperature
    assert all("\n" not in note for note in found.notes)
    caller = {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.0, "repetition_penalty": 1.5}
    assert merge_options(found.sampling, caller) == Sampling(**caller)


@pytest.mark.parametrize(
    "content",
    [b"[1]", b"{", b"", b"\xff\xfe{}", b"null", b"[" * 100_000, b'{"top_k": ' + b"9" * 5000],
)
def test_a_generation_config_that_is_none_is_named_and_left_out(tmp_path, content):
    (tmp_path / "generation_config.json").write_bytes(content)
    found = read_generation_config(tmp_path)
    assert found.sampling == default_sampling({}) and not found.eos_ids
    (note,) = found.notes
    assert str(tmp_path / "generation_config.json") in note and "\n" not in note


def test_a_mark_of_byte_order_is_no_part_of_a_generation_config(tmp_path):
    (tmp_path / "generation_config.json").write_bytes(b'\xef\xbb\xbf{"eos_token_id": [7, 8.0]}')
    found = read_generation_config(tmp_path)
    assert found.eos_ids == {7, 8} and not found.notes


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_k": 9, "min_p": 0.1}])
def test_a_gpu_finds_rows_that_are_no_numbers_and_is_waited_for_once(options):
    torch.manual_seed(0)
    logits = torch.randn(len(NOT_NUMBERS) + 2, 50_000)
    logits[-1, ::2] = -math.inf
    for row, bad in enumerate(NOT_NUMBERS):
        logits[row, ::2], logits[row, 1::2] = bad
    here = choose_tokens(logits, [hot(i, **options) for i in range(len(logits))])
    there, samplers = logits.cuda(), [hot(i, **options) for i in range(len(logits))]
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            found = choose_tokens(there, samplers)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert found == here and found[:-2] == [None] * len(NOT_NUMBERS)
    assert len([w for w in waits if "called a synchronizing" in str(w.message)]) == 1
