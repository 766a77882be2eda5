"""gpt-oss: attention sinks, windows in every second layer, experts with biases and clamps."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ..gguf_keys import GgufKeys
from ..modules import ROUTER
from .family import EVERY, FULL, SLIDING, Family, attention_biases, one_rope
from .mixture import Mixture

BASE = 150_000.0
"""Of its rotations, where a config.json names none."""
YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
"""Where it names no scaling."""


def _kinds(config: SimpleNamespace) -> list[str]:
    return _alternate(config.num_hidden_layers)


def _alternate(layers: int) -> list[str]:
    """The first has a window; files do not say."""
    return [FULL if i % 2 else SLIDING for i in range(layers)]


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    given = fields.get("rope_scaling") or fields.get("rope_parameters") is not None
    rope = one_rope(fields if given else {**fields, "rope_parameters": YARN})
    return rope if "rope_theta" in fields else {"rope_theta": BASE, **rope}


def _from_gguf(keys: GgufKeys, config: Mapping[str, Any], window: int) -> dict[str, Any]:
    """Waves are blended by index, not by whole ones; files do not say that either."""
    return {
        "sliding_window": window or None,
        "layer_types": _alternate(config["num_hidden_layers"]),
        "rope_parameters": {**config["rope_parameters"], "truncate": False},
    }


GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    gguf="gpt-oss",
    defaults={
        **EVERY, "hidden_act": "silu", "vocab_size": 201088, "hidden_size": 2880,
        "intermediate_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "attention_bias": True, "sliding_window": 128,
        "num_experts_per_tok": 4, "num_local_experts": 128, "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    nullable=frozenset({"sliding_window"}),
    aliases={"num_experts": "num_local_experts"},
    sinks=True,
    fill_kinds=_kinds,
    ropes=_rope,
    biased=lambda config: attention_biases(config) | {ROUTER},
    mixture=Mixture(
        experts="num_local_experts",
        width="intermediate_size",
        normed=None,
        of_chosen=True,
        clamped=True,
        stacked=True,
    ),
    gguf_modules={
        "post_attention_layernorm": "post_attention_norm", "self_attn.sinks": "attn_sinks",
    },
    from_gguf=_from_gguf,
)  # fmt: skip
