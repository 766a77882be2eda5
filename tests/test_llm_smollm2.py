"""The real model, in float32, against ids and a likelihood that other engines agree on."""

import pytest
from assets import GOLDEN, one_torch_thread, open_engine, smollm2, smollm2_metadata
from one_sequence import generate, mean_nll

from llm.metadata import load_config, load_tokenizer
from llm.tokenizer import chat_ids, raw_ids

AGREED = [
    key
    for key, value in GOLDEN.items()
    if isinstance(value, dict) and value.get("llama.cpp") == "identical text"
]


@pytest.fixture(scope="module")
def engine():
    config = load_config(smollm2_metadata())
    with one_torch_thread(), open_engine(smollm2(), config, max_positions=128) as engine:
        yield engine


@pytest.fixture
def fresh(engine):
    """The engine with an empty sequence."""
    engine.truncate(0)
    return engine


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(smollm2_metadata())


def prompt_ids(tokenizer, key: str) -> list[int]:
    kind, _, text = key.partition(":")
    return (raw_ids if kind == "raw" else chat_ids)(tokenizer, text)


def test_the_golden_file_has_four_prompts_that_llama_cpp_agrees_on():
    assert len(AGREED) == 4


@pytest.mark.parametrize("key", AGREED)
def test_greedy_ids_are_the_golden_ones(fresh, tokenizer, key):
    expected = GOLDEN[key]["new_ids"]
    ids = prompt_ids(tokenizer, key)
    stop_ids = fresh.config.eos_ids
    found = generate(fresh, ids, max_new_tokens=len(expected), stop_ids=stop_ids)
    assert list(found) == expected


@pytest.mark.parametrize("key", [key for key in GOLDEN if "prompt_ids" in GOLDEN[key]])
def test_prompts_are_encoded_as_the_golden_ids(tokenizer, key):
    assert prompt_ids(tokenizer, key) == GOLDEN[key]["prompt_ids"]


def test_the_mean_likelihood_of_a_text_is_the_golden_one(fresh, tokenizer):
    golden = GOLDEN["nll"]
    ids = raw_ids(tokenizer, golden["text"])
    assert len(ids) == golden["tokens"]
    assert mean_nll(fresh, ids) == pytest.approx(golden["mean_nll_fp32"], abs=1e-3)
