import pytest
import torch
from assets import TINY
from test_llm_config import LLAMA3
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from llm.config import model_config
from llm.rope import rotary_table, rotate


@pytest.mark.parametrize("rope", [TINY["rope_parameters"], LLAMA3], ids=["default", "llama3"])
def test_rotation_equals_transformers(rope):
    hf_config = LlamaConfig(**(TINY | {"rope_parameters": rope}))
    x = torch.randn(4, 200, 16)
    table = rotary_table(model_config(hf_config), 200)
    cos, sin = LlamaRotaryEmbedding(hf_config)(x, torch.arange(200)[None])
    expected, _ = apply_rotary_pos_emb(x[None], x[None], cos, sin)
    torch.testing.assert_close(rotate(x, table, interleaved=False), expected[0])


def test_llama3_scaling_changes_the_slow_frequencies_only():
    plain = rotary_table(model_config(LlamaConfig(**TINY)), 2)[1, 1]
    scaled = {"rope_parameters": LLAMA3 | {"rope_theta": 10_000.0}}
    stretched = rotary_table(model_config(LlamaConfig(**(TINY | scaled))), 2)[1, 1]
    assert plain[0] == stretched[0]
    assert plain[-1] != stretched[-1]


def test_interleaved_pairs_are_rotated_and_put_back_in_the_order_of_halves():
    x = torch.randn(4, 9, 16)
    table = rotary_table(model_config(LlamaConfig(**TINY)), 9)
    pairs = torch.stack((x[..., :8], x[..., 8:]), -1).flatten(-2)
    assert torch.equal(rotate(pairs, table, interleaved=True), rotate(x, table, interleaved=False))


def test_factors_divide_the_frequencies():
    config = model_config(LlamaConfig(**TINY))
    halved = rotary_table(config, 9, factors=torch.full((8,), 2.0))
    torch.testing.assert_close(halved[:, ::2], rotary_table(config, 5))
