"""One layer's tensors, as a compressed-tensors checkpoint has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from layer_streamer import LayerSpec

from ..errors import UnsupportedModelError
from ..models.modules import shared_key
from ..models.names import weight_shapes
from ..opening import Model
from ..weights.converted import in_order, permuted_heads
from ..weights.dequant import Unpacker
from ..weights.packed import Packed
from .errors import Errors
from .matrix import Quantized
from .scales import Rounding


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is quantized."""

    rounding: Rounding
    groups: Mapping[str, int]
    """Weights that share a scale, by kind of matrix: :func:`.grouping.choose_groups`."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the scales, and of the tensors that are not quantized."""
        return self.rounding.dtype


class LayerQuantizer:
    """Makes the tensors of one layer after the other, on the device that the layers are on."""

    def __init__(
        self,
        model: Model,
        recipe: Recipe,
        unpacker: Unpacker,
        on_weights: Callable[[int], object],
    ) -> None:
        """``on_weights`` hears of each piece that is done, in weights."""
        self._model, self._recipe = model, recipe
        self._unpacker, self._on_weights = unpacker, on_weights

    def tensors(
        self,
        streamed: Mapping[str, torch.Tensor],
        layer: LayerSpec,
        importance: Mapping[str, torch.Tensor],
    ) -> tuple[dict[str, torch.Tensor], dict[str, Errors]]:
        """The tensors of the layer by their full names, on the host, and the errors by kind of
        matrix.

        ``importance``: what columns count, by module; all count alike in a module that it lacks.
        """
        found: dict[str, torch.Tensor] = {}
        errors: dict[str, Errors] = {}
        names, config = self._model.names, self._model.config
        matrices = names.layers[layer.layer_idx]
        for module in weight_shapes(config, layer.layer_idx):
            own, kind = names.modules[module], shared_key(module)
            prefix = f"model.layers.{layer.layer_idx}.{config.family.hub_name(module)}"
            if kind in self._recipe.groups:
                quantized = self._quantize(streamed, layer, module, importance.get(module))
                quantized.errors.unseen = int(bool(importance) and module not in importance)
                parts = quantized.tensors(permuted_heads(module, names, config))
                found |= {f"{prefix}.{part}": tensor for part, tensor in parts.items()}
                errors.setdefault(kind, Errors()).add(quantized.errors)
            elif module in matrices:
                found[f"{prefix}.weight"] = self._floats(matrices[module].packed(streamed))
            else:
                found[f"{prefix}.weight"] = self._vector(streamed[f"{own}.weight"], module)
            if module in config.biased:
                found[f"{prefix}.bias"] = self._vector(streamed[f"{own}.bias"], module)
        return found, errors

    def _quantize(
        self,
        streamed: Mapping[str, torch.Tensor],
        layer: LayerSpec,
        module: str,
        importance: torch.Tensor | None,
    ) -> Quantized:
        matrix, group = self._model.names.layers[layer.layer_idx][module], shared_key(module)
        quantized = Quantized(self._recipe.groups[group], self._recipe.rounding, importance)
        for _, _, rows_NK in self._unpacker.blocks(matrix.packed(streamed)):
            quantized.add(rows_NK)
            self._on_weights(rows_NK.numel())
        if not math.isfinite(quantized.errors.signal):
            spec = layer.tensors[matrix.key]
            raise UnsupportedModelError(
                f"tensor {spec.name!r} has weights that are not finite ({spec.path})"
            )
        return quantized

    def _floats(self, packed: Packed) -> torch.Tensor:
        """A matrix that is not quantized."""
        blocks = (rows.to(self._recipe.dtype).cpu() for _, _, rows in self._unpacker.blocks(packed))
        return torch.cat(list(blocks))

    def _vector(self, stored: torch.Tensor, module: str) -> torch.Tensor:
        """A norm or a bias as transformers has it."""
        names = self._model.names
        values = stored.float()
        if module.endswith("norm") and names.norm_offset is not None:
            values = values + (names.norm_offset - 1.0)
        heads = permuted_heads(module, names, self._model.config)
        if heads:
            values = in_order(values, heads)
        return values.to(self._recipe.dtype).cpu()
