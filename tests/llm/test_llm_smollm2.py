"""The real model, in float32, against ids and a likelihood that other engines agree on."""

import gguf_to_safetensors
import pytest
import torch
from assets import AGREED, GOLDEN, one_torch_thread, prompt_ids, smollm2
from one_sequence import OneSequence, mean_nll

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.text.tokenizer import raw_ids


@pytest.fixture(scope="module")
def engine():
    with (
        one_torch_thread(),
        StreamingEngine(smollm2(), device="cpu", max_length=128, kv_tokens=1024) as engine,
    ):
        yield engine


def as_prompt(key: str):
    """A text, or messages."""
    kind, _, text = key.partition(":")
    return text if kind == "raw" else [{"role": "user", "content": text}]


def new_ids(engine: StreamingEngine, most: int = 100) -> list[list[int]]:
    """The new ids of all prompts that engines agree on, in one batch, each as long as it should,
    or so long at most."""
    count = min(most, max(len(GOLDEN[key]["new_ids"]) for key in AGREED))
    prompts = [as_prompt(key) for key in AGREED]
    found = engine.generate(prompts, max_new_tokens=count, temperature=0, return_details=True)
    lengths = [len(ids) for ids in golden_ids(most)]
    return [list(done.ids[:length]) for done, length in zip(found, lengths, strict=True)]


def golden_ids(most: int = 100) -> list[list[int]]:
    """What they should be."""
    return [GOLDEN[key]["new_ids"][:most] for key in AGREED]


def test_the_golden_file_has_four_prompts_that_llama_cpp_agrees_on():
    assert len(AGREED) == 4


@pytest.mark.parametrize("most", [12, pytest.param(24, marks=pytest.mark.slow)])
def test_greedy_ids_are_the_golden_ones(engine, most):
    assert max(map(len, golden_ids())) == 24
    assert new_ids(engine, most) == golden_ids(most)


@pytest.mark.parametrize("key", [key for key in GOLDEN if "prompt_ids" in GOLDEN[key]])
def test_prompts_are_encoded_as_the_golden_ids(engine, key):
    assert engine.encode(as_prompt(key)) == GOLDEN[key]["prompt_ids"]
    assert prompt_ids(engine.tokenizer, key) == GOLDEN[key]["prompt_ids"]


def test_the_mean_likelihood_of_a_text_is_the_golden_one(engine):
    golden = GOLDEN["nll"]
    ids = raw_ids(engine.tokenizer, golden["text"])
    assert len(ids) == golden["tokens"]
    found = mean_nll(OneSequence(engine._runner), ids)
    assert found == pytest.approx(golden["mean_nll_fp32"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"kv": "host"}, {"kv": "host", "prefill_chunk": 5}])
def test_greedy_ids_are_the_golden_ones_with_keys_and_values_on_the_host(options):
    with (
        one_torch_thread(),
        StreamingEngine(
            smollm2(), device="cpu", max_length=128, kv_tokens=1024, **options
        ) as engine,
    ):
        assert new_ids(engine) == golden_ids()


@pytest.mark.slow
def test_greedy_ids_of_its_safetensors_twin_are_the_golden_ones(tmp_path):
    assert gguf_to_safetensors.main([str(smollm2()), str(tmp_path / "twin")]) == 0
    with (
        one_torch_thread(),
        StreamingEngine(tmp_path / "twin", device="cpu", max_length=128, kv_tokens=1024) as engine,
    ):
        assert new_ids(engine) == golden_ids()


@pytest.mark.gpu
@pytest.mark.parametrize("kv", ["device", "host"])
def test_greedy_ids_on_a_gpu_are_the_golden_ones(kv):
    with StreamingEngine(
        smollm2(), device="cuda", dtype=torch.float32, max_length=128, kv_tokens=1024, kv=kv
    ) as engine:
        assert new_ids(engine) == golden_ids()
