from types import SimpleNamespace

import pytest
from assets import TINY
from test_llm_rope import LLAMA3
from transformers import LlamaConfig, Qwen2Config

from llm.config import UnsupportedModelError, id_set, model_config


def plain(**changes: object) -> SimpleNamespace:
    """A config as an older transformers had it: rope_theta beside the other fields."""
    fields = {key: value for key, value in TINY.items() if key != "rope_parameters"}
    fields |= {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": False}
    return SimpleNamespace(**(fields | {"rope_theta": 20_000.0} | changes))


def test_todays_rope_parameters_and_the_older_rope_theta_are_both_read():
    rope = {"rope_type": "default", "rope_theta": 20_000.0}
    today = model_config(LlamaConfig(**(TINY | {"rope_parameters": rope})))
    assert today.rope(0).theta == model_config(plain()).rope(0).theta == 20_000.0


def test_llama3_scaling_is_read_in_both_spellings():
    today = model_config(LlamaConfig(**(TINY | {"rope_parameters": LLAMA3})))
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    older = model_config(plain(rope_scaling=scaling, rope_theta=500_000.0))
    assert today.ropes == older.ropes and today.rope(0).scaling is not None


def test_a_head_may_be_wider_than_its_share_of_the_hidden_size():
    assert model_config(LlamaConfig(**TINY)).head_dim == 16
    assert model_config(LlamaConfig(**TINY, head_dim=24)).head_dim == 24


def test_qwen2_and_its_tied_head_are_read():
    config = model_config(Qwen2Config(**TINY, tie_word_embeddings=True))
    assert (config.model_type, config.tied_head) == ("qwen2", True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs the field 'factor'"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "4 heads over 3"),
        ({"head_dim": 15}, "width 15"),
    ],
)
def test_what_the_engine_cannot_compute_is_refused_by_name_in_one_line(change, named):
    with pytest.raises(UnsupportedModelError) as caught:
        model_config(plain(**change))
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_one_id_several_ids_and_none_make_a_set():
    assert id_set(None) == set()
    assert id_set(7) == {7}
    assert id_set([7, 8]) == {7, 8}
