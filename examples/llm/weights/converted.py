"""The tensors of a GGUF file as a safetensors checkpoint has them: names, order of rows, floats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from layer_streamer import Manifest, TensorSpec

from ..errors import UnsupportedModelError
from ..models.config import ModelConfig
from ..models.names import WeightNames
from ..models.rope import rope_frequencies
from ..models.rope_config import Llama3Scaling, Rope
from .dequant import Unpacker, ggml_matrix
from .quants import BLOCK_TYPES
from .stored import Mapped, Stored

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Source:
    """Where one tensor comes from, and what was done to it there."""

    spec: TensorSpec
    heads: int = 0
    """Heads whose rows are permuted; 0: none are."""
    shift: float = 0.0
    """What is to be added."""
    matrix: Stored | None = None
    """None: it is a vector."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the floats."""
        if self.matrix is not None:
            return self.matrix.rows, self.matrix.width
        return self.spec.shape


def sources(manifest: Manifest, config: ModelConfig, names: WeightNames) -> dict[str, Source]:
    """Every tensor of the model by its name in transformers, in the order of its passes."""
    shift = 0.0 if names.norm_offset is None else names.norm_offset - 1.0
    embedding = names.embedding_matrix
    spec = manifest.static[names.embedding]
    found = {"model.embed_tokens.weight": Source(spec, matrix=embedding)}
    for layer in manifest.layers:
        matrices = names.layers[layer.layer_idx]
        for module, own in names.modules.items():
            for kind in ("weight", "bias"):
                if f"{own}.{kind}" not in layer.tensors:
                    continue
                if kind == "weight" or module in config.biased:
                    hub_name = config.family.hub_name(module)
                    found[f"model.layers.{layer.layer_idx}.{hub_name}.{kind}"] = Source(
                        layer.tensors[f"{own}.{kind}"],
                        permuted_heads(module, names, config),
                        shift if module.endswith("norm") else 0.0,
                        matrices.get(module) if kind == "weight" else None,
                    )
    found["model.norm.weight"] = Source(manifest.static[names.norm], shift=shift)
    if names.head != names.embedding:
        spec = manifest.static[names.head]
        found["lm_head.weight"] = Source(spec, matrix=names.head_matrix)
    return found


def permuted_heads(module: str, names: WeightNames, config: ModelConfig) -> int:
    """Heads of a module whose rows the checkpoint has permuted; 0: they are in their order."""
    heads = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}
    return heads.get(module, 0) if names.interleaved_rope else 0


def in_order(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys, or a bias of them, as transformers has them."""
    permuted: torch.Tensor = rows.unflatten(0, (heads, -1, 2))
    return permuted.transpose(1, 2).flatten(0, 2)


def out_of_order(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The other way round: as a checkpoint with permuted rows has them."""
    straight: torch.Tensor = rows.unflatten(0, (heads, 2, -1))
    return straight.transpose(1, 2).flatten(0, 2)


class Reader:
    """Reads tensors as floats of one dtype, some rows at a time."""

    def __init__(self, names: WeightNames, dtype: torch.dtype) -> None:
        self._unpacker = Unpacker(CPU, dtype, names.widest(dtype, dtype))

    def blocks(self, source: Source) -> Iterator[torch.Tensor]:
        """All values in order, flat; each block is good until the next is asked for."""
        rows = Mapped(source.spec).tensor
        if source.matrix is not None and source.matrix.expert is not None:
            rows = rows[source.matrix.expert]
        if source.heads:
            rows = in_order(rows, source.heads)
        if source.spec.ggml_type in BLOCK_TYPES:
            for _, _, floats in self._unpacker.blocks(ggml_matrix(rows, source.spec.ggml_type)):
                yield floats.reshape(-1)
        else:
            yield (rows.float() + source.shift).to(self._unpacker.dtype).reshape(-1)


def scaling_of_factors(factors: torch.Tensor, config: ModelConfig) -> dict[str, Any]:
    """The llama3 scaling that gives these divisors of the frequencies; an error if none does."""
    theta, width = config.rope(0).theta, config.head_dim
    fields = {"factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling = Llama3Scaling(**fields, original_max_positions=8192)
    expected = rope_frequencies(Rope(theta), width) / rope_frequencies(Rope(theta, scaling), width)
    if not torch.allclose(factors.float(), expected, rtol=1e-3):
        raise UnsupportedModelError("rope_freqs.weight is not the scaling of a LLaMA 3 model")
    return {"rope_type": "llama3", "original_max_position_embeddings": 8192, **fields}


def converted_config(
    fields: Mapping[str, Any], manifest: Manifest, config: ModelConfig
) -> dict[str, Any]:
    """config.json of the converted model, from that of the file."""
    factors = manifest.static.get("rope_freqs.weight")
    if factors is None:
        return dict(fields)
    scaling = scaling_of_factors(Mapped(factors).tensor, config)
    return {**fields, "rope_parameters": {**fields["rope_parameters"], **scaling}}
