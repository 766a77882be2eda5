"""LLaMA, and what is built like it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..gguf_keys import GgufKeys
from .family import EVERY, FULL, Family


def _from_gguf(keys: GgufKeys, config: Mapping[str, Any], window: int) -> dict[str, Any]:
    """A file of this architecture with a window is a Mistral's."""
    return {"model_type": "mistral", "sliding_window": window} if window else {}


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    gguf="llama",
    text_of="llava",
    defaults={
        **EVERY, "hidden_act": "silu", "vocab_size": 32000, "intermediate_size": 11008,
        "num_key_value_heads": None, "max_position_embeddings": 2048, "eos_token_id": 2,
        "head_dim": None, "attention_bias": False, "mlp_bias": False,
    },
    nullable=frozenset({"num_key_value_heads", "head_dim"}),
    whole_heads=True,
    only_kind=FULL,
    permuted_in_gguf=True,
    from_gguf=_from_gguf,
    gguf_has_window=True,
)  # fmt: skip
