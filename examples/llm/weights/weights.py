"""The use of a checkpoint's weights in a pass, unpacked where they are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from layer_streamer import LayerSpec

from ..models.config import ModelConfig
from ..models.modules import expert_module, shared_key
from ..models.names import WeightNames
from .arithmetic import FASTEST, Arithmetic
from .dequant import Unpacker
from .packed import FLOATS, Packed, take_rows
from .scale_check import ScaleCheck
from .stored import Stored


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
        check: ScaleCheck | None = None,
        arithmetic: Arithmetic = FASTEST,
    ) -> None:
        """``check`` looks at each scale once; ``arithmetic`` is what computes with the weights."""
        self._tensors, self._layer = tensors, layer
        self._store = getattr(tensors, "experts", None)
        """Brings the layer's experts, where they do not come with it."""
        self._names, self._unpacker, self._check = names, unpacker, check
        self._matrices = names.layers[layer.layer_idx]
        self.arithmetic = arithmetic
        self.layer_idx = layer.layer_idx
        self.interleaved_rope = names.interleaved_rope

    def norm(self, module: str) -> torch.Tensor:
        """What ``rms_norm`` multiplies by, of a norm by its name in transformers."""
        weight_D = self._tensors[f"{self._names.modules[module]}.weight"]
        return norm_weight(weight_D.to(self._unpacker.dtype), self._names)

    def linear(self, x_TD: torch.Tensor, module: str) -> torch.Tensor:
        """x times the transposed weight of a module, plus its bias if it has one: (T, rows)."""
        matrix = self._matrices[module]
        return self._project(x_TD, module, matrix.packed(self._tensors), matrix)

    def _project(
        self, x_TD: torch.Tensor, module: str, packed: Packed, matrix: Stored
    ) -> torch.Tensor:
        if self._check is not None:
            self._check.see(packed, self._layer.tensors[matrix.scale_key], matrix.expert)
        bias = None
        if module in self._names.biased:
            bias = self._tensors[f"{self._names.modules[module]}.bias"]
        return self.arithmetic.project(x_TD, packed, self._unpacker, bias)

    def experts(self, needed: Sequence[int]) -> Iterator[int]:
        """Those of the layer's experts, ascending, one after the other once it is there."""
        if self._store is None:
            yield from needed
            return
        for part in self._store.parts(needed):
            self._store.load(part)
            yield from part

    def expert(self, x_TD: torch.Tensor, expert: int, matrix: str) -> torch.Tensor:
        """``linear`` of a matrix of one of the layer's experts, of tokens that pass it: the one
        that ``experts`` has come to."""
        module = expert_module(expert, matrix)
        if self._store is None:
            return self.linear(x_TD, module)
        stored = self._matrices[module]
        slot = self._store.where[expert]
        tensors = {
            key: self._store.bank(key if stored.expert is not None else shared_key(key))[slot]
            for key in stored.keys.values()
        }
        packed = replace(stored, expert=None).packed(tensors)
        return self._project(x_TD, module, packed, stored)


def norm_weight(weight_D: torch.Tensor, names: WeightNames) -> torch.Tensor:
    """What ``rms_norm`` multiplies by, of the weight as it is stored: of the final norm, too."""
    return weight_D if names.norm_offset is None else weight_D.float() + names.norm_offset


def embed_tokens(
    ids_T: torch.Tensor, table: Packed, config: ModelConfig, unpacker: Unpacker
) -> torch.Tensor:
    """What the first layer gets of these tokens: (T, D), on the unpacker's device, in its dtype.

    ``ids_T`` and the embedding's ``table``, over what ``host_tensor`` gives, are on the host: only
    the rows of these tokens travel.
    """
    rows = take_rows(table, ids_T).to(unpacker.device)
    x_TD = torch.empty(len(ids_T), table.width, dtype=unpacker.dtype, device=unpacker.device)
    fill_embedding(x_TD, rows, config, unpacker)
    return x_TD


def fill_embedding(
    out_TD: torch.Tensor, rows: Packed, config: ModelConfig, unpacker: Unpacker
) -> None:
    """Write what the first layer gets of tokens whose rows of the embedding are on the device:
    perhaps in ``out_TD`` itself, if they are floats of its dtype."""
    if rows.format in FLOATS:
        out_TD.copy_(rows.parts["weight"])
    else:
        for start, end, block in unpacker.blocks(rows):
            out_TD[start:end] = block
    if config.embed_scale != 1.0:  # rounded to the dtype first, as the models were trained
        out_TD *= torch.tensor(config.embed_scale, dtype=out_TD.dtype, device="cpu")
