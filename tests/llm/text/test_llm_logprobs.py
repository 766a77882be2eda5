"""How likely a row's tokens were, compared with torch's own log_softmax of the raw logits."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_model import byte_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_engine import PROMPTS, SAMPLED, drafted, make_engine, message, texts_of
from transformers import AutoModelForCausalLM

from layer_streamer.llm.drafts.tree import NOTHING, ROOT, Tree
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.text import sampling as sampling_module
from layer_streamer.llm.text.completion import Asked
from layer_streamer.llm.text.following import follow
from layer_streamer.llm.text.logprobs import TokenLogprob
from layer_streamer.llm.text.sampling import Sampler, choose_tokens
from layer_streamer.llm.text.sampling_options import Sampling

ODD: dict[str, Any] = {
    "temperature": 0.7, "top_k": 3, "presence_penalty": 1.0, "logit_bias": {0: 5.0, 1: -100.0},
}  # fmt: skip
ASKED: dict[str, Any] = {"logprobs": True, "top_logprobs": 4}
FEW = {"max_new_tokens": 16}
ALL_OF_IT: dict[str, dict[str, Any]] = {
    "likeliest": {"temperature": 0.0},
    "presence": {"temperature": 0.0, "presence_penalty": 1.5},
    "frequency": {"temperature": 0.0, "frequency_penalty": 0.7},
    "repeats": {"temperature": 0.0, "frequency_penalty": -0.3, "presence_penalty": -0.3},
    "drawn": SAMPLED | {"presence_penalty": 0.8, "frequency_penalty": 1.1},
    "biased": SAMPLED | {"logit_bias": {158: 4.0, 26: -100.0, 124: -7.0}},
    "all": SAMPLED
    | {"repetition_penalty": 1.2, "frequency_penalty": 2.0, "logit_bias": {158: 9.0, 21: -100.0}},
}


def told(logits_V: torch.Tensor, token: int, top: int) -> TokenLogprob:
    """By torch, of one row."""
    logprobs = logits_V.float().log_softmax(-1).tolist()
    order = sorted(range(len(logprobs)), key=lambda i: (-logprobs[i], i))[:top]
    return TokenLogprob(token, logprobs[token], tuple((i, logprobs[i]) for i in order))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from([None, 0, 1, 5, 20]), min_size=1, max_size=5),
    st.sampled_from([3, 30]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
)
def test_logprobs_are_those_of_the_raw_logits_whatever_chooses(seed, tops, vocab, dtype, odd):
    torch.manual_seed(seed)
    # No two are equal, in 16 bits either: of equal ones the likeliest may be any.
    logits = torch.stack([torch.randperm(vocab) / 4 for _ in tops]).to(dtype)
    logits[:, 2] = -math.inf
    sampling = Sampling(**ODD) if odd else Sampling()
    samplers = [Sampler(sampling, seed=seed, top_logprobs=top) for top in tops]
    plain = choose_tokens(logits, [Sampler(sampling, seed=seed) for _ in tops])
    assert choose_tokens(logits, samplers) == plain
    for row, token, top, sampler in zip(logits, plain, tops, samplers, strict=True):
        expected = [] if top is None else [told(row, token, top)]
        assert [found.token for found in sampler.logprobs] == [found.token for found in expected]
        assert sampler.logprobs == expected


def test_equally_likely_tokens_are_told_in_the_order_of_their_ids():
    sampler = Sampler(top_logprobs=3)
    choose_tokens(torch.zeros(1, 3), [sampler])
    assert [token for token, _ in sampler.logprobs[0].top] == [0, 1, 2]


def test_a_row_without_a_token_has_nothing_told_of_it():
    options = {"logit_bias": dict.fromkeys(range(2), -100)}
    samplers = [
        Sampler(top_logprobs=1),
        Sampler(Sampling(**options), top_logprobs=1),
        Sampler(top_logprobs=1),
    ]
    found = choose_tokens(torch.tensor([[math.nan, 1.0], [1.0, 2.0], [0.0, 3.0]]), samplers)
    assert found[0] is None and isinstance(found[1], ValueError) and found[2] == 1
    assert [len(sampler.logprobs) for sampler in samplers] == [0, 0, 1]


@pytest.mark.parametrize("drafts", [[NOTHING] * 3, [NOTHING, Tree.chain([9]), NOTHING]])
def test_a_row_whose_logprobs_cannot_be_had_fails_alone(monkeypatch, drafts):
    def failing(logits_V: torch.Tensor, token: torch.Tensor, top: int) -> torch.Tensor:
        raise RuntimeError("no memory")

    monkeypatch.setattr(sampling_module, "measure", failing)
    monkeypatch.setattr("layer_streamer.llm.text.following.measure", failing)
    samplers = [Sampler(), Sampler(top_logprobs=2), Sampler(Sampling(temperature=1.0), seed=1)]
    first, second, third = follow(torch.eye(3 + sum(map(len, drafts)), 4), samplers, drafts)
    assert first == [0] and len(third) == 1 and isinstance(third[0], int)
    (error,) = second
    assert isinstance(error, RuntimeError) and samplers[1].logprobs == []


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.booleans())
def test_along_any_tree_each_token_is_told_of_by_the_logits_that_it_was_chosen_from(
    seed, size, odd
):
    torch.manual_seed(seed)
    dice, vocab = random.Random(seed), 4
    parents = [dice.randrange(ROOT, i) for i in range(size)]
    tree = Tree(tuple(dice.randrange(vocab) for _ in parents), tuple(parents))
    logits = torch.randn(2 + size, vocab) * 3
    sampling = Sampling(**ODD) if odd else Sampling()
    row, beside = Sampler(sampling, seed=seed, top_logprobs=3), Sampler(top_logprobs=1)
    tokens, _ = follow(logits, [row, beside], [tree, NOTHING])
    expected, by_hand, node = list[TokenLogprob](), Sampler(sampling, seed=seed), ROOT
    for token in tokens:
        assert int(by_hand.choose(logits[1 + node])) == token
        expected.append(told(logits[1 + node], token, 3))
        child = tree.child(node, token)
        node = ROOT if child is None else child
    assert row.logprobs == expected and len(tokens) >= 1
    assert beside.logprobs == [told(logits[-1], int(logits[-1].argmax()), 1)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def exact(path: Path) -> Iterator[StreamingEngine]:
    """Whose logits are the same bits with and without drafts."""
    with make_engine(path, lookup=True, reproducible=True) as engine:
        yield engine


def mixed(seed: int) -> Any:
    """Trees that go along the text for a while, with other tokens beside it."""
    dice = random.Random(seed)

    def how(rest: list[int], most: int) -> Tree:
        good = rest[: dice.randrange(6)]
        count = dice.randrange(5)
        others = [dice.randrange(200) for _ in range(count)]
        parents = [dice.randrange(ROOT, len(good)) for _ in range(count)]
        return Tree((*good, *others), (*range(ROOT, len(good) - 1), *parents))

    return how


def right(rest: list[int], most: int) -> Sequence[int]:
    return rest[:most]


@pytest.fixture(scope="module")
def plains(exact: StreamingEngine) -> dict[str, list[Any]]:
    """What comes without drafts."""
    return {name: texts_of(exact, **options, **ASKED, **FEW) for name, options in ALL_OF_IT.items()}


@pytest.mark.parametrize("choice", ALL_OF_IT)
def test_with_drafts_text_and_logprobs_are_those_without_to_the_bit(
    exact: Any, plains: Any, choice: str
):
    options, plain = ALL_OF_IT[choice] | ASKED | FEW, plains[choice]
    assert all(len(done.logprobs) == len(done.ids) for done in plain)
    hows = (mixed(1), mixed(2)) if choice == "likeliest" else (right, mixed(3))
    agreed = 0
    for how in hows:
        agreed += sum(right for _, right in drafted(exact, plain, how, **options).judged)
    assert agreed > len(PROMPTS)


def test_where_a_text_ends_within_a_draft_so_do_its_logprobs(exact: Any, plains: Any):
    stop = [done.text[4:6] for done in plains["drawn"] if done.text[4:6]]
    options = ALL_OF_IT["drawn"] | ASKED | FEW | {"stop": stop}
    plain = texts_of(exact, **options)
    assert min(len(done.ids) for done in plain) < 12
    drafted(exact, plain, lambda rest, most: [*rest, 7, 8, 9], **options)
    script = drafted(exact, plain, lambda rest, most: [*rest, *plains["drawn"][0].ids], **options)
    assert script.judged


def test_options_change_what_is_written(plains: Any):
    assert len({tuple(done.ids for done in found) for found in plains.values()}) == len(plains)
    texts = {name: found[0].ids for name, found in plains.items()}
    assert max(map(texts["presence"].count, texts["presence"])) == 1
    assert max(map(texts["repeats"].count, texts["repeats"])) > 6
    assert 26 not in texts["biased"] and 21 not in texts["all"]


@pytest.mark.slow
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.0, 0.8]),
    presence=st.floats(-2.0, 2.0),
    frequency=st.floats(-2.0, 2.0),
    bias=st.dictionaries(st.integers(0, 257), st.floats(-100.0, 100.0), max_size=4),
)
def test_any_options_leave_text_and_logprobs_as_they_are_without_drafts(
    exact: Any, seed: int, temperature: float, presence: float, frequency: float, bias: Any
):
    options = ASKED | FEW | {
        "seed": seed, "temperature": temperature, "presence_penalty": presence,
        "frequency_penalty": frequency, "logit_bias": bias,
    }  # fmt: skip
    drafted(exact, texts_of(exact, **options), mixed(seed), **options)


def test_logprobs_are_those_of_the_model_by_transformers(path: Path, exact: Any):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for prompt in PROMPTS[:2]:
        done = exact.generate([prompt], return_details=True, max_new_tokens=8, **ODD, **ASKED)[0]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *done.ids[:-1]]])).logits[0]
        for row, found in zip(logits[len(prompt) - 1 :], done.logprobs, strict=True):
            expected = told(row, found.token, 4)
            assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)
            assert [token for token, _ in found.top] == [token for token, _ in expected.top]
            for (_, one), (_, other) in zip(found.top, expected.top, strict=True):
                assert one == pytest.approx(other, abs=1e-4)
        assert tuple(found.token for found in done.logprobs) == done.ids


def test_events_have_logprobs_beside_the_ids_so_far(exact: Any):
    lengths = []
    for request, _ in exact.events([[7, 8]], max_new_tokens=5, temperature=0.0, **ASKED):
        assert [found.token for found in request.logprobs] == request.new_ids
        lengths.append(len(request.new_ids))
    assert lengths == [1, 2, 3, 4, 5]


def test_who_does_not_ask_gets_none(exact: Any):
    done = exact.generate([7, 8], max_new_tokens=3, return_details=True)
    assert done.logprobs is None
    for request, _ in exact.events([[7, 8]], max_new_tokens=1):
        assert request.logprobs is None


def test_a_row_that_fails_has_those_of_what_text_there_was(exact: Any):
    banned = dict.fromkeys(range(258), -100)
    found = exact.generate(PROMPTS, max_new_tokens=3, return_details=True, logit_bias=banned)
    assert {message(done.error)[:16] for done in found} == {"no token is left"}
    found = exact.generate([[7], [300]], max_new_tokens=3, return_details=True, **ASKED)
    assert len(found[0].logprobs) == 3 and found[1].error is not None and not found[1].logprobs


def test_a_bias_of_a_token_that_the_model_lacks_is_refused_before_a_pass(exact: Any):
    for bias in ({258: 1.0}, {"258": -100}, {3: 1, 10**12: 0}):
        with pytest.raises(ValueError, match=r"logit_bias of token \d+: must be from 0 to 257"):
            exact.generate([PROMPTS[0]], logit_bias=bias, return_details=True)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"logprobs": 5}, "logprobs=5: must be true or false .how many: top_logprobs"),
        ({"logprobs": "yes"}, "logprobs='yes'"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs=21: must be at most 20"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs=-1"),
        ({"logprobs": True, "top_logprobs": 1.0}, "top_logprobs=1.0"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs=True"),
        ({"top_logprobs": 2}, "top_logprobs=2: belongs to logprobs=True"),
    ],
)
def test_a_wish_for_logprobs_that_makes_no_sense_is_named_in_one_line(options, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        Asked.of(Sampling(), options)
    assert "\n" not in str(caught.value)


def test_null_is_what_openais_clients_send_for_nothing():
    nothing = {"logprobs": None, "top_logprobs": None, "logit_bias": None, "presence_penalty": None}
    assert Asked.of(Sampling(), nothing) == Asked.of(Sampling(), {})


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, ODD])
def test_a_gpu_is_waited_for_once_with_logprobs_bias_and_penalties(options):
    torch.manual_seed(0)
    logits = torch.randn(5, 50_000)
    tops = (None, 0, 3, 20, 20)

    def samplers() -> list[Sampler]:
        return [Sampler(Sampling(**options), seed=i, top_logprobs=t) for i, t in enumerate(tops)]

    here, there, on_gpu = samplers(), samplers(), logits.cuda()
    expected = [choose_tokens(logits, here) for _ in range(3)]
    for turn in range(3):
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                found = choose_tokens(on_gpu, there)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert found == expected[turn]
        assert len([w for w in waits if "called a synchronizing" in str(w.message)]) == 1
    for one, other in zip(here, there, strict=True):
        assert len(one.logprobs) == len(other.logprobs)
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]
