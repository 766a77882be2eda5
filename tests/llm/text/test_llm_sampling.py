import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from layer_streamer.llm.text.sampling import (
    Sampler,
    Sampling,
    choose_tokens,
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
    sampler.see(seen.tolist(), 50, torch.device("cpu"))
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
    sampler.see([0], 4, torch.device("cpu"))
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
    assert default_sampling({"do_sample": True}) == Sampling(temperature=1.0)
    assert default_sampling(config | {"do_sample": False}) == Sampling()
    assert default_sampling({"repetition_penalty": 1.1}) == Sampling(repetition_penalty=1.1)
    merged = merge_options(default_sampling(config), {"temperature": 0, "top_p": None})
    assert merged == Sampling(temperature=0, top_k=20, top_p=0.8)
