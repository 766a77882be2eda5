"""Mistral: LLaMA with a window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..gguf_keys import GgufKeys
from .family import EVERY, SLIDING, Family


def window_as_said(keys: GgufKeys, config: Mapping[str, Any], window: int) -> dict[str, Any]:
    """The window that a GGUF file names, if it does."""
    return {"sliding_window": window or None}


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    gguf="mistral",
    text_of="mistral3",
    defaults={
        **EVERY, "hidden_act": "silu", "vocab_size": 32000, "intermediate_size": 14336,
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "eos_token_id": 2,
        "head_dim": None, "sliding_window": 4096,
    },
    nullable=frozenset({"head_dim", "sliding_window"}),
    only_kind=SLIDING,
    permuted_in_gguf=True,
    from_gguf=window_as_said,
)  # fmt: skip
