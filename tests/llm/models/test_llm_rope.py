"""Rotary positions against transformers' own, for every kind of scaling."""

import pytest
import torch
from assets import TINY
from transformers import Gemma3TextConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from zoo import LLAMA3, YARN

from layer_streamer.llm.models.config import model_config
from layer_streamer.llm.models.rope import Rotary, rope_frequencies, rotate
from layer_streamer.llm.models.rope_config import Rope

CPU = torch.device("cpu")
ROPES = {
    "default": TINY["rope_parameters"],
    "llama3": LLAMA3,
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
    "yarn": YARN,
    "yarn-attention-factor": YARN | {"attention_factor": 1.5},
    "yarn-mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn-betas": YARN | {"beta_fast": 8.0, "beta_slow": 2.0},
    "yarn-exact-range": YARN | {"truncate": False},
    "yarn-without-blend": YARN | {"beta_fast": 1e-9, "beta_slow": 1e-9},
}


def llama(name: str) -> LlamaConfig:
    return LlamaConfig(**(TINY | {"rope_parameters": dict(ROPES[name])}))


def rotary(hf_config, **options) -> Rotary:
    return Rotary(model_config(hf_config), CPU, **options)


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("length", [40, 300], ids=["within-the-context", "beyond-it"])
def test_rotation_equals_transformers(name, length):
    hf_config, x = llama(name), torch.randn(4, length, 16)
    positions = torch.arange(length)
    table = rotary(hf_config).rows(0, positions)
    cos, sin = LlamaRotaryEmbedding(hf_config)(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x[None], x[None], cos, sin)
    torch.testing.assert_close(rotate(x, table, interleaved=False), expected[0])


def test_a_dynamic_prompt_is_rotated_for_its_length_and_each_later_token_for_its_own():
    hf_config = llama("dynamic")
    theirs, ours = LlamaRotaryEmbedding(hf_config), rotary(hf_config)
    for positions in (torch.arange(300), torch.tensor([300]), torch.tensor([301])):
        cos, sin = theirs(torch.zeros(1), positions[None])
        expected = torch.stack((cos[0, :, :8], sin[0, :, :8]))
        torch.testing.assert_close(ours.rows(0, positions), expected)


def test_tokens_of_several_sequences_are_rotated_as_each_sequence_alone():
    ours = rotary(llama("dynamic"))
    alone = [ours.rows(0, torch.arange(n)) for n in (300, 20, 400)]
    positions = torch.cat([torch.arange(n) for n in (300, 20, 400)])
    lengths = torch.cat([torch.full((n,), n) for n in (300, 20, 400)])
    torch.testing.assert_close(ours.rows(0, positions, lengths), torch.cat(alone, 1))


def test_a_chunk_of_a_dynamic_prompt_is_rotated_for_the_whole():
    ours = rotary(llama("dynamic"))
    whole = ours.rows(0, torch.arange(300))
    chunk = ours.rows(0, torch.arange(100, 200), torch.full((100,), 300))
    torch.testing.assert_close(chunk, whole[:, 100:200])


def test_layers_with_a_window_may_have_a_base_of_their_own():
    fields = {key: value for key, value in TINY.items() if key != "rope_parameters"}
    hf_config = Gemma3TextConfig(
        **fields, head_dim=16, sliding_window=8, rope_local_base_freq=5_000.0,
        rope_theta=300_000.0, rope_scaling={"rope_type": "linear", "factor": 8.0},
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    theirs, ours, positions = Gemma3RotaryEmbedding(hf_config), rotary(hf_config), torch.arange(50)
    for layer_idx, kind in enumerate(hf_config.layer_types):
        cos, sin = theirs(torch.zeros(1), positions[None], kind)
        expected = torch.stack((cos[0, :, :8], sin[0, :, :8]))
        torch.testing.assert_close(ours.rows(layer_idx, positions), expected)
    assert not torch.allclose(ours.rows(0, positions), ours.rows(1, positions))


def test_llama3_scaling_changes_the_slow_frequencies_only():
    one = torch.tensor([1])
    plain = rotary(LlamaConfig(**TINY)).rows(0, one)[1, 0]
    scaled = {"rope_parameters": LLAMA3 | {"rope_theta": 10_000.0}}
    stretched = rotary(LlamaConfig(**(TINY | scaled))).rows(0, one)[1, 0]
    assert plain[0] == stretched[0]
    assert plain[-1] != stretched[-1]


def test_interleaved_pairs_are_rotated_and_put_back_in_the_order_of_halves():
    x = torch.randn(4, 9, 16)
    table = rotary(LlamaConfig(**TINY)).rows(0, torch.arange(9))
    pairs = torch.stack((x[..., :8], x[..., 8:]), -1).flatten(-2)
    assert torch.equal(rotate(pairs, table, interleaved=True), rotate(x, table, interleaved=False))


def test_factors_divide_the_frequencies():
    config = LlamaConfig(**TINY)
    halved = rotary(config, factors=torch.full((8,), 2.0)).rows(0, torch.arange(0, 18, 2))
    torch.testing.assert_close(halved, rotary(config).rows(0, torch.arange(9)))


def test_llama3_scaling_that_a_file_carries_as_factors_is_not_applied_twice():
    config = llama("llama3")
    theta, rope = LLAMA3["rope_theta"], model_config(config).rope(0)
    factors = rope_frequencies(Rope(theta), 16) / rope_frequencies(rope, 16)
    found = rotary(config, factors=factors).rows(0, torch.arange(50))
    torch.testing.assert_close(found, rotary(config).rows(0, torch.arange(50)))
