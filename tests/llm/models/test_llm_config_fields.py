"""A config.json read without transformers is what transformers reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from interpreters import run_script
from transformers import AutoConfig

from layer_streamer.llm.metadata import load_config
from layer_streamer.llm.models.config import UnsupportedModelError, model_config
from layer_streamer.llm.models.config_fields import config_fields
from layer_streamer.llm.models.families import FAMILIES

PUBLISHED = {
    "llama-2-7b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "tie_word_embeddings": False, "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "float16", "pretraining_tp": 1, "hidden_act": "silu",
    },
    "llama-3.1-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "vocab_size": 128256, "eos_token_id": [128001, 128008, 128009], "mlp_bias": False,
    },
    "mistral-7b-0.3": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "max_position_embeddings": 32768, "max_window_layers": 28, "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 131072, "use_sliding_window": False,
        "vocab_size": 152064, "eos_token_id": 151645,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128,
        "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16,
        "num_hidden_layers": 28, "num_key_value_heads": 8, "rope_theta": 1000000,
        "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": True,
        "vocab_size": 151936, "eos_token_id": 151645, "attention_bias": False,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
        "vocab_size": 32000, "eos_token_id": 2,
    },
    "qwen1.5-moe-a2.7b": {
        "model_type": "qwen2_moe", "decoder_sparse_step": 1, "hidden_size": 2048,
        "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
        "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16,
        "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1,
        "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "rope_theta": 1000000.0, "sliding_window": None,
        "use_sliding_window": False, "vocab_size": 151936, "eos_token_id": 151645,
    },
    "olmoe-1b-7b": {
        "model_type": "olmoe", "attention_bias": False, "clip_qkv": None, "hidden_size": 2048,
        "intermediate_size": 1024, "max_position_embeddings": 4096, "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "vocab_size": 50304, "eos_token_id": 50279,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912,
        "head_dim": 256, "num_attention_heads": 4, "num_hidden_layers": 26,
        "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "max_position_embeddings": 32768,
        "rope_local_base_freq": 10000, "rope_theta": 1000000, "rope_scaling": None,
        "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
        "eos_token_id": [1, 106], "attn_logit_softcapping": None, "cache_implementation": "hybrid",
    },
}  # fmt: skip
"""As they are on the hub, but for fields that concern training."""


def theirs(fields: dict[str, Any]) -> Any:
    """What transformers makes of a config.json."""
    return model_config(AutoConfig.for_model(**json.loads(json.dumps(fields))))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_as_transformers_reads_them(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    assert load_config(tmp_path) == theirs(PUBLISHED[name])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_a_file_leaves_out_has_the_values_of_transformers(model_type: str) -> None:
    fields = {"model_type": model_type}
    assert model_config(config_fields(fields)) == theirs(fields)
    hf_config = AutoConfig.for_model(model_type)
    computed = {"head_dim", "num_key_value_heads", "sliding_window"}
    for name in set(FAMILIES[model_type].defaults) - computed:
        if hasattr(hf_config, name):  # hidden_act is called otherwise in Gemma 3
            assert FAMILIES[model_type].defaults[name] == getattr(hf_config, name), name


THETAS = st.sampled_from([None, 10_000, 20_000.0])
ROPES = st.sampled_from([
    None, {}, {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 4},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 7e4},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "mscale": 0.5},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "linear"}, {"rope_theta": 3e4, "rope_type": "default"},
    {"partial_rotary_factor": 0.5, "rope_type": "default"},
])  # fmt: skip
BY_KIND = st.sampled_from([
    {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": None},
    {"sliding_attention": {"rope_theta": 500.0}, "full_attention": {"rope_theta": 400.0}},
])  # fmt: skip
KINDS = ("full_attention", "sliding_attention")
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "num_hidden_layers": st.integers(1, 9),
    "num_attention_heads": st.sampled_from([4, 8, 16, "8", True]),
    "num_key_value_heads": st.sampled_from([None, 2, 4, 1.5]),
    "hidden_size": st.sampled_from([256, 250, "256"]),
    "head_dim": st.sampled_from([None, 16, 24]),
    "rms_norm_eps": st.sampled_from([1e-5, "1e-5", None]),
    "tie_word_embeddings": st.sampled_from([True, False, None, 1]),
    "attention_bias": st.booleans(),
    "mlp_bias": st.booleans(),
    "hidden_act": st.sampled_from(["silu", "gelu", None]),
    "eos_token_id": st.sampled_from([None, 3, [3, 4], [], "</s>"]),
    "max_position_embeddings": st.sampled_from([64, 4096]),
    "sliding_window": st.sampled_from([None, 0, 16]),
    "use_sliding_window": st.booleans(),
    "max_window_layers": st.integers(0, 9),
    "sliding_window_pattern": st.integers(1, 7),
    "layer_types": st.none() | st.lists(st.sampled_from(KINDS), max_size=9),
    "query_pre_attn_scalar": st.sampled_from([64, 256]),
    "final_logit_softcapping": st.sampled_from([None, 30.0]),
    "rope_theta": THETAS,
    "rope_local_base_freq": THETAS,
    "partial_rotary_factor": st.sampled_from([None, 1.0, 0.5]),
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "torch_dtype": st.just("bfloat16"),
    "num_experts": st.sampled_from([0, 4, 8]),
    "num_local_experts": st.sampled_from([4, 6]),
    "num_experts_per_tok": st.sampled_from([0, 1, 4, 9, 2.5]),
    "moe_intermediate_size": st.sampled_from([32, None]),
    "shared_expert_intermediate_size": st.sampled_from([48, None]),
    "norm_topk_prob": st.sampled_from([True, False, 1]),
    "decoder_sparse_step": st.integers(0, 3),
    "mlp_only_layers": st.none() | st.lists(st.integers(-1, 4), max_size=3) | st.just([True]),
    "qkv_bias": st.sampled_from([True, False, None]),
    "clip_qkv": st.sampled_from([None, 8.0, "8"]),
}
CONFIGS = st.one_of(
    st.fixed_dictionaries({"model_type": st.sampled_from(sorted(FAMILIES))}, optional=FIELDS),
    st.fixed_dictionaries(
        {"model_type": st.just("gemma3_text")},
        optional=FIELDS | dict.fromkeys(("rope_scaling", "rope_parameters"), ROPES | BY_KIND),
    ),
)


def outcome(read: Callable[[dict[str, Any]], Any], fields: dict[str, Any]) -> Any:
    """The config that is read, or None for one that is refused."""
    refused = (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError)
    try:
        return read(json.loads(json.dumps(fields)))
    except refused:
        return None


@example(
    {
        "model_type": "gemma3_text", "hidden_size": 256, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "torch_dtype": "bfloat16",
        "rope_theta": 20_000.0, "rope_local_base_freq": None,
    }
)  # fmt: skip
@example({"model_type": "gpt_oss", "rope_theta": None})
@example({"model_type": "gpt_oss", "rope_parameters": {}})
@example({"model_type": "gpt_oss", "num_key_value_heads": None})
@settings(max_examples=300, deadline=None)
@given(CONFIGS)
def test_any_config_is_read_or_refused_as_transformers_does(fields: dict[str, Any]) -> None:
    ours = outcome(lambda fields: model_config(config_fields(fields)), fields)
    assert ours == outcome(theirs, fields)


def test_a_rotation_for_each_kind_of_layers_is_gemmas_alone() -> None:
    ropes = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    with pytest.raises(UnsupportedModelError, match=r"one set for each kind .* 'qwen3'"):
        config_fields({"model_type": "qwen3", "rope_parameters": ropes})


def test_reading_a_config_does_not_import_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["qwen3-0.6b"]))
    program = (
        "import sys; from pathlib import Path; from layer_streamer.llm.metadata import load_config;"
        "load_config(Path(sys.argv[1])); sys.exit('transformers' in sys.modules)"
    )
    assert run_script(program, tmp_path).returncode == 0
