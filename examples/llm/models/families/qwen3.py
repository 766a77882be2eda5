"""Qwen3: as Qwen2, with norms of heads instead of biases."""

from __future__ import annotations

from .family import Family
from .qwen2 import DEFAULTS, last_slide, without_window

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    gguf="qwen3",
    defaults={**DEFAULTS, "head_dim": 128, "attention_bias": False},
    nullable=frozenset({"num_key_value_heads", "sliding_window"}),
    head_norms=True,
    fill_kinds=last_slide,
    from_gguf=without_window,
)
