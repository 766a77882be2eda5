"""Qwen2 and Qwen2.5: biases of queries, keys and values; the last layers may have a window."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ..gguf_keys import GgufKeys
from .family import ATTENTION, EVERY, FULL, SLIDING, Family

DEFAULTS: Mapping[str, Any] = {
    **EVERY, "hidden_act": "silu", "vocab_size": 151936, "intermediate_size": 22016,
    "num_key_value_heads": 32, "max_position_embeddings": 32768, "use_sliding_window": False,
    "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
"""Of Qwen3, too."""


def last_slide(config: SimpleNamespace) -> list[str]:
    """Layers from ``max_window_layers`` on have the window, if there is to be one."""
    if not config.use_sliding_window:
        config.sliding_window = None
    first = config.max_window_layers if config.sliding_window else config.num_hidden_layers
    return [SLIDING if i >= first else FULL for i in range(config.num_hidden_layers)]


def without_window(keys: GgufKeys, config: Mapping[str, Any], window: int) -> dict[str, Any]:
    """GGUF files know none."""
    return {"use_sliding_window": False}


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    gguf="qwen2",
    defaults=DEFAULTS,
    nullable=frozenset({"num_key_value_heads", "sliding_window"}),
    fill_kinds=last_slide,
    biased=lambda config: frozenset(ATTENTION[:3]),
    from_gguf=without_window,
)
