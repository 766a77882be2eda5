"""The shapes of known models: the fields of their published configs, and the tensors they name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "max_window_layers": 70,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_cache": True,
}
_LLAMA3 = _LLAMA | {
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "rope_theta": 500_000.0,
    "vocab_size": 128256,
}


def _sizes(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


SHAPES: dict[str, Mapping[str, Any]] = {
    "smollm2-135m": _LLAMA
    | _sizes(576, 1536, 30, 9, 3)
    | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.041666666666666664,
        "rope_interleaved": False,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
    "qwen2.5-0.5b": _QWEN2
    | _sizes(896, 4864, 24, 14, 2)
    | {
        "max_window_layers": 21,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "qwen2.5-7b": _QWEN2 | _sizes(3584, 18944, 28, 28, 4) | {"max_window_layers": 28},
    "llama3-8b": _LLAMA3 | _sizes(4096, 14336, 32, 32, 8),
    "qwen2.5-32b": _QWEN2 | _sizes(5120, 27648, 64, 40, 8),
    "llama3-70b": _LLAMA3 | _sizes(8192, 28672, 80, 64, 8),
    "qwen2.5-72b": _QWEN2 | _sizes(8192, 29568, 80, 64, 8),
}
"""Fields of config.json of each model, smallest first."""


def tensor_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a model with this config, in transformers' order."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer_idx in range(config["num_hidden_layers"]):
        for name, shape in _layer_shapes(config):
            yield f"model.layers.{layer_idx}.{name}", shape
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)


def _layer_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    for module, rows in {"q_proj": hidden, "k_proj": kv, "v_proj": kv}.items():
        yield f"self_attn.{module}.weight", (rows, hidden)
        if config["model_type"] == "qwen2":
            yield f"self_attn.{module}.bias", (rows,)
    yield "self_attn.o_proj.weight", (hidden, hidden)
    yield "mlp.gate_proj.weight", (ffn, hidden)
    yield "mlp.up_proj.weight", (ffn, hidden)
    yield "mlp.down_proj.weight", (hidden, ffn)
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
