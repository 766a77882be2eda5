import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from assets import TINY
from transformers import LlamaConfig, Qwen2Config
from zoo import CASES, LLAMA3, zoo_config

from layer_streamer.llm.metadata import load_config
from layer_streamer.llm.models.config import UnsupportedModelError, id_set, model_config


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
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
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


def write_hub_config(directory: Path, hf_config: Any, **changes: Any) -> None:
    """config.json as it is on the hub: rope_theta and rope_scaling beside the other fields."""
    fields = json.loads(hf_config.to_json_string(use_diff=False))
    rope = fields.pop("rope_parameters")
    if fields["model_type"] == "gemma3_text":
        fields["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields | changes))


@pytest.mark.parametrize("name", CASES)
def test_the_hubs_schema_and_todays_give_the_same_config(tmp_path, name):
    hf_config = zoo_config(name)
    write_hub_config(tmp_path, hf_config)
    assert load_config(tmp_path) == model_config(hf_config)


@pytest.mark.parametrize("name", ["llama-linear", "llama-dynamic", "llama-llama3", "qwen2-yarn"])
def test_scaling_in_its_legacy_spelling_is_read(tmp_path, name):
    hf_config = zoo_config(name)
    scaling = dict(hf_config.rope_parameters)
    scaling["type"] = scaling.pop("rope_type")
    del scaling["rope_theta"]
    write_hub_config(tmp_path, hf_config, rope_scaling=scaling)
    found = load_config(tmp_path)
    assert found == model_config(hf_config) and found.rope(0).scaling is not None


WINDOW = {"use_sliding_window": True, "sliding_window": 9}


@pytest.mark.parametrize(
    ("model_type", "fields", "windows"),
    [
        ("qwen2", {"use_sliding_window": False, "sliding_window": 9}, [None] * 3),
        ("qwen2", WINDOW | {"max_window_layers": 3}, [None] * 3),
        ("qwen2", WINDOW | {"max_window_layers": 1}, [None, 9, 9]),
        ("qwen3", WINDOW | {"max_window_layers": 0}, [9] * 3),
        ("qwen2", {"sliding_window": 9}, [None] * 3),
        ("mistral", {"sliding_window": 9}, [9] * 3),
        ("mistral", {"sliding_window": None}, [None] * 3),
        ("mistral", {}, [4096] * 3),
        ("llama", {"sliding_window": 9}, [None] * 3),
        ("gemma3_text", {"sliding_window": 9, "sliding_window_pattern": 2}, [9, None, 9]),
    ],
)  # fmt: skip
def test_windows_are_those_that_transformers_applies(tmp_path, model_type, fields, windows):
    base = {key: value for key, value in TINY.items() if key != "rope_parameters"}
    (tmp_path / "config.json").write_text(json.dumps(base | {"model_type": model_type} | fields))
    config = load_config(tmp_path)
    assert [config.window(i) for i in range(3)] == windows


def test_what_gemma_3_adds_to_a_layer_is_read():
    config = model_config(zoo_config("gemma3_text"))
    assert config.family.activation == "gelu_pytorch_tanh" and config.embed_scale == 8.0
    assert config.attention_scale == pytest.approx(20**-0.5)
    assert (
        config.family.head_norms
        and config.family.output_norms
        and config.family.zero_centered_norms
    )


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3_text", {"hidden_activation": "relu"}, "hidden_activation='relu'"),
        ("qwen3", {"layer_types": ["full_attention"] * 2}, "names 2 layers"),
        ("qwen3", {"layer_types": ["linear_attention"] * 3}, "'linear_attention'"),
    ],
)
def test_variants_of_newer_models_are_refused_by_name(name, change, named):
    fields = zoo_config(name).to_dict() | {"model_type": name}
    with pytest.raises(UnsupportedModelError, match=named):
        model_config(SimpleNamespace(**fields | change))


def test_one_id_several_ids_and_none_make_a_set():
    assert id_set(None) == set()
    assert id_set(7) == {7}
    assert id_set([7, 8]) == {7, 8}
