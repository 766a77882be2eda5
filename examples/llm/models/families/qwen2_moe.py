"""Qwen2-MoE and Qwen1.5-MoE: Qwen2 with many narrow experts, and a shared one that has a gate."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ..gguf_keys import GgufKeys
from .family import ATTENTION, FULL, SLIDING, Family
from .mixture import Mixture
from .qwen2 import DEFAULTS, without_window

EXPERT_DEFAULTS: Mapping[str, Any] = {"decoder_sparse_step": 1, "norm_topk_prob": False}
"""Of Qwen3-MoE, too."""


def _every_other_slides(config: SimpleNamespace) -> list[str]:
    """Below ``max_window_layers``, if there is to be a window."""
    last = config.max_window_layers if config.use_sliding_window else 0
    if not config.use_sliding_window:
        config.sliding_window = None
    return [SLIDING if i % 2 == 0 and i < last else FULL for i in range(config.num_hidden_layers)]


def _from_gguf(keys: GgufKeys, config: Mapping[str, Any], window: int) -> dict[str, Any]:
    return {**without_window(keys, config, window), "qkv_bias": config["attention_bias"]}


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    gguf="qwen2moe",
    defaults={
        **DEFAULTS, **EXPERT_DEFAULTS, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4, "num_experts": 60, "qkv_bias": True,
    },
    nullable=frozenset({"num_key_value_heads", "sliding_window"}),
    fill_kinds=_every_other_slides,
    biased=lambda config: frozenset(ATTENTION[:3] if config.qkv_bias else ()),
    mixture=Mixture(
        shared_width="shared_expert_intermediate_size", dense_layers=True, normed_in_gguf=False
    ),
    from_gguf=_from_gguf,
)  # fmt: skip
