"""Where a model's weights are in its checkpoint, and whether they are those of its config.

Knows both namings: the engine asks by the names that transformers uses, a GGUF file's own names
and packed types stay in here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from layer_streamer import LayerSpec, Manifest, TensorSpec

from .config import ModelConfig
from .dequant import FLOAT_TYPES, row_width
from .errors import UnsupportedModelError
from .quants import BLOCK_TYPES

GGUF_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""A layer's modules: the name in transformers, the name in GGUF."""

GGUF_OUTPUT_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""The same of models that norm what attention and feed-forward give."""

IGNORED_KEYS = frozenset({"self_attn.rotary_emb.inv_freq"})
"""Tensors of older checkpoints that repeat what the config says."""


@dataclass(frozen=True, slots=True)
class WeightNames:
    """Names of a model's tensors in its checkpoint, and what was done to them there."""

    embedding: str
    norm: str
    head: str
    """The output head; the token embedding where the two are tied."""
    rope_factors: str | None
    """Divisors of the rotary frequencies, where the checkpoint has them."""
    modules: Mapping[str, str]
    """A layer's modules: the name in transformers, the name in the checkpoint."""
    interleaved_rope: bool
    """True: rows of q and k are permuted, as in GGUF files of llama models."""
    norm_offset: float | None
    """What is to be added to the weights of norms, which then multiply in float32; None: nothing,
    and they multiply in the engine's dtype."""


def weight_names(manifest: Manifest, config: ModelConfig) -> WeightNames:
    """Names for this checkpoint; UnsupportedModelError if its tensors are not the config's."""
    gguf = manifest.format == "gguf"
    if gguf:
        embedding, norm, untied = "token_embd.weight", "output_norm.weight", "output.weight"
        tied = untied not in manifest.static
    else:
        embedding, norm, untied = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
        tied = config.tied_head
    known = GGUF_MODULES | (GGUF_OUTPUT_NORMS if config.output_norms else {})
    names = WeightNames(
        embedding=embedding,
        norm=norm,
        head=embedding if tied else untied,
        rope_factors="rope_freqs.weight" if "rope_freqs.weight" in manifest.static else None,
        modules={name: known[name] if gguf else name for name in weight_shapes(config)},
        interleaved_rope=gguf and config.model_type in ("llama", "mistral"),
        norm_offset=(0.0 if gguf else 1.0) if config.zero_centered_norms else None,
    )
    _check_static(manifest, config, names)
    if manifest.num_layers != config.num_layers:
        raise UnsupportedModelError(
            f"{manifest.path}: {manifest.num_layers} layers, the config says {config.num_layers}"
        )
    for layer in manifest.layers:
        _check_layer(layer, config, names)
    return names


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every module's weight in a layer."""
    hidden, ffn, width = config.hidden_size, config.ffn_size, config.head_dim
    q, kv = config.num_heads * width, config.num_kv_heads * width
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    if config.head_norms:
        shapes |= {"self_attn.q_norm": (width,), "self_attn.k_norm": (width,)}
    if config.output_norms:
        shapes |= {"pre_feedforward_layernorm": (hidden,), "post_feedforward_layernorm": (hidden,)}
    return shapes


def _check_static(manifest: Manifest, config: ModelConfig, names: WeightNames) -> None:
    vocabulary = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {names.embedding: vocabulary, names.head: vocabulary}
    shapes[names.norm] = (config.hidden_size,)
    if names.rope_factors is not None:
        shapes[names.rope_factors] = (config.head_dim // 2,)
    for name, shape in shapes.items():
        if name not in manifest.static:
            raise UnsupportedModelError(f"{manifest.path}: tensor {name!r} is missing")
        _check_tensor(manifest.static[name], shape)


def _check_layer(layer: LayerSpec, config: ModelConfig, names: WeightNames) -> None:
    known: set[str] = set(IGNORED_KEYS)
    for module, shape in weight_shapes(config).items():
        weight, bias = (f"{names.modules[module]}.{kind}" for kind in ("weight", "bias"))
        biased = module in config.biased
        for key, its_shape in ((weight, shape), *([(bias, shape[:1])] if biased else [])):
            if key not in layer.tensors:
                raise UnsupportedModelError(f"layer {layer.layer_idx}: tensor {key!r} is missing")
            _check_tensor(layer.tensors[key], its_shape)
            known.add(key)
    for key in sorted(layer.tensors.keys() - known):
        raise UnsupportedModelError(
            f"layer {layer.layer_idx}: tensor {key!r} is no part of a {config.model_type} model "
            "with this config"
        )


def _check_tensor(spec: TensorSpec, shape: tuple[int, ...]) -> None:
    kind, found = spec.ggml_type, spec.shape
    if kind in BLOCK_TYPES:
        found = (*found[:-1], row_width(found[-1], kind))
    elif kind not in (None, *FLOAT_TYPES):
        raise UnsupportedModelError(
            f"tensor {spec.name!r} is {kind}, this engine unpacks only "
            f"{', '.join((*BLOCK_TYPES, *FLOAT_TYPES))}"
        )
    elif not spec.dtype.is_floating_point or spec.dtype.itemsize < 2:
        raise UnsupportedModelError(
            f"tensor {spec.name!r} has dtype {spec.dtype}, not a plain float"
        )
    if found != shape:
        raise UnsupportedModelError(
            f"tensor {spec.name!r} has shape {list(found)}, the config says {list(shape)}"
        )
