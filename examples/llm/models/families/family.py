"""What an engine knows of one type of models: how its configs are read, and what its layers do.

A new type is a file like those beside this one, and its name in ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ...errors import UnsupportedModelError
from ..gguf_keys import GgufKeys
from ..modules import MATRICES
from .mixture import Mixture

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers: those that see all tokens, and those with a window."""
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
FEED_FORWARD = tuple(f"mlp.{name}" for name in MATRICES)

EVERY: Mapping[str, Any] = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "eos_token_id": None,
}  # fmt: skip
"""Fields that all have, and transformers' values where a config.json has none."""


def one_rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` of a config.json whose layers all rotate alike, in any of its schemas."""
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


def attention_biases(config: Any) -> frozenset[str]:
    """Modules with a bias, by ``attention_bias`` alone."""
    return frozenset(ATTENTION if getattr(config, "attention_bias", False) else ())


def biases_as_said(config: Any) -> frozenset[str]:
    """Modules with a bias, by ``attention_bias`` and ``mlp_bias``."""
    others = FEED_FORWARD if getattr(config, "mlp_bias", False) else ()
    return attention_biases(config) | frozenset(others)


def check(name: str, value: object, kind: type) -> None:
    """UnsupportedModelError for a config's field of another type."""
    fits = isinstance(value, int | float if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise UnsupportedModelError(f"{name!r} expected {kind.__name__}, found {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One type of models; defaults are a plain LLaMA's. ``config`` has the attributes of one of
    transformers."""

    model_type: str
    """transformers' name."""
    architecture: str
    """The class that a config.json names, for other engines."""
    gguf: str
    """The architecture that GGUF files name."""
    text_of: str | None = None
    """The type of a model with other parts whose text part this is, if it does not say."""

    defaults: Mapping[str, Any]
    """Fields of a config.json that the engine reads, with transformers' values."""
    nullable: frozenset[str]
    """Fields that may be null; each is a whole number otherwise."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of fields, which count before the fields' own, as transformers has it."""
    whole_heads: bool = False
    """hidden_size has to be a multiple of the heads."""

    activation: str = "silu"
    """The one that it has: "silu" or "gelu_pytorch_tanh"."""
    activation_field: str = "hidden_act"
    head_norms: bool = False
    """Each head of queries and keys is normed before it is rotated."""
    width_norms: bool = False
    """Queries are normed before they are rotated, and keys, all heads of a token together."""
    output_norms: bool = False
    """What attention and feed-forward give is normed before it is added."""
    zero_centered_norms: bool = False
    """A norm multiplies by 1 + its weight, in float32."""

    sinks: bool = False
    """Each query head has a learned score that takes a share of its attention and adds nothing."""

    clips_qkv: bool = False
    """Queries, keys and values may be clipped before that, by the field ``clip_qkv``."""
    mixture: Mixture | None = None
    """What its layers are beside that; None: no mixtures of experts."""

    only_kind: str | None = None
    """The kind of all layers, whatever else a config says, as transformers has it."""
    fill_kinds: Callable[[SimpleNamespace], list[str]] | None = None
    """The layers' kinds where a config.json names none; may change the window, too."""
    ropes: Callable[[Mapping[str, Any]], dict[str, Any]] = one_rope
    """``rope_parameters`` of a config.json."""
    ropes_by_kind: bool = False
    """Kinds of layers rotate differently; then the config names the context that scaling made."""
    biased: Callable[[Any], frozenset[str]] = biases_as_said
    """A layer's modules that have a bias."""
    attention_scale: Callable[[Any, int], float] = lambda config, head_dim: float(head_dim) ** -0.5
    """What products of queries and keys are multiplied by."""
    embed_scale: Callable[[Any], float] = lambda config: 1.0
    """What rows of the embedding are multiplied by."""

    permuted_in_gguf: bool = False
    """Rows of q and k are permuted in GGUF files, which may have divisors of rotations, too."""
    from_gguf: Callable[[GgufKeys, Mapping[str, Any], int], dict[str, Any]] = (
        lambda keys, config, window: {}
    )
    """What a GGUF file says beside what all do, of a window of so many tokens (0: none)."""
    gguf_modules: Mapping[str, str] = field(default_factory=dict)
    """Modules that its GGUF files call otherwise than those of others."""
    gguf_has_window: bool = False
    """Its GGUF files may leave out a window that the model has."""

    def hub_name(self, module: str) -> str:
        """A layer's module by its name on the hub, of the one in the engine."""
        return module if self.mixture is None else self.mixture.hub_name(module)
