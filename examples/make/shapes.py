"""The shapes of known models: the fields of their published configs, and the tensors they name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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


_MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 32000,
}
_QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1_000_000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_OF_MIXTURES = ("expert", "moe", "decoder_sparse", "mlp_only", "norm_topk", "router")
_QWEN3 = {
    name: value
    for name, value in _QWEN3_MOE.items()
    if not any(part in name for part in _OF_MIXTURES)
} | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "max_window_layers": 48}
_OLMOE = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "norm_topk_prob": False,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10_000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 50304,
}
_GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 200002,
    "head_dim": 64,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 4,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
        "original_max_position_embeddings": 4096, "truncate": False,
    },
    "rope_theta": 150_000.0,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201088,
}  # fmt: skip


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
    "qwen3-a3b": _QWEN3 | _sizes(2048, 6144, 48, 32, 4),
    "olmoe": _OLMOE | _sizes(2048, 1024, 16, 16, 16),
    "llama3-8b": _LLAMA3 | _sizes(4096, 14336, 32, 32, 8),
    "gpt-oss-20b": _GPT_OSS | _sizes(2880, 2880, 24, 64, 8),
    "qwen3-30b-a3b": _QWEN3_MOE | _sizes(2048, 6144, 48, 32, 4),
    "qwen2.5-32b": _QWEN2 | _sizes(5120, 27648, 64, 40, 8),
    "mixtral-8x7b": _MIXTRAL | _sizes(4096, 14336, 32, 32, 8),
    "llama3-70b": _LLAMA3 | _sizes(8192, 28672, 80, 64, 8),
    "qwen2.5-72b": _QWEN2 | _sizes(8192, 29568, 80, 64, 8),
}
"""Fields of config.json of each model, smallest first. Nobody has made "qwen3-a3b": a pass reads as
much of it as a token of qwen3-30b-a3b does of that."""


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
    hidden, kind = config["hidden_size"], config["model_type"]
    width = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = width * config["num_attention_heads"], width * config["num_key_value_heads"]
    if kind == "gpt_oss":
        yield "self_attn.sinks", (config["num_attention_heads"],)
    for module, rows in {"q_proj": q, "k_proj": kv, "v_proj": kv}.items():
        yield f"self_attn.{module}.weight", (rows, hidden)
        if kind in ("qwen2", "gpt_oss"):
            yield f"self_attn.{module}.bias", (rows,)
    yield "self_attn.o_proj.weight", (hidden, q)
    if kind == "gpt_oss":
        yield "self_attn.o_proj.bias", (hidden,)
        yield from _stacked_shapes(config)
    if kind in ("qwen3", "qwen3_moe", "olmoe"):
        q, kv = (q, kv) if kind == "olmoe" else (width, width)
        yield "self_attn.q_norm.weight", (q,)
        yield "self_attn.k_norm.weight", (kv,)
    if kind in EXPERTS:
        yield from _expert_shapes(config, EXPERTS[kind])
    elif kind != "gpt_oss":
        yield from _block_shapes("mlp", _PROJECTIONS, hidden, config["intermediate_size"])
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Experts:
    """What the experts of a type of mixtures are called on the hub."""

    block: str
    matrices: tuple[str, str, str]
    """Gate, up, down."""
    count: str
    """The config's field with how many a layer has."""
    width: str
    """The same of what is between their matrices."""


EXPERTS = {
    "mixtral": Experts(
        "block_sparse_moe", ("w1", "w3", "w2"), "num_local_experts", "intermediate_size"
    ),
    "qwen3_moe": Experts("mlp", _PROJECTIONS, "num_experts", "moe_intermediate_size"),
    "olmoe": Experts("mlp", _PROJECTIONS, "num_experts", "intermediate_size"),
}
"""By type of model."""


def _expert_shapes(
    config: Mapping[str, Any], experts: Experts
) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, count = config["hidden_size"], config[experts.count]
    yield f"{experts.block}.gate.weight", (count, hidden)
    for expert in range(count):
        block, width = f"{experts.block}.experts.{expert}", config[experts.width]
        yield from _block_shapes(block, experts.matrices, hidden, width)


STACKED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""Matrices of all experts of a layer of gpt-oss, each a tensor; what is a row to others is a column
of theirs."""


def _stacked_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    count, hidden = config["num_local_experts"], config["hidden_size"]
    width = config["intermediate_size"]
    yield from {"mlp.router.weight": (count, hidden), "mlp.router.bias": (count,)}.items()
    for name, sizes in zip(STACKED, ((hidden, 2 * width), (width, hidden)), strict=True):
        yield name, (count, *sizes)
        yield f"{name}_bias", (count, sizes[1])


def _block_shapes(
    block: str, matrices: tuple[str, ...], hidden: int, width: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    gate, up, down = (f"{block}.{matrix}.weight" for matrix in matrices)
    yield from {gate: (width, hidden), up: (width, hidden), down: (hidden, width)}.items()
