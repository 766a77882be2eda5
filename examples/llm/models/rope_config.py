"""What a config says about rotary positions, in both of its schemas.

Knows which kinds of scaling the engine computes and refuses every other by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedModelError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearScaling:
    """Every wave is stretched by ``factor``."""

    factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicScaling:
    """The base grows with the sequence, from ``original_max_positions`` tokens on."""

    factor: float
    original_max_positions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling:
    """Slow waves are stretched by ``factor``, fast ones kept, those between blended by index."""

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    """Waves that turn more often than this over the original context are kept."""
    beta_slow: float = 1.0
    """Waves that turn less often than this are stretched whole."""
    truncate: bool = True
    """True: the blend begins and ends at whole indices."""
    attention_factor: float = 1.0
    """Cosines and sines are multiplied by it, so scores by its square."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
    """As yarn, but the blend goes by how often a wave turns over the original context."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


Scaling = LinearScaling | DynamicScaling | YarnScaling | Llama3Scaling


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotation of some layers of a model."""

    theta: float
    """Base of the frequencies."""
    scaling: Scaling | None = None


def rope_of(hf_config: Any, layer_type: str | None = None) -> Rope:
    """The rotation that a config names; of one kind of layers where kinds differ.

    Reads today's ``rope_parameters``, and the older ``rope_scaling`` beside ``rope_theta``.
    """
    fields = dict(getattr(hf_config, "rope_parameters", None) or {})
    if layer_type is not None:
        fields = dict(fields.get(layer_type) or {})
    if not fields:
        fields = dict(getattr(hf_config, "rope_scaling", None) or {})
    theta = fields.get("rope_theta") or getattr(hf_config, "rope_theta", None) or 10_000.0
    if float(fields.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedModelError("partial_rotary_factor other than 1 is not supported")
    return Rope(float(theta), _scaling(fields, int(hf_config.max_position_embeddings)))


def context_length(ropes: Iterable[Rope], max_positions: int) -> int:
    """Tokens that a model's rotations are for, whose config names ``max_positions``.

    transformers computes with any number; this is what those who publish such models mean. Linear
    and dynamic scaling multiply what the config names. Yarn multiplies the context of training,
    which the config may leave at what it was; so does llama3, where nothing longer is named.
    """
    return max([max_positions, *(_stretched(rope.scaling, max_positions) for rope in ropes)])


def _stretched(scaling: Scaling | None, max_positions: int) -> int:
    if isinstance(scaling, LinearScaling | DynamicScaling):
        return int(max_positions * scaling.factor)
    if isinstance(scaling, YarnScaling):
        return int(scaling.original_max_positions * scaling.factor)
    if isinstance(scaling, Llama3Scaling) and max_positions <= scaling.original_max_positions:
        return int(scaling.original_max_positions * scaling.factor)
    return max_positions


def rotated_alike(ropes: Iterable[Rope]) -> float:
    """Tokens up to which a key is rotated in the same way, however long its sequence becomes."""
    originals = (
        rope.scaling.original_max_positions
        for rope in ropes
        if isinstance(rope.scaling, DynamicScaling)
    )
    return min(originals, default=math.inf)


def check_rope_types(config: Mapping[str, Any]) -> None:
    """UnsupportedModelError for a config.json, of either schema, with a kind not in ROPE_TYPES."""
    for name in ("rope_parameters", "rope_scaling"):
        fields = config.get(name) or {}
        if not isinstance(fields, Mapping):
            raise UnsupportedModelError(f"{name}={fields!r}: an object is needed")
        for part in (fields, *(value for value in fields.values() if isinstance(value, Mapping))):
            _checked_type(part)


def _checked_type(fields: Mapping[str, Any]) -> str:
    kind = str(fields.get("rope_type") or fields.get("type") or "default")
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"rope type {kind!r} is not supported (only {', '.join(ROPE_TYPES)})"
        )
    return kind


def _scaling(fields: Mapping[str, Any], max_positions: int) -> Scaling | None:
    kind = _checked_type(fields)
    if kind == "default":
        return None
    original = int(fields.get("original_max_position_embeddings") or max_positions)
    try:
        if kind == "yarn":
            return _yarn(fields, original, max_positions)
        factor = _positive("factor", fields["factor"])
        if kind == "linear":
            return LinearScaling(factor=factor)
        if kind == "dynamic":  # transformers goes by the context, whatever else is written
            return DynamicScaling(factor=factor, original_max_positions=max_positions)
        return Llama3Scaling(
            factor=factor,
            low_freq_factor=float(fields["low_freq_factor"]),
            high_freq_factor=float(fields["high_freq_factor"]),
            original_max_positions=original,
        )
    except KeyError as error:
        raise UnsupportedModelError(f"rope type {kind!r} needs the field {error}") from error


def _positive(name: str, value: Any) -> float:
    number = float(value)
    if not 0 < number < math.inf:
        raise UnsupportedModelError(f"rope scaling {name}={value}: must be above 0 and finite")
    return number


def _yarn(fields: Mapping[str, Any], original: int, max_positions: int) -> YarnScaling:
    factor = _positive("factor", fields.get("factor") or max_positions / original)
    attention = fields.get("attention_factor")
    if attention is None:
        above, below = fields.get("mscale"), fields.get("mscale_all_dim")
        attention = yarn_magnitude(factor)
        if above and below:
            attention = yarn_magnitude(factor, above) / yarn_magnitude(factor, below)
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        beta_fast=float(fields.get("beta_fast") or 32.0),
        beta_slow=float(fields.get("beta_slow") or 1.0),
        truncate=bool(fields.get("truncate", True)),
        attention_factor=float(attention),
    )


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """How much larger queries and keys are made for a context ``factor`` times as long."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
