"""What bias and penalties make of a row's logits, by the formulas of OpenAI and transformers."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from layer_streamer.llm.drafts.tree import NOTHING, Tree
from layer_streamer.llm.text.following import follow
from layer_streamer.llm.text.sampling import Sampler, choose_tokens
from layer_streamer.llm.text.sampling_options import Sampling, default_sampling, merge_options

VOCAB = 12
MOST = torch.finfo(torch.float32).max
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=9)
numbers = st.floats(-2.0, 2.0)
biases = st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-99.0, -3.5, 0.0, 2.0, 100.0]))


def by_formula(logits: torch.Tensor, prompt: Sequence[int], text: Sequence[int], o: Any) -> Any:
    """Each by its own authors' account, in the order that is promised, in float64."""
    scores = logits.double()[None].clone()
    if o.get("logit_bias"):
        bias = {(token,): value for token, value in o["logit_bias"].items()}
        before = torch.zeros(1, 1, dtype=torch.long)
        scores = SequenceBiasLogitsProcessor(bias)(before, scores.float()).double()
    if known := [*prompt, *text]:
        penalty = RepetitionPenaltyLogitsProcessor(o.get("repetition_penalty", 1.0))
        scores = penalty(torch.tensor([known]), scores)
    for token, count in Counter(text).items():
        scores[0, token] -= count * o.get("frequency_penalty", 0.0)
        scores[0, token] -= float(count > 0) * o.get("presence_penalty", 0.0)
    return scores[0]


def after(text: Sequence[int], prompt: Sequence[int] = (), **options: Any) -> Sampler:
    """A sampler that has chosen a text."""
    sampler = Sampler(Sampling(**options))
    sampler.see(prompt)
    for token in text:
        sampler._penalties.apply(torch.zeros(VOCAB))
        sampler._penalties.count(torch.tensor(token))
    return sampler


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), tokens, tokens, numbers, numbers, biases)
def test_penalties_and_bias_are_those_of_the_formulas(seed, prompt, text, one, other, bias):
    torch.manual_seed(seed)
    logits = torch.randn(VOCAB) * 5
    options = {
        "logit_bias": bias, "repetition_penalty": 1.3, "presence_penalty": one,
        "frequency_penalty": other,
    }  # fmt: skip
    found = after(text, prompt, **options)._penalties.apply(logits)
    torch.testing.assert_close(
        found.double(), by_formula(logits, prompt, text, options), rtol=1e-5, atol=1e-5
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), tokens, numbers, numbers)
def test_a_greedy_text_is_the_one_of_the_formula_token_by_token(seed, prompt, one, other):
    torch.manual_seed(seed)
    options = {"presence_penalty": one, "frequency_penalty": other, "repetition_penalty": 1.1}
    sampler, text = Sampler(Sampling(**options)), list[int]()
    sampler.see(prompt)
    for _ in range(12):
        logits = torch.randn(VOCAB)
        expected = by_formula(logits, prompt, text, options)
        text.append(int(sampler.choose(logits)))
        assert expected.max() - expected[text[-1]] < 1e-6


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([MOST, -MOST, -math.inf, 0.0, 1.0]), min_size=VOCAB, max_size=VOCAB),
    tokens,
    st.sampled_from([-2.0, 2.0]),
    st.sampled_from([-99.0, 100.0]),
)
def test_what_is_finite_stays_so_and_what_is_ruled_out_too(values, text, penalty, bias):
    options = {"presence_penalty": penalty, "frequency_penalty": penalty}
    logits = torch.tensor(values)
    sampler = after(text, logit_bias=dict.fromkeys(range(VOCAB), bias), **options)
    found = sampler._penalties.apply(logits)
    assert torch.equal(found.isfinite(), logits.isfinite()) and not found.isnan().any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_are_left_as_they_are(temperature):
    options = {"presence_penalty": 1.0, "frequency_penalty": 1.0, "logit_bias": {1: -100, 2: 5}}
    sampler = Sampler(Sampling(temperature=temperature, repetition_penalty=2.0, **options), seed=1)
    sampler.see([3])
    logits = torch.arange(VOCAB, dtype=torch.float32)
    for _ in range(5):
        sampler.choose(logits)
    assert torch.equal(logits, torch.arange(VOCAB, dtype=torch.float32))


def test_a_prompt_counts_for_repetition_and_not_for_presence_and_frequency():
    logits = torch.tensor([3.0, 2.9, 0.0])
    for name in ("presence_penalty", "frequency_penalty"):
        assert int(after([], [0, 0], **{name: 2.0}).choose(logits)) == 0
    # A prompt may have ids that the model lacks, where its tokenizer has more.
    assert int(after([], [0, 99], repetition_penalty=2.0).choose(logits)) == 1


def test_frequency_counts_and_presence_does_not():
    logits = torch.tensor([3.0, 1.5, 0.0])
    sampler = after([], presence_penalty=1.0)
    assert [int(sampler.choose(logits)) for _ in range(4)] == [0, 0, 0, 0]
    sampler = after([], frequency_penalty=1.0)
    assert [int(sampler.choose(logits)) for _ in range(4)] == [0, 0, 1, 0]


def test_below_0_both_make_repeats_likelier():
    for name in ("presence_penalty", "frequency_penalty"):
        logits = torch.linspace(1.0, 0.0, VOCAB)
        assert int(after([1], **{name: -1.0}).choose(logits)) == 1


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_banned_token_is_never_chosen(temperature):
    logits = torch.tensor([50.0, 1.0, 40.0, 0.9])
    sampler = Sampler(Sampling(temperature=temperature, logit_bias={0: -100, 2: -100}), seed=3)
    found = {int(sampler.choose(logits)) for _ in range(60)}
    assert found == ({1} if temperature == 0 else {1, 3})


def test_a_bias_of_99_below_is_no_ban():
    assert int(after([], logit_bias={0: -99}).choose(torch.tensor([200.0, 1.0]))) == 0


ALL = dict.fromkeys(range(3), -100.0)
ROWS = torch.tensor(
    [[1.0, 2.0, 0.0], [5.0, 1.0, 0.0], [-math.inf, 3.0, -math.inf], [0.0, 0.0, 9.0]]
)
RULED_OUT: list[dict[str, Any]] = [
    {"logit_bias": ALL},
    {"logit_bias": ALL, "temperature": 1.0},
    {"logit_bias": ALL, "temperature": 1.0, "top_p": 0.5, "min_p": 0.1},
    {"logit_bias": ALL, "repetition_penalty": 1.5, "presence_penalty": 1.0},
]


@pytest.mark.parametrize("options", RULED_OUT)
@pytest.mark.parametrize("drafts", [False, True])
def test_a_ban_of_everything_is_the_error_of_its_row_alone(options, drafts):
    samplers = [Sampler(), Sampler(Sampling(**options)), after([], logit_bias={1: -100}), Sampler()]
    if drafts:
        # The last row's draft is wrong, and the second has one as well.
        packed = torch.cat((ROWS[:1], ROWS[1:2], ROWS[1:2], ROWS[2:3], ROWS[3:], ROWS[:1]))
        trees = [NOTHING, Tree.chain([0]), NOTHING, Tree.chain([1])]
        first, second, third, last = (row[0] for row in follow(packed, samplers, trees))
    else:
        first, second, third, last = choose_tokens(ROWS, samplers)
    assert (first, last) == (1, 2)
    for error in (second, third):  # of the third, the model rules out what the bias does not
        assert isinstance(error, ValueError)
        assert "no token is left" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"logit_bias": {3: 0.5}},
        {"repetition_penalty": 1.1},
        {"temperature": 0.5},
    ],
)
def test_a_row_that_asks_for_something_does_not_just_take_the_likeliest(options):
    assert not Sampler(Sampling(**options)).takes_likeliest


def test_a_row_that_asks_for_nothing_takes_the_likeliest_without_being_asked():
    class Silent(Sampler):
        def choose(self, logits_V):
            raise AssertionError

    neutral = Sampling(presence_penalty=0, frequency_penalty=0, logit_bias={})
    assert choose_tokens(torch.eye(3), [Silent(neutral) for _ in range(3)]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty=2.1: must be from -2 to 2"),
        ({"presence_penalty": True}, "presence_penalty=True: must be a number"),
        ({"frequency_penalty": -2.5}, "frequency_penalty=-2.5: must be from -2 to 2"),
        ({"frequency_penalty": math.nan}, "frequency_penalty=nan"),
        ({"frequency_penalty": "1"}, "frequency_penalty='1': must be a number"),
        ({"logit_bias": {1: 100.5}}, "logit_bias of token 1=100.5: must be from -100 to 100"),
        ({"logit_bias": {1: math.nan}}, "logit_bias of token 1=nan"),
        ({"logit_bias": {1: None}}, "logit_bias of token 1=None: must be a number"),
        ({"logit_bias": {-1: 1.0}}, "a token id of logit_bias=-1: must be an int of at least 0"),
        ({"logit_bias": {1.0: 1.0}}, "a token id of logit_bias=1.0"),
        ({"logit_bias": {True: 1.0}}, "a token id of logit_bias=True"),
        ({"logit_bias": {"x": 1.0}}, "a token id of logit_bias='x'"),
        ({"logit_bias": {"-1": 1.0}}, "a token id of logit_bias='-1'"),
        ({"logit_bias": {"1_0": 1.0}}, "a token id of logit_bias='1_0'"),
        ({"logit_bias": {"9" * 5000: 1.0}}, "a token id of logit_bias='999"),
        ({"logit_bias": {"\u0665": 1.0}}, "a token id of logit_bias="),
        ({"logit_bias": 5}, "logit_bias=5: must be token ids, each with a number"),
        ({"logit_bias": "abc"}, "logit_bias='abc'"),
        ({"logit_bias": [1, 2]}, "logit_bias=.1, 2.: must be token ids"),
    ],
)
def test_a_bias_or_penalty_that_makes_no_sense_is_named_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        merge_options(Sampling(), options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_a_bias_is_taken_as_json_has_it_and_as_pairs():
    expected = Sampling(logit_bias={5: -100.0, 7: 1.5})
    assert Sampling(logit_bias=json.loads('{"5": -100, "7": 1.5}')) == expected
    assert Sampling(logit_bias=[(5, -100), (7, 1.5)]) == expected
    assert hash(expected) == hash(Sampling(logit_bias={}))


def test_what_transformers_does_not_know_is_not_taken_from_a_generation_config():
    said = {"presence_penalty": 1.5, "frequency_penalty": 1.0, "logit_bias": {"1": 5}}
    assert default_sampling(said) == default_sampling({})


def test_a_sampler_names_a_token_of_its_bias_that_the_model_lacks():
    (error,) = choose_tokens(torch.eye(1, 4), [after([], logit_bias={4: 1.0})])
    assert isinstance(error, ValueError)
    assert str(error) == "logit_bias of token 4: must be from 0 to 3"
