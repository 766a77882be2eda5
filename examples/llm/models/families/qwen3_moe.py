"""Qwen3-MoE: Qwen3 with many narrow experts, of which a token passes eight."""

from __future__ import annotations

from types import SimpleNamespace

from .family import SLIDING, Family, attention_biases
from .mixture import Mixture
from .qwen2 import DEFAULTS, without_window
from .qwen2_moe import EXPERT_DEFAULTS


def _all_slide(config: SimpleNamespace) -> list[str]:
    """If there is to be a window."""
    if not config.use_sliding_window:
        config.sliding_window = None
    return [SLIDING] * config.num_hidden_layers


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    gguf="qwen3moe",
    defaults={
        **{name: value for name, value in DEFAULTS.items() if name != "max_window_layers"},
        **EXPERT_DEFAULTS, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 24, "num_key_value_heads": 4, "head_dim": None,
        "attention_bias": False, "moe_intermediate_size": 768, "num_experts_per_tok": 8,
        "num_experts": 128,
    },
    nullable=frozenset({"sliding_window", "head_dim"}),
    aliases={"num_local_experts": "num_experts"},
    head_norms=True,
    only_kind=SLIDING,
    fill_kinds=_all_slide,
    biased=attention_biases,
    mixture=Mixture(dense_layers=True),
    from_gguf=without_window,
)  # fmt: skip
