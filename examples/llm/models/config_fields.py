"""The fields of a config.json, with what transformers fills in where the file leaves one out.

So that opening a model need not import transformers, which takes seconds. Tests compare the result
with transformers' own configs, of every model that the engine computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ..errors import UnsupportedModelError

_EVERY: dict[str, Any] = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "eos_token_id": None,
}  # fmt: skip
_SILU = _EVERY | {"hidden_act": "silu"}
_QWEN = _SILU | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
    "max_window_layers": 28,
}  # fmt: skip
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": _SILU | {
        "vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": None,
        "max_position_embeddings": 2048, "eos_token_id": 2, "head_dim": None,
        "attention_bias": False, "mlp_bias": False,
    },
    "mistral": _SILU | {
        "vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "eos_token_id": 2, "head_dim": None,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128, "attention_bias": False},
    "gemma3_text": _EVERY | {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "eos_token_id": 1,
        "max_position_embeddings": 131072, "tie_word_embeddings": True, "attention_bias": False,
        "query_pre_attn_scalar": 256, "sliding_window": 4096,
    },
}  # fmt: skip
"""By model_type, the fields that the engine reads and their values where config.json has none."""

NULLABLE = {
    "llama": {"num_key_value_heads", "head_dim"},
    "mistral": {"head_dim", "sliding_window"},
    "qwen2": {"num_key_value_heads", "sliding_window"},
    "qwen3": {"num_key_value_heads", "sliding_window"},
    "gemma3_text": {"sliding_window"},
}
"""Fields that may be null; each is a whole number otherwise."""

TEXT_TYPES = {"gemma3": "gemma3_text", "llava": "llama", "mistral3": "mistral"}
"""Of models with other parts, the type of a text part that does not say."""
OF_THE_WHOLE = ("eos_token_id", "bos_token_id", "quantization_config", "tie_word_embeddings")
"""Fields that such a model has for its text part, too."""

GEMMA3_PATTERN = 6
"""In Gemma 3, every sixth layer sees the whole context; files seldom say so."""
GEMMA3_BASES = {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0}
"""Of its rotations."""


def text_part(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a config.json's language model: those of its ``text_config``, with ``part_of``
    for the whole model's type, where that is of no type in DEFAULTS."""
    text, whole = fields.get("text_config"), fields.get("model_type")
    if not isinstance(text, Mapping) or whole in DEFAULTS:
        return fields
    shared = {name: fields[name] for name in OF_THE_WHOLE if fields.get(name) is not None}
    model_type = text.get("model_type") or TEXT_TYPES.get(str(whole))
    return {**text, **shared, "model_type": model_type, "part_of": str(whole)}


def config_fields(fields: Mapping[str, Any]) -> SimpleNamespace:
    """A config.json of a model in DEFAULTS as transformers reads it: defaults, the kinds of layers,
    and one ``rope_parameters`` for its older spellings.

    UnsupportedModelError for a field that the engine reads and that is of another type.
    """
    model_type = fields["model_type"]
    found = SimpleNamespace(**{**DEFAULTS[model_type], **fields})
    for name, default in DEFAULTS[model_type].items():
        if name == "eos_token_id":
            _check_ids(found.eos_token_id)
        elif name in NULLABLE[model_type]:
            if getattr(found, name) is not None:
                _check(name, getattr(found, name), int)
        else:
            _check(name, getattr(found, name), type(default))
    if found.num_attention_heads < 1:
        raise UnsupportedModelError("num_attention_heads: must be at least 1")
    whole = model_type in ("llama", "gemma3_text")  # others may have a head_dim that is less
    if whole and found.hidden_size % found.num_attention_heads:
        raise UnsupportedModelError(
            f"hidden_size {found.hidden_size} is not a multiple of num_attention_heads "
            f"{found.num_attention_heads}"
        )
    _fill_layer_types(found)
    if model_type == "gemma3_text":
        found.rope_parameters = _gemma3_ropes(fields)
        found.rope_theta = None  # of the layers that see everything, and in there
    else:
        found.rope_parameters = _rope(fields)
    found.rope_scaling = None
    return found


def _check(name: str, value: object, kind: type) -> None:
    fits = isinstance(value, int | float if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise UnsupportedModelError(f"{name!r} expected {kind.__name__}, found {value!r}")


def _check_ids(ids: object) -> None:
    for item in ids if isinstance(ids, list) else [ids]:
        if ids is not None:
            _check("eos_token_id", item, int)


def _fill_layer_types(found: SimpleNamespace) -> None:
    """The kinds of layers and their window, of models that have several kinds."""
    if found.model_type in ("qwen2", "qwen3"):
        if not found.use_sliding_window:
            found.sliding_window = None
        first = found.max_window_layers if found.sliding_window else found.num_hidden_layers
        slides = [i >= first for i in range(found.num_hidden_layers)]
    elif found.model_type == "gemma3_text":
        period = getattr(found, "sliding_window_pattern", GEMMA3_PATTERN)
        _check("sliding_window_pattern", period, int)
        slides = [bool((i + 1) % max(1, period)) for i in range(found.num_hidden_layers)]
    else:
        return
    if getattr(found, "layer_types", None) is None:
        found.layer_types = ["sliding_attention" if s else "full_attention" for s in slides]
    _check("layer_types", found.layer_types, list)


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    rope = dict(fields.get("rope_scaling") or fields.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UnsupportedModelError(
            f"rope_parameters: one set for each kind of layers is not supported "
            f"for model type {fields['model_type']!r}"
        )
    for name in ("rope_theta", "partial_rotary_factor"):
        if fields.get(name) is not None:
            rope.setdefault(name, fields[name])
    return rope


def _gemma3_ropes(fields: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each kind of layers; what older files say of scaling is of those that see everything."""
    given, scaling = fields.get("rope_parameters"), fields.get("rope_scaling")
    if given is not None and scaling is not None and not given.get("full_attention"):
        raise UnsupportedModelError("rope_scaling beside other rope_parameters is not supported")
    given = given or {}
    ropes = {kind: dict(given.get(kind) or {"rope_type": "default"}) for kind in GEMMA3_BASES}
    ropes["full_attention"].update(scaling or {})
    bases = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
    for kind, name in bases.items():
        ropes[kind].setdefault("rope_theta", fields.get(name, GEMMA3_BASES[kind]))
    return ropes
