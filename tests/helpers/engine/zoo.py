"""Tiny random models of every architecture that the engine computes, and what transformers says.

Everything is random that training would move: weights of norms, biases and gains that start as
ones and zeros would hide that an engine leaves them out. Widths are such that nothing can be
derived from anything else, and prompts are longer than windows and original contexts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from assets import TINY
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 20_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM),
}
SHORT = {"max_position_embeddings": 32}
THETA = {"rope_theta": 10_000.0}
GEMMA_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1_000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 50_000.0, "factor": 4.0},
}
GEMMA = {
    "head_dim": 24,
    "num_hidden_layers": 4,
    "sliding_window": 11,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 20,
    "rope_parameters": GEMMA_ROPES,
    "tie_word_embeddings": True,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3}
SHARED = EXPERTS | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
NARROW = EXPERTS | {"moe_intermediate_size": 32, "head_dim": 24}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 24},
    "llama-tied": {"head_dim": 24, "tie_word_embeddings": True},
    "llama-biases": {"head_dim": 24, "attention_bias": True, "mlp_bias": True},
    "llama-one-kv-head": {"head_dim": 24, "num_key_value_heads": 1},
    "llama-llama3": {
        "head_dim": 24, "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}
    },
    "llama-linear": {
        "head_dim": 24, "rope_parameters": THETA | {"rope_type": "linear", "factor": 4.0}
    },
    "llama-dynamic": SHORT | {
        "head_dim": 24, "rope_parameters": THETA | {"rope_type": "dynamic", "factor": 4.0}
    },
    "qwen2": {},
    "qwen2-tied": {"tie_word_embeddings": True},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen2-window-not-used": {"use_sliding_window": False, "sliding_window": 9},
    "qwen2-yarn": {"rope_parameters": YARN | {"original_max_position_embeddings": 16}},
    "qwen3": {"head_dim": 24},
    "qwen3-tied": {"head_dim": 24, "tie_word_embeddings": True},
    "qwen3-biases": {"head_dim": 24, "attention_bias": True},
    "qwen3-yarn": {
        "head_dim": 24, "rope_parameters": YARN | {"original_max_position_embeddings": 16}
    },
    "mistral": {"head_dim": 24, "sliding_window": 10},
    "mistral-full": {"head_dim": 24, "sliding_window": None},
    "gemma3_text": GEMMA,
    "gemma3_text-untied": GEMMA | {"tie_word_embeddings": False, "attention_bias": True},
    "mixtral": {"num_local_experts": 5, "head_dim": 24, "sliding_window": 10},
    "mixtral-full": {"num_local_experts": 4, "num_experts_per_tok": 1},
    "qwen2_moe": SHARED,
    "qwen2_moe-dense": SHARED | {
        "mlp_only_layers": [1], "norm_topk_prob": True, "qkv_bias": False,
        "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1,
    },
    "qwen3_moe": NARROW | {"norm_topk_prob": True},
    "qwen3_moe-dense": NARROW | {
        "decoder_sparse_step": 2, "attention_bias": True, "use_sliding_window": True,
        "sliding_window": 11,
    },
    "gpt_oss": {
        "num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 24, "sliding_window": 10,
        "swiglu_limit": 1.5,
        "rope_parameters": YARN | {"original_max_position_embeddings": 16, "truncate": False},
    },
    "olmoe": EXPERTS,
    "olmoe-clipped": EXPERTS | {
        "norm_topk_prob": True, "clip_qkv": 1.5, "num_experts_per_tok": 8, "attention_bias": True
    },
}  # fmt: skip
"""What each case changes in TINY; its name begins with its model type."""

MIXTURES = [name for name in CASES if name.startswith(("mixtral", "gpt")) or "moe" in name]
"""Of mixtures of experts. A rounding may choose another expert, after which numbers differ by more
than roundings do: where more is rounded than in float32, one text says nothing of all."""
DENSE = [name for name in CASES if name not in MIXTURES]

GENERATOR = torch.Generator().manual_seed(7)
PROMPT, STEPS = 50, 32
IDS = torch.randint(3, TINY["vocab_size"], (PROMPT + STEPS,), generator=GENERATOR).tolist()


def zoo_config(name: str, **changes: Any) -> Any:
    """The transformers config of a case."""
    return CLASSES[name.partition("-")[0]][0](**copy.deepcopy(TINY | CASES[name] | changes))


def zoo_model(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """The model of a case."""
    torch.manual_seed(seed)
    model = CLASSES[name.partition("-")[0]][1](zoo_config(name, **changes)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            randomise(key, parameter, zero_centered=name.startswith("gemma"))
    for module in model.modules():
        if hasattr(module, "limit"):  # which transformers before 5.23 does not take from a config
            module.limit = CASES[name]["swiglu_limit"]
    return model


def randomise(name: str, parameter: torch.Tensor, *, zero_centered: bool) -> None:
    """Norms multiply by up to 2, biases are as large as what they are added to."""
    if parameter.ndim == 1:
        parameter.uniform_(-1.0, 1.0)
        parameter += 1.0 if name.endswith("norm.weight") and not zero_centered else 0.0
    else:
        parameter.normal_(0.0, 0.2)


def biased(model: Any, scores: dict[int, float]) -> Any:
    """The model with routers that see one positive number of every token, and choose by it: experts
    with these scores before and after all others."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 60.0
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[0] = 1.0
            for expert, score in scores.items():
                layer.mlp.gate.weight[expert, 0] = score
    return model


def reference(model: Any, ids: list[int] = IDS, prompt: int = PROMPT) -> torch.Tensor:
    """transformers' float32 logits: of the prompt in one go, then of one token at a time."""
    cache, found = DynamicCache(config=model.config), []
    pieces = [ids[:prompt], *([token] for token in ids[prompt:])]
    with torch.no_grad():
        for piece in pieces:
            output = model(torch.tensor([piece]), past_key_values=cache, use_cache=True)
            found.append(output.logits[0].float())
    return torch.cat(found)


def in_doubles(model: Any) -> Any:
    """A copy in float64: what float32 of both sides is off by is up to 6e-6 of a GPU's 1e-5."""
    exact = copy.deepcopy(model).double()
    exact.config._experts_implementation = "eager"  # a grouped product takes no doubles
    return exact


Step = Callable[[list[int]], torch.Tensor]


def stepwise(forward: Step, ids: list[int] = IDS, prompt: int = PROMPT) -> torch.Tensor:
    """The same of ``forward``, which appends tokens and gives the logits of each."""
    return torch.cat([forward(ids[:prompt]), *(forward([token]) for token in ids[prompt:])])
