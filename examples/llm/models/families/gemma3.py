"""Gemma 3: windows in five layers of six, rotations by kind of layer, norms of outputs."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ...errors import UnsupportedModelError
from ..gguf_keys import GgufKeys
from .family import EVERY, FULL, SLIDING, Family, check

PATTERN = 6
"""Every sixth layer sees the whole context; files seldom say so."""
BASES = {FULL: 1_000_000.0, SLIDING: 10_000.0}
"""Of its rotations."""
LAYERS_27B = 62
"""Of these models, that one scales attention by hidden_size / num_heads. GGUF files do not say."""


def _kinds(config: SimpleNamespace) -> list[str]:
    period = getattr(config, "sliding_window_pattern", PATTERN)
    check("sliding_window_pattern", period, int)
    return _slides((i + 1) % max(1, period) for i in range(config.num_hidden_layers))


def _slides(found: Any) -> list[str]:
    return [SLIDING if slides else FULL for slides in found]


def _ropes(fields: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each kind of layers; what older files say of scaling is of those that see everything."""
    given, scaling = fields.get("rope_parameters"), fields.get("rope_scaling")
    if given is not None and scaling is not None and not given.get(FULL):
        raise UnsupportedModelError("rope_scaling beside other rope_parameters is not supported")
    given = given or {}
    ropes = {kind: dict(given.get(kind) or {"rope_type": "default"}) for kind in BASES}
    ropes[FULL].update(scaling or {})
    names = {FULL: "rope_theta", SLIDING: "rope_local_base_freq"}
    for kind, name in names.items():
        ropes[kind].setdefault("rope_theta", fields.get(name, BASES[kind]))
    return ropes


def _from_gguf(keys: GgufKeys, config: Mapping[str, Any], window: int) -> dict[str, Any]:
    layers, scalar = config["num_hidden_layers"], config["head_dim"]
    if layers == LAYERS_27B:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 1e4)}
    period = keys.get("attention.sliding_window_pattern", PATTERN)
    if isinstance(period, int):
        kinds = _slides((i + 1) % max(1, period) for i in range(layers))
    else:  # an array, one truth for each layer
        kinds = _slides(period.load())
    return {
        "query_pre_attn_scalar": scalar,
        "sliding_window": window or None,
        "layer_types": kinds,
        "rope_parameters": {FULL: config["rope_parameters"], SLIDING: local},
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
    }


GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    gguf="gemma3",
    text_of="gemma3",
    defaults={
        **EVERY, "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "eos_token_id": 1,
        "max_position_embeddings": 131072, "tie_word_embeddings": True, "attention_bias": False,
        "query_pre_attn_scalar": 256, "sliding_window": 4096,
    },
    nullable=frozenset({"sliding_window"}),
    whole_heads=True,
    activation="gelu_pytorch_tanh",
    activation_field="hidden_activation",
    head_norms=True,
    output_norms=True,
    zero_centered_norms=True,
    fill_kinds=_kinds,
    ropes=_ropes,
    ropes_by_kind=True,
    attention_scale=lambda config, head_dim: float(config.query_pre_attn_scalar) ** -0.5,
    embed_scale=lambda config: float(config.hidden_size) ** 0.5,
    from_gguf=_from_gguf,
    gguf_has_window=True,
)  # fmt: skip
