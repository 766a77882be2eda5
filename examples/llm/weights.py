"""Where a model's weights are in its checkpoint, and their use in a pass.

Knows both namings: the engine asks by the names that transformers uses, a GGUF file's own names
and packed types stay in here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from layer_streamer import LayerSpec, Manifest, TensorSpec

from .config import ModelConfig, UnsupportedModelError
from .dequant import BLOCK_BYTES, FLOAT_TYPES, Unpacker, row_width

GGUF_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""A layer's modules: the name in transformers, the name in GGUF."""

IGNORED_KEYS = frozenset({"self_attn.rotary_emb.inv_freq"})
"""Tensors of older checkpoints that repeat what the config says."""


@dataclass(frozen=True, slots=True)
class WeightNames:
    """Names of a model's tensors in its checkpoint."""

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


def weight_names(manifest: Manifest, config: ModelConfig) -> WeightNames:
    """Names for this checkpoint; UnsupportedModelError if its tensors are not the config's."""
    if manifest.format == "gguf":
        embedding, norm, untied = "token_embd.weight", "output_norm.weight", "output.weight"
        tied = untied not in manifest.static
    else:
        embedding, norm, untied = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
        tied = config.tied_head
    gguf = manifest.format == "gguf"
    names = WeightNames(
        embedding=embedding,
        norm=norm,
        head=embedding if tied else untied,
        rope_factors="rope_freqs.weight" if "rope_freqs.weight" in manifest.static else None,
        modules=GGUF_MODULES if gguf else {name: name for name in GGUF_MODULES},
        interleaved_rope=gguf and config.model_type == "llama",
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
    hidden, ffn = config.hidden_size, config.ffn_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
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


def _check_static(manifest: Manifest, config: ModelConfig, names: WeightNames) -> None:
    vocabulary = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {names.embedding: vocabulary, names.head: vocabulary}
    shapes[names.norm] = (config.hidden_size,)
    for name, shape in shapes.items():
        if name not in manifest.static:
            raise UnsupportedModelError(f"{manifest.path}: tensor {name!r} is missing")
        _check_tensor(manifest.static[name], shape)


def _check_layer(layer: LayerSpec, config: ModelConfig, names: WeightNames) -> None:
    known: set[str] = set(IGNORED_KEYS)
    for module, shape in weight_shapes(config).items():
        weight, bias = (f"{names.modules[module]}.{kind}" for kind in ("weight", "bias"))
        known |= {weight, bias}
        biased = config.model_type == "qwen2" and module[-6:] in ("q_proj", "k_proj", "v_proj")
        for key in [weight, bias] if biased else [weight]:
            if key not in layer.tensors:
                raise UnsupportedModelError(f"layer {layer.layer_idx}: tensor {key!r} is missing")
        _check_tensor(layer.tensors[weight], shape)
        if bias in layer.tensors:
            _check_tensor(layer.tensors[bias], shape[:1])
    for key in layer.tensors.keys() - known:
        raise UnsupportedModelError(
            f"layer {layer.layer_idx}: tensor {key!r} is no part of a {config.model_type} model"
        )


def _check_tensor(spec: TensorSpec, shape: tuple[int, ...]) -> None:
    kind, found = spec.ggml_type, spec.shape
    if kind in BLOCK_BYTES:
        found = (*found[:-1], row_width(found[-1], kind))
    elif kind not in (None, *FLOAT_TYPES):
        raise UnsupportedModelError(
            f"tensor {spec.name!r} is {kind}, this engine unpacks only "
            f"{', '.join((*BLOCK_BYTES, *FLOAT_TYPES))}"
        )
    elif not spec.dtype.is_floating_point or spec.dtype.itemsize < 2:
        raise UnsupportedModelError(
            f"tensor {spec.name!r} has dtype {spec.dtype}, not a plain float"
        )
    if found != shape:
        raise UnsupportedModelError(
            f"tensor {spec.name!r} has shape {list(found)}, the config says {list(shape)}"
        )


class StepWeights:
    """The tensors of one step of a pass, unpacked where they are used.

    Holds views of a slot, so it lives as long as the step.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        layer: LayerSpec,
        names: WeightNames,
        unpacker: Unpacker,
    ) -> None:
        self._tensors = tensors
        self._specs = layer.tensors
        self._modules = names.modules
        self._unpacker = unpacker
        self.layer_idx = layer.layer_idx
        self.interleaved_rope = names.interleaved_rope

    def vector(self, name: str) -> torch.Tensor:
        """A norm's weight, by its full name in transformers."""
        module, _, kind = name.rpartition(".")
        return self._tensors[f"{self._modules[module]}.{kind}"]

    def linear(self, x_TD: torch.Tensor, module: str) -> torch.Tensor:
        """x times the transposed weight of a module, plus its bias if it has one: (T, rows)."""
        name = self._modules[module]
        key = f"{name}.weight"
        bias = self._tensors.get(f"{name}.bias")
        y = project(x_TD, self._tensors[key], self._specs[key].ggml_type, self._unpacker)
        return y if bias is None else y.add_(bias)


def project(
    x_TD: torch.Tensor, weight: torch.Tensor, ggml_type: str | None, unpacker: Unpacker
) -> torch.Tensor:
    """x times a transposed weight, packed or not: (T, rows)."""
    if ggml_type not in BLOCK_BYTES:
        return F.linear(x_TD, weight)
    y_TN = x_TD.new_empty(x_TD.shape[0], weight.shape[0])
    for start, end, rows_ND in unpacker.blocks(weight, ggml_type):
        torch.mm(x_TD, rows_ND.t(), out=y_TN[:, start:end])
    return y_TN


def embed(
    ids: torch.Tensor, table: torch.Tensor, spec: TensorSpec, unpacker: Unpacker, like: torch.Tensor
) -> torch.Tensor:
    """Rows ``ids`` of the host's table, with the dtype and on the device of ``like``: (T, D)."""
    rows = table[ids].to(like.device)
    if spec.ggml_type not in BLOCK_BYTES:
        return rows.to(like.dtype)
    return torch.cat([block.clone() for _, _, block in unpacker.blocks(rows, spec.ggml_type)])


def widest_row(manifest: Manifest) -> int:
    """Weights in the longest packed row of the checkpoint; 0 if nothing is packed."""
    return max((_width(spec) for spec in _all_specs(manifest)), default=0)


def _width(spec: TensorSpec) -> int:
    return row_width(spec.shape[-1], spec.ggml_type) if spec.ggml_type in BLOCK_BYTES else 0


def _all_specs(manifest: Manifest) -> Iterator[TensorSpec]:
    yield from manifest.static.values()
    for layer in manifest.layers:
        yield from layer.tensors.values()
