"""The use of a checkpoint's weights in a pass, unpacked where they are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F

from layer_streamer import LayerSpec, Manifest, TensorSpec

from .config import ModelConfig
from .dequant import Unpacker, row_width
from .names import WeightNames
from .quants import BLOCK_TYPES


class StepWeights:
    """The tensors of one step of a pass.

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
        self._names = names
        self._unpacker = unpacker
        self.layer_idx = layer.layer_idx
        self.interleaved_rope = names.interleaved_rope

    def norm(self, module: str) -> torch.Tensor:
        """What ``rms_norm`` multiplies by, of a norm by its name in transformers."""
        return norm_weight(self._tensors[f"{self._names.modules[module]}.weight"], self._names)

    def linear(self, x_TD: torch.Tensor, module: str) -> torch.Tensor:
        """x times the transposed weight of a module, plus its bias if it has one: (T, rows)."""
        name = self._names.modules[module]
        key = f"{name}.weight"
        bias = self._tensors.get(f"{name}.bias")
        y = project(x_TD, self._tensors[key], self._specs[key].ggml_type, self._unpacker)
        return y if bias is None else y.add_(bias)


def norm_weight(weight_D: torch.Tensor, names: WeightNames) -> torch.Tensor:
    """What ``rms_norm`` multiplies by, of the weight as it is stored: of the final norm, too."""
    return weight_D if names.norm_offset is None else weight_D.float() + names.norm_offset


def project(
    x_TD: torch.Tensor, weight: torch.Tensor, ggml_type: str | None, unpacker: Unpacker
) -> torch.Tensor:
    """x times a transposed weight, packed or not: (T, rows)."""
    if ggml_type not in BLOCK_TYPES:
        return F.linear(x_TD, weight)
    y_TN = x_TD.new_empty(x_TD.shape[0], weight.shape[0])
    for start, end, rows_ND in unpacker.blocks(weight, ggml_type):
        torch.mm(x_TD, rows_ND.t(), out=y_TN[:, start:end])
    return y_TN


def embed_tokens(
    ids_T: torch.Tensor,
    table: torch.Tensor,
    spec: TensorSpec,
    config: ModelConfig,
    unpacker: Unpacker,
) -> torch.Tensor:
    """What the first layer gets of these tokens: (T, D), on the unpacker's device, in its dtype.

    ``ids_T`` and the embedding's ``table``, as ``host_tensor`` gives it, are on the host: only the
    rows of these tokens travel.
    """
    rows = table[ids_T].to(unpacker.device)
    if spec.ggml_type in BLOCK_TYPES:
        blocks = unpacker.blocks(rows, spec.ggml_type)
        x_TD = torch.cat([block.clone() for _, _, block in blocks])
    else:
        x_TD = rows.to(unpacker.dtype)
    if config.embed_scale != 1.0:  # rounded to the dtype first, as the models were trained
        x_TD *= torch.tensor(config.embed_scale, dtype=x_TD.dtype)
    return x_TD


def widest_row(manifest: Manifest) -> int:
    """Weights in the longest packed row of the checkpoint; 0 if nothing is packed."""
    return max((_width(spec) for spec in _all_specs(manifest)), default=0)


def _width(spec: TensorSpec) -> int:
    return row_width(spec.shape[-1], spec.ggml_type) if spec.ggml_type in BLOCK_TYPES else 0


def _all_specs(manifest: Manifest) -> Iterator[TensorSpec]:
    yield from manifest.static.values()
    for layer in manifest.layers:
        yield from layer.tensors.values()
