"""What the engine must know about a model, taken from its config.

Knows which models the engine computes correctly and refuses every other by name: a model that
runs but answers wrongly is worse than one line that says no.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..errors import UnsupportedModelError
from ..weights.quantization import Quantization, read_quantization
from .experts import Experts, experts_of
from .families import FAMILIES, Family
from .families.family import FULL, SLIDING, check
from .rope_config import Rope, context_length, rope_of

__all__ = ["ModelConfig", "UnsupportedModelError", "check_model_type", "id_set", "model_config"]

ENCODERS = ("electra", "mpnet", "esm", "longformer", "big_bird", "ernie", "clip", "siglip", "vit")
"""Models that read and do not write, beside all whose name has "bert" in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The numbers of one model, and where it differs from a plain LLaMA."""

    model_type: str
    """One of FAMILIES."""
    num_layers: int
    hidden_size: int
    ffn_size: int
    """Width between the two matrices of the feed-forward block, in layers without experts."""
    num_heads: int
    num_kv_heads: int
    """Key and value heads; each serves num_heads / num_kv_heads query heads."""
    head_dim: int
    """Width of one head; need not be hidden_size / num_heads."""
    vocab_size: int
    norm_eps: float
    max_positions: int
    """Context length in tokens, as far as scaled rotations extend it."""
    tied_head: bool
    """True: the output head is the token embedding."""
    windows: tuple[int | None, ...]
    """Each layer's :meth:`window`."""
    ropes: tuple[Rope, ...]
    """Each layer's :meth:`rope`."""
    attention_scale: float
    """What the products of queries and keys are multiplied by."""
    embed_scale: float
    """What rows of the embedding are multiplied by."""
    biased: frozenset[str]
    """A layer's modules that have a bias."""
    experts: Experts | None = None
    """Of the layers that are mixtures; None: none is."""
    clip_qkv: float | None = None
    """How far queries, keys and values are from zero at most; None: as far as they are."""
    eos_ids: frozenset[int]
    """Ids that end a text; more may come from the tokenizer and the generation config."""
    quantization: Quantization | None = None
    """How matrices of a safetensors checkpoint are packed; None: they are not."""
    part_of: str | None = None
    """The type of a model with other parts, for images or sound, whose text part this is."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What the config says and transformers does not follow, nor the engine."""

    def window(self, layer_idx: int) -> int | None:
        """Tokens that a query of this layer sees, itself and those before it; None: all."""
        return self.windows[layer_idx]

    def rope(self, layer_idx: int) -> Rope:
        """The rotation of this layer; layers with equal ones share their angles."""
        return self.ropes[layer_idx]

    def mixture(self, layer_idx: int) -> Experts | None:
        """The experts of this layer; None: it has one feed-forward block."""
        found = self.experts
        return found if found is not None and layer_idx in found.layers else None

    @property
    def widest_ffn(self) -> int:
        """Width of the widest feed-forward block of any layer, of an expert or not."""
        found, widths = self.experts, set[int]()
        if found is None or len(found.layers) < self.num_layers:
            widths.add(self.ffn_size)
        if found is not None:
            widths |= {found.width, found.shared_width}
        return max(widths)

    @property
    def family(self) -> Family:
        """What is so in all models of its type."""
        return FAMILIES[self.model_type]


def model_config(hf_config: Any) -> ModelConfig:
    """The engine's view of a config, which has the attributes of one of transformers: that of
    :func:`config_fields`, or one itself. UnsupportedModelError if the engine cannot compute it."""
    model_type = str(hf_config.model_type)
    check_model_type(model_type)
    family = FAMILIES[model_type]
    _refuse_variants(hf_config, family)
    heads = int(hf_config.num_attention_heads)
    kv_heads = int(getattr(hf_config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads)
    if heads % kv_heads or head_dim % 2:
        raise UnsupportedModelError(
            f"{heads} heads over {kv_heads} key-value heads of width {head_dim}: "
            "heads must divide evenly and have an even width"
        )
    types = _layer_types(hf_config, family)
    by_kind = family.ropes_by_kind
    ropes = {kind: rope_of(hf_config, kind if by_kind else None) for kind in set(types)}
    window = getattr(hf_config, "sliding_window", None)
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
        max_positions=context_length(
            () if by_kind else ropes.values(), int(hf_config.max_position_embeddings)
        ),
        tied_head=bool(hf_config.tie_word_embeddings),
        windows=tuple(int(window) if t == SLIDING and window else None for t in types),
        ropes=tuple(ropes[t] for t in types),
        attention_scale=family.attention_scale(hf_config, head_dim),
        embed_scale=family.embed_scale(hf_config),
        biased=family.biased(hf_config),
        experts=None if family.mixture is None else experts_of(hf_config, family.mixture),
        clip_qkv=_clip_qkv(hf_config),
        eos_ids=id_set(getattr(hf_config, "eos_token_id", None)),
        quantization=read_quantization(getattr(hf_config, "quantization_config", None)),
        part_of=getattr(hf_config, "part_of", None),
        notes=tuple(_notes(hf_config, types)),
    )


def check_model_type(model_type: str, fields: Mapping[str, Any] = MappingProxyType({})) -> None:
    """UnsupportedModelError for an architecture that the engine does not compute; ``fields`` are
    those of its config.json, which may tell what it is."""
    if model_type in FAMILIES:
        return
    what = ""
    if fields.get("is_encoder_decoder"):
        what = ": an encoder-decoder, not a decoder alone"
    elif "bert" in model_type or model_type in ENCODERS:
        what = ": an encoder, which generates no text"
    elif "_class_name" in fields:
        what = f": a part of a diffusers pipeline ({fields['_class_name']})"
    elif fields.get("part_of"):
        what = f", the text part of a {fields['part_of']} model"
    raise UnsupportedModelError(
        f"model type {model_type!r} is not supported{what} (only {', '.join(FAMILIES)})"
    )


def id_set(ids: int | list[int] | None) -> frozenset[int]:
    """Token ids from a config field that holds one, several or none."""
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def _refuse_variants(hf_config: Any, family: Family) -> None:
    field, expected = family.activation_field, family.activation
    activation = getattr(hf_config, field)
    if activation != expected:
        raise UnsupportedModelError(f"{field}={activation!r} is not supported (only {expected!r})")
    for field in (
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "use_bidirectional_attention",
    ):
        if getattr(hf_config, field, None):
            raise UnsupportedModelError(f"{field}={getattr(hf_config, field)} is not supported")
    if not getattr(hf_config, "is_causal", True):
        raise UnsupportedModelError("is_causal=False is not supported: tokens see later ones")


def _clip_qkv(hf_config: Any) -> float | None:
    found = getattr(hf_config, "clip_qkv", None)
    if found is None or not FAMILIES[hf_config.model_type].clips_qkv:
        return None
    check("clip_qkv", found, float)
    return float(found)


def _layer_types(hf_config: Any, family: Family) -> list[str]:
    """The kind of each layer."""
    num_layers = int(hf_config.num_hidden_layers)
    types = getattr(hf_config, "layer_types", None)
    fixed = None if family.only_kind is None else [family.only_kind] * num_layers
    types = fixed if types is None and fixed is not None else list(types or ())
    for kind in types:
        if kind not in (FULL, SLIDING):
            raise UnsupportedModelError(
                f"layer type {kind!r} is not supported (only {FULL}, {SLIDING})"
            )
    if len(types) != num_layers:
        raise UnsupportedModelError(
            f"layer_types names {len(types)} layers, num_hidden_layers is {num_layers}"
        )
    return types if fixed is None else fixed


def _notes(hf_config: Any, types: list[str]) -> Iterator[str]:
    """Of windows that a config names for layers which have none, or the other way round."""
    family, window = FAMILIES[hf_config.model_type], getattr(hf_config, "sliding_window", None)
    name = family.model_type
    if family.only_kind == FULL and window:
        yield f"sliding_window={window} is not used: every layer of a {name} model sees all tokens"
    named = getattr(hf_config, "layer_types", None)
    if named is not None and list(named) != types:
        yield f"layer_types is not used: all layers of a {name} model are alike"
    if family.only_kind is None and SLIDING in types and not window:
        yield "layer_types names windows, but there is no sliding_window: layers see all tokens"
