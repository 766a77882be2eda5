"""Mixtral: Mistral's layers with a few wide experts, of which a token passes two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .family import EVERY, SLIDING, Family, one_rope
from .mistral import window_as_said
from .mixture import Mixture

BASE = 1_000_000.0
"""Of its rotations, where a config.json names none."""


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    rope = one_rope(fields)
    if "rope_theta" not in fields:
        rope.setdefault("rope_theta", BASE)
    return rope


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    gguf="llama",
    defaults={
        **EVERY, "hidden_act": "silu", "vocab_size": 32000, "intermediate_size": 14336,
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "eos_token_id": 2, "head_dim": None, "sliding_window": None, "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    nullable=frozenset({"head_dim", "sliding_window"}),
    aliases={"num_experts": "num_local_experts"},
    only_kind=SLIDING,
    ropes=_rope,
    biased=lambda config: frozenset(),
    mixture=Mixture(
        experts="num_local_experts",
        width="intermediate_size",
        normed=None,
        rounded=False,
        block="block_sparse_moe",
        matrices=("w1", "w3", "w2"),
    ),
    permuted_in_gguf=True,
    from_gguf=window_as_said,
)  # fmt: skip
