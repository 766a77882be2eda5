"""What the engine must know about a model, taken from a transformers config.

Knows which models the engine computes correctly and refuses every other by name: a model that
runs but answers wrongly is worse than one line that says no.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MODEL_TYPES = ("llama", "qwen2")


class UnsupportedModelError(ValueError):
    """The model, or a part of it, is not one that this engine can compute."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
    """Rotary frequencies stretched for contexts longer than the model was first trained on."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The numbers of one LLaMA-family model."""

    model_type: str
    """"llama" or "qwen2"."""
    num_layers: int
    hidden_size: int
    ffn_size: int
    """Width between the two matrices of the feed-forward block."""
    num_heads: int
    num_kv_heads: int
    """Key and value heads; each serves num_heads / num_kv_heads query heads."""
    head_dim: int
    """Width of one head; need not be hidden_size / num_heads."""
    vocab_size: int
    norm_eps: float
    max_positions: int
    """Context length in tokens."""
    tied_head: bool
    """True: the output head is the token embedding."""
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    eos_ids: frozenset[int]
    """Ids that end a text; more may come from the tokenizer and the generation config."""


def model_config(hf_config: Any) -> ModelConfig:
    """The engine's view of a transformers config; UnsupportedModelError if it cannot compute it."""
    model_type = str(hf_config.model_type)
    check_model_type(model_type)
    _refuse_variants(hf_config)
    heads = int(hf_config.num_attention_heads)
    kv_heads = int(getattr(hf_config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads)
    if heads % kv_heads or head_dim % 2:
        raise UnsupportedModelError(
            f"{heads} heads over {kv_heads} key-value heads of width {head_dim}: "
            "heads must divide evenly and have an even width"
        )
    theta, scaling = _rope(hf_config)
    return ModelConfig(
        model_type=model_type,
        num_layers=int(hf_config.num_hidden_layers),
        hidden_size=int(hf_config.hidden_size),
        ffn_size=int(hf_config.intermediate_size),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=int(hf_config.vocab_size),
        norm_eps=float(hf_config.rms_norm_eps),
        max_positions=int(hf_config.max_position_embeddings),
        tied_head=bool(hf_config.tie_word_embeddings),
        rope_theta=theta,
        rope_scaling=scaling,
        eos_ids=id_set(getattr(hf_config, "eos_token_id", None)),
    )


def check_model_type(model_type: str) -> None:
    """UnsupportedModelError for an architecture that the engine does not compute."""
    if model_type not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported (only {', '.join(MODEL_TYPES)})"
        )


def id_set(ids: int | list[int] | None) -> frozenset[int]:
    """Token ids from a config field that holds one, several or none."""
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def _refuse_variants(hf_config: Any) -> None:
    activation = hf_config.hidden_act
    if activation != "silu":
        raise UnsupportedModelError(f"hidden_act={activation!r} is not supported (only 'silu')")
    if getattr(hf_config, "use_sliding_window", False):
        raise UnsupportedModelError("use_sliding_window=true is not supported")
    quantization = getattr(hf_config, "quantization_config", None)
    if quantization:
        method = dict(quantization).get("quant_method") if isinstance(quantization, dict) else None
        raise UnsupportedModelError(f"quantization {method or quantization!r} is not supported")


def _rope(hf_config: Any) -> tuple[float, Llama3Scaling | None]:
    """Base and scaling, from rope_parameters or from the older rope_theta and rope_scaling."""
    rope = dict(getattr(hf_config, "rope_parameters", None) or {})
    if not rope:
        rope = dict(getattr(hf_config, "rope_scaling", None) or {})
    theta = float(rope.get("rope_theta") or getattr(hf_config, "rope_theta", None) or 10_000.0)
    if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedModelError("partial_rotary_factor other than 1 is not supported")
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    if kind == "default":
        return theta, None
    if kind == "llama3":
        return theta, Llama3Scaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_positions=int(rope["original_max_position_embeddings"]),
        )
    raise UnsupportedModelError(f"rope type {kind!r} is not supported (only default and llama3)")
