"""Where a model's weights are in its checkpoint, and whether they are those of its config.

Knows both namings: the engine asks by the names that transformers uses, a GGUF file's own names
and packed types stay in here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from layer_streamer import LayerSpec, Manifest

from ..errors import UnsupportedModelError
from ..weights.dequant import Widest
from ..weights.finder import Finder
from ..weights.packed import FLOATS
from ..weights.stored import Stored, check_plain
from .config import ModelConfig
from .gguf_names import GGUF_MODULES, GGUF_OUTPUT_NORMS

IGNORED_KEYS = frozenset(
    {"self_attn.rotary_emb.inv_freq", "self_attn.k_scale", "self_attn.v_scale"}
)
"""Tensors of older checkpoints that repeat what the config says; scales of eight-bit keys and
values, which are kept with more here."""


@dataclass(frozen=True, slots=True)
class WeightNames:
    """Names of a model's tensors in its checkpoint, and what was done to them there."""

    embedding: str
    """The tensor with the embedding's weights, packed or not."""
    norm: str
    head: str
    """The same of the output head; that of the token embedding where the two are tied."""
    rope_factors: str | None
    """Divisors of the rotary frequencies, where the checkpoint has them."""
    modules: Mapping[str, str]
    """A layer's modules: the name in transformers, the name in the checkpoint."""
    interleaved_rope: bool
    """True: rows of q and k are permuted, as in GGUF files of llama models."""
    norm_offset: float | None
    """What is to be added to the weights of norms, which then multiply in float32; None: nothing,
    and they multiply in the engine's dtype."""
    embedding_matrix: Stored
    head_matrix: Stored
    layers: tuple[Mapping[str, Stored], ...]
    """Each layer's matrices, by their names in transformers."""

    @property
    def as_stored(self) -> bool:
        """True: the streamer must not cast tensors, since it would round scales."""
        return any("scale" in matrix.keys for matrix in self._matrices())

    @property
    def head_parts(self) -> list[str]:
        """Tensors of the head that stay on the device: its scales, not its weights."""
        matrix = self.head_matrix
        return [key for key in matrix.keys.values() if key != matrix.key]

    def widest(self, dtype: torch.dtype) -> Widest:
        """What is to be unpacked by an engine of this dtype."""
        return Widest.of(
            (matrix.format, matrix.width, matrix.ordered)
            for matrix in self._matrices()
            if matrix.format not in FLOATS or (self.as_stored and matrix.dtype != dtype)
        )

    def _matrices(self) -> Iterator[Stored]:
        yield self.embedding_matrix
        yield self.head_matrix
        for layer in self.layers:
            yield from layer.values()


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
    modules = {name: known[name] if gguf else name for name in weight_shapes(config)}
    factors = "rope_freqs.weight" if "rope_freqs.weight" in manifest.static else None
    _check_static(manifest, config, norm, factors)
    if manifest.num_layers != config.num_layers:
        raise UnsupportedModelError(
            f"{manifest.path}: {manifest.num_layers} layers, the config says {config.num_layers}"
        )
    matrices = _static_matrix(manifest, config, embedding)
    head = matrices if tied else _static_matrix(manifest, config, untied)
    return WeightNames(
        embedding=matrices.key,
        norm=norm,
        head=head.key,
        rope_factors=factors,
        modules=modules,
        interleaved_rope=gguf and config.model_type in ("llama", "mistral"),
        norm_offset=(0.0 if gguf else 1.0) if config.zero_centered_norms else None,
        embedding_matrix=matrices,
        head_matrix=head,
        layers=tuple(_layer_matrices(layer, config, modules) for layer in manifest.layers),
    )


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


def _check_static(manifest: Manifest, config: ModelConfig, norm: str, factors: str | None) -> None:
    shapes = {norm: (config.hidden_size,)}
    if factors is not None:
        shapes[factors] = (config.head_dim // 2,)
    for name, shape in shapes.items():
        if name not in manifest.static:
            raise UnsupportedModelError(f"{manifest.path}: tensor {name!r} is missing")
        check_plain(manifest.static[name], shape)


def _static_matrix(manifest: Manifest, config: ModelConfig, name: str) -> Stored:
    """The embedding or the head, by the name that its tensor has if it is not packed."""
    module = name.removesuffix(".weight")
    scheme = config.quantization.scheme(module) if config.quantization else None
    shape = (config.vocab_size, config.hidden_size)
    found = Finder(manifest.static, str(manifest.path)).find(module, shape, scheme)
    if found.transposed or not found.ordered:
        spec = manifest.static[found.key]
        raise UnsupportedModelError(
            f"tensor {spec.name!r} is packed as {found.format}, which is supported in layers only "
            f"({spec.path})"
        )
    return found


def _layer_matrices(
    layer: LayerSpec, config: ModelConfig, modules: Mapping[str, str]
) -> dict[str, Stored]:
    """The layer's matrices; UnsupportedModelError if its tensors are not the config's."""
    finder = Finder(layer.tensors, f"layer {layer.layer_idx}")
    matrices: dict[str, Stored] = {}
    known: set[str] = set(IGNORED_KEYS)
    for module, shape in weight_shapes(config).items():
        own = modules[module]
        vectors = [f"{own}.bias"] if module in config.biased else []
        if len(shape) == 2:
            name = f"model.layers.{layer.layer_idx}.{module}"
            scheme = config.quantization.scheme(name) if config.quantization else None
            matrices[module] = finder.find(own, (shape[0], shape[1]), scheme)
            known.update(matrices[module].keys.values(), matrices[module].others)
        else:
            vectors.append(f"{own}.weight")
        for key in vectors:
            if key not in layer.tensors:
                raise UnsupportedModelError(f"layer {layer.layer_idx}: tensor {key!r} is missing")
            check_plain(layer.tensors[key], shape[:1])
            known.add(key)
    for key in sorted(layer.tensors.keys() - known):
        raise UnsupportedModelError(
            f"layer {layer.layer_idx}: tensor {key!r} is no part of a {config.model_type} model "
            "with this config"
        )
    return matrices
