"""Where a model's weights are in its checkpoint, and whether they are those of its config.

Knows both namings: the engine asks by the names that transformers uses, a GGUF file's own names
and packed types stay in here. Every tensor is used, or known to change nothing, or refused; where
tensors and config say something of one matter, they are compared here and in ``weights/finder``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from layer_streamer import LayerSpec, Manifest

from ..adapters.pairs import Adapter
from ..errors import UnsupportedModelError
from ..host_kernels.products import floats_serve
from ..weights.dequant import Widest
from ..weights.finder import Finder
from ..weights.packed import FLOATS
from ..weights.stacked import find_slice, find_turns
from ..weights.stored import Stored, check_plain
from ..weights.unused import NEXT_TOKEN_KEYS, refuse_unused
from .config import ModelConfig
from .gguf_names import GGUF_EXPERTS, gguf_module
from .modules import (
    EXPERTS,
    MATRICES,
    ROUTER,
    SHARED,
    SHARED_GATE,
    SINKS,
    expert_module,
    expert_of,
)
from .outside import Outside

LAYER_STEMS = ("model.", "model.language_model.")
"""Prefixes of layers in transformers' own names, which a quantization_config may use."""


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
    used: tuple[frozenset[str], ...]
    """The tensors of each layer that passes look at; others say what is known, as shapes do."""
    biased: frozenset[str] = frozenset()
    """A layer's modules whose bias is used; others may have one of zeros."""
    notes: tuple[str, ...] = ()
    """Where the checkpoint says other than the config, and which of the two is followed."""
    adapter: Adapter | None = None
    """What is added to products of layers' matrices, where they are computed."""

    @property
    def as_stored(self) -> bool:
        """True: the streamer must not cast tensors, since it would round scales."""
        return any("scale" in matrix.keys for matrix in self._matrices())

    @property
    def head_parts(self) -> list[str]:
        """Tensors of the head that stay on the device: its scales, not its weights."""
        matrix = self.head_matrix
        return [key for key in matrix.keys.values() if key != matrix.key]

    def cast(self, device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
        """What the streamer is to cast floats to, for an engine of this dtype; None: nothing, for
        it would round scales, or kernels multiply by floats as they lie in their file."""
        if self.as_stored:
            return None
        if device.type != "cpu" or dtype != torch.float32:
            return dtype
        kinds = {(matrix.format, matrix.width) for matrix in self._matrices()}
        return None if floats_serve(kinds) else dtype

    def widest(self, dtype: torch.dtype, cast: torch.dtype | None) -> Widest:
        """What is to be unpacked by an engine of this dtype, where floats are ``cast`` on their
        way."""
        found = [one for one in self._matrices() if one.format not in FLOATS or cast is None]
        # Experts that are brought on demand are not cast, whatever the rest is.
        found += [m for layer in self.layers for name, m in layer.items() if expert_of(name)]
        return Widest.of(
            (matrix.format, matrix.width, matrix.ordered)
            for matrix in found
            if matrix.format not in FLOATS or matrix.dtype != dtype
        )

    def _matrices(self) -> Iterator[Stored]:
        yield self.embedding_matrix
        yield self.head_matrix
        for layer in self.layers:
            yield from layer.values()


def known_layers(manifest: Manifest, config: ModelConfig) -> tuple[Manifest, list[str]]:
    """The checkpoint without layers beyond those of its config, and what to say of that: nothing if
    they guess several tokens ahead, which no pass here uses."""
    extra = manifest.layers[config.num_layers :]
    if not extra:
        return manifest, []
    rest = replace(manifest, layers=manifest.layers[: config.num_layers])
    if all(any(map(NEXT_TOKEN_KEYS.fullmatch, layer.tensors)) for layer in extra):
        return rest, []
    first = min(spec.name for spec in extra[0].tensors.values())
    return rest, [
        f"the config says {config.num_layers} layers, the checkpoint has {manifest.num_layers}: "
        f"those from {first!r} on are left out, as transformers does"
    ]


def used_tensors(manifest: Manifest, names: WeightNames) -> Manifest:
    """The checkpoint without what no pass looks at: as small as it is, it would be copied again and
    again, with experts even one by one."""
    layers = [
        replace(layer, tensors={key: spec for key, spec in layer.tensors.items() if key in own})
        for layer, own in zip(manifest.layers, names.used, strict=True)
    ]
    return replace(manifest, layers=tuple(layers))


def weight_names(manifest: Manifest, config: ModelConfig) -> WeightNames:
    """Names for this checkpoint; UnsupportedModelError if its tensors are not the config's."""
    gguf = manifest.format == "gguf"
    outside = Outside(manifest, config)
    modules = _module_names(config, manifest)
    norm, factors = outside.norm(), outside.rope_factors()
    if manifest.num_layers != config.num_layers:
        raise UnsupportedModelError(
            f"{manifest.path}: {manifest.num_layers} layers, the config says {config.num_layers}"
        )
    embedding, head = outside.embedding_and_head()
    layers, used, remarks = [], [], []
    for layer in manifest.layers:
        matrices, keys, found = _layer_matrices(layer, config, modules, outside.stem)
        layers.append(matrices)
        used.append(keys)
        remarks += found
    outside.refuse_others()
    return WeightNames(
        embedding=embedding.key,
        norm=norm,
        head=head.key,
        rope_factors=factors,
        modules=modules,
        interleaved_rope=gguf and config.family.permuted_in_gguf,
        norm_offset=(0.0 if gguf else 1.0) if config.family.zero_centered_norms else None,
        embedding_matrix=embedding,
        head_matrix=head,
        layers=tuple(layers),
        used=tuple(used),
        biased=config.biased,
        notes=(*outside.notes, *_summed_up(remarks)),
    )


def _module_names(config: ModelConfig, manifest: Manifest) -> dict[str, str]:
    """The modules of all layers: the name in the engine, the name in the checkpoint."""
    family, found, gguf = config.family, dict[str, str](), manifest.format == "gguf"
    first = gguf_module(expert_module(0, MATRICES[0]), apart=True)
    apart = any(f"{first}.weight" in layer.tensors for layer in manifest.layers)
    kinds = {config.mixture(i) is None: i for i in range(config.num_layers)}
    for module in (name for i in kinds.values() for name in weight_shapes(config, i)):
        if gguf:
            norms, own = family.output_norms, family.gguf_modules.get(module)
            found[module] = own or gguf_module(module, output_norms=norms, apart=apart)
        else:
            found[module] = family.hub_name(module)
    return found


def _summed_up(remarks: Iterable[tuple[str, str]]) -> list[str]:
    """One note for all tensors of which the same is said."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in remarks:
        by_reason.setdefault(reason, []).append(name)
    more = {len(names): f" (and {len(names) - 1} more)" for names in by_reason.values()}
    more[1] = ""
    return [
        f"tensor {names[0]!r}{more[len(names)]} {reason}" for reason, names in by_reason.items()
    ]


def weight_shapes(config: ModelConfig, layer_idx: int) -> dict[str, tuple[int, ...]]:
    """Shape of every module's weight in a layer, by its name in the engine."""
    hidden, width = config.hidden_size, config.head_dim
    q, kv = config.num_heads * width, config.num_kv_heads * width
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "post_attention_layernorm": (hidden,),
    }
    if config.family.sinks:
        shapes[SINKS] = (config.num_heads,)
    experts = config.mixture(layer_idx)
    if experts is None:
        shapes |= _block_shapes("mlp", hidden, config.ffn_size)
    else:
        shapes[ROUTER] = (experts.count, hidden)
        for expert in range(experts.count):
            shapes |= _block_shapes(f"{EXPERTS}{expert}", hidden, experts.width)
        if experts.shared_width:
            shapes |= _block_shapes(SHARED, hidden, experts.shared_width)
            shapes[SHARED_GATE] = (1, hidden)
    if config.family.head_norms:
        shapes |= {"self_attn.q_norm": (width,), "self_attn.k_norm": (width,)}
    if config.family.width_norms:
        shapes |= {"self_attn.q_norm": (q,), "self_attn.k_norm": (kv,)}
    if config.family.output_norms:
        shapes |= {"pre_feedforward_layernorm": (hidden,), "post_feedforward_layernorm": (hidden,)}
    return shapes


def _block_shapes(block: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    """Of a feed-forward block."""
    gate, up, down = (f"{block}.{matrix}" for matrix in MATRICES)
    return {gate: (width, hidden), up: (width, hidden), down: (hidden, width)}


def _layer_matrices(
    layer: LayerSpec, config: ModelConfig, modules: Mapping[str, str], stem: str
) -> tuple[dict[str, Stored], frozenset[str], list[tuple[str, str]]]:
    """The layer's matrices, the tensors that passes look at, and what its tensors say other than
    the config; UnsupportedModelError if they are not the config's."""
    finder = Finder(layer.tensors, f"layer {layer.layer_idx}")
    matrices: dict[str, Stored] = {}
    used: set[str] = set()
    for module, shape in weight_shapes(config, layer.layer_idx).items():
        own = modules[module]
        vectors = [f"{own}.bias"] if module in config.biased else []
        if len(shape) == 2:
            paths = dict.fromkeys(f"layers.{layer.layer_idx}.{name}" for name in (module, own))
            names = dict.fromkeys(f"{start}{p}" for start in (stem, *LAYER_STEMS) for p in paths)
            scheme = config.quantization.scheme(*names) if config.quantization else None
            found = _in_stack(finder, config, own, module, (shape[0], shape[1]))
            if found is not None:
                matrices[module] = found
            else:
                matrices[module] = finder.find(own, (shape[0], shape[1]), scheme)
            used.update(matrices[module].keys.values())
        else:
            vectors.append(own if own in layer.tensors else f"{own}.weight")
        for key in vectors:
            if key not in layer.tensors:
                raise UnsupportedModelError(f"layer {layer.layer_idx}: tensor {key!r} is missing")
            check_plain(layer.tensors[key], shape[:1])
            used.add(key)
    unused = {key: layer.tensors[key] for key in layer.tensors.keys() - used - finder.compared}
    refuse_unused(unused, f"layer {layer.layer_idx}", config.model_type)
    return matrices, frozenset(used), finder.remarks


def _in_stack(
    finder: Finder, config: ModelConfig, own: str, module: str, shape: tuple[int, int]
) -> Stored | None:
    """A matrix of an expert that is one of those in a tensor; None: it has a tensor of its own."""
    expert, experts, mixture = expert_of(module), config.experts, config.family.mixture
    if expert is None or experts is None or mixture is None:
        return None
    stacked = (experts.count, *shape)
    if own in GGUF_EXPERTS.values():
        return find_slice(finder, own, stacked, expert[0], biased=experts.clamp is not None)
    return find_turns(finder, own, stacked, expert) if mixture.stacked else None
