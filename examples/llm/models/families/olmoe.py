"""OLMoE: queries and keys normed over their whole width, many narrow experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..gguf_keys import GgufKeys
from .family import EVERY, FULL, Family, attention_biases
from .mixture import Mixture


def _from_gguf(keys: GgufKeys, config: Mapping[str, Any], window: int) -> dict[str, Any]:
    clip = keys.number("attention.clamp_kqv", 0.0)
    return {"clip_qkv": clip or None}


OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    gguf="olmoe",
    defaults={
        **EVERY, "hidden_act": "silu", "vocab_size": 50304, "hidden_size": 2048,
        "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": None, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
        "eos_token_id": 50279, "attention_bias": False, "num_experts_per_tok": 8,
        "num_experts": 64, "norm_topk_prob": False,
    },
    nullable=frozenset({"num_key_value_heads"}),
    aliases={"num_local_experts": "num_experts"},
    width_norms=True,
    clips_qkv=True,
    only_kind=FULL,
    biased=attention_biases,
    mixture=Mixture(width="intermediate_size", normed_in_gguf=False),
    from_gguf=_from_gguf,
)  # fmt: skip
