"""Quantizing a whole model: one pass over its layers, one file for each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from layer_streamer import LayerSpec

from ..models.modules import shared_key
from ..opening import Model
from ..passes.attention import fast_kernels
from .description import description, source_stamp
from .errors import Errors
from .layers import LayerQuantizer, Recipe
from .moments import Watched
from .shards import Entry, name_of, shard_names
from .statics import matrix_entry, norm_entry
from .texts import TextPass, float_unpacker, open_streamer
from .unfinished import Unfinished


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is to be made of which model."""

    model: Model
    recipe: Recipe
    out: Path
    device: torch.device
    calibration: Sequence[int] = ()
    """Token ids of the calibration text; none: every weight of a row counts alike."""
    files: Sequence[str] = field(init=False)
    """Names of the files with tensors: embedding, layers, norm and head."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", shard_names(self.model.config.num_layers + 2))

    @property
    def options(self) -> dict[str, Any]:
        """All that the bytes of the files depend on."""
        return {
            "source": source_stamp(self.model),
            "bits": self.recipe.rounding.bits,
            "groups": dict(self.recipe.groups),
            "dtype": name_of(self.recipe.dtype),
            "device": self.device.type,
            "calibration": self._calibration(),
        }

    def _calibration(self) -> str:
        if not self.calibration:
            return "none"
        text = ",".join(map(str, self.calibration))
        digest = hashlib.sha256(text.encode()).hexdigest()
        return f"{len(self.calibration)} tokens, SHA-256 {digest[:16]}"

    def layer_weights(self, layer_idx: int) -> int:
        """Weights of a layer that are quantized: the progress that it is."""
        own, groups = self.model.names.layers[layer_idx], self.recipe.groups
        return sum(m.rows * m.width for name, m in own.items() if shared_key(name) in groups)

    def nbytes(self) -> int:
        """What the tensors of OUT take."""
        names, itemsize = self.model.names, self.recipe.dtype.itemsize
        statics = {names.embedding: names.embedding_matrix, names.head: names.head_matrix}
        total = sum(matrix.rows * matrix.width * itemsize for matrix in statics.values())
        for layer in names.layers:
            for module, matrix in layer.items():
                total += matrix.rows * self._row_nbytes(shared_key(module), matrix.width)
        return total

    def _row_nbytes(self, kind: str, width: int) -> int:
        """Of a kind of matrix."""
        itemsize, group = self.recipe.dtype.itemsize, self.recipe.groups.get(kind)
        if group is None:
            return width * itemsize
        return width * self.recipe.rounding.bits // 8 + width // group * itemsize


def quantize(
    job: Job,
    on_weights: Callable[[int], object],
    on_start: Callable[[Collection[int]], object],
) -> dict[str, Errors]:
    """Write OUT; the errors by kind of matrix, of all layers.

    Goes on with what an earlier run has left in OUT.partial. ``on_start`` hears of the layers that
    are to be done, ``on_weights`` of weights that are done. An error or an interrupt leaves
    OUT.partial. ValueError, OSError, or an error of the streamer.
    """
    with Unfinished(job.out, list(job.files), job.options) as unfinished:
        model, dtype = job.model, job.recipe.dtype
        names = model.names
        first, *layer_files, last = job.files
        missing = set(unfinished.missing)
        layers_missing = {i for i, name in enumerate(layer_files) if name in missing}
        on_start(layers_missing)
        if first in missing:
            embedding = matrix_entry(model, names.embedding_matrix, dtype)
            unfinished.write(first, {"model.embed_tokens.weight": embedding}, {})
        if layers_missing:
            _quantize_layers(job, unfinished, layers_missing, on_weights)
        if last in missing:
            entries = {"model.norm.weight": norm_entry(model, dtype)}
            if names.head != names.embedding:
                entries["lm_head.weight"] = matrix_entry(model, names.head_matrix, dtype)
            unfinished.write(last, entries, {})
        errors = _errors(unfinished, layer_files)
        unfinished.finish(description(model, job.recipe))
        return errors


def _quantize_layers(
    job: Job, unfinished: Unfinished, missing: Collection[int], on_weights: Callable[[int], object]
) -> None:
    """One pass over the layers; those that are done only carry the calibration text on."""
    model, files = job.model, job.files[1:-1]
    with open_streamer(model, job.device) as streamer:
        unpacker = float_unpacker(model, job.device)
        quantizer = LayerQuantizer(model, job.recipe, unpacker, on_weights)
        with torch.inference_mode(), fast_kernels(job.device):
            text = x_ND = None
            if job.calibration:
                text = TextPass(model, streamer, unpacker, job.calibration)
                x_ND = text.embed()
            for layer_idx, tensors in streamer.sweep():
                layer: LayerSpec = model.manifest.layers[layer_idx]
                importance: Mapping[str, torch.Tensor] = {}
                if text is not None and x_ND is not None:
                    weights = Watched(tensors, layer, model.names, unpacker)
                    text.layer(x_ND, weights)
                    importance = weights.importance()
                if layer_idx in missing:
                    found, errors = quantizer.tensors(tensors, layer, importance)
                    entries = {name: Entry.of(tensor) for name, tensor in found.items()}
                    record = {kind: error.as_list() for kind, error in errors.items()}
                    unfinished.write(files[layer_idx], entries, record)
                if layer_idx == max(missing):
                    break


def _errors(unfinished: Unfinished, files: Sequence[str]) -> dict[str, Errors]:
    total: dict[str, Errors] = {}
    for name in files:
        for kind, values in unfinished.record(name).items():
            total.setdefault(kind, Errors()).add(Errors.of_list(values))
    return total
