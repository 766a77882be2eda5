"""What stands beside the weights: config, tokenizer, chat template, and what is known of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layer_streamer import read_json

from ..hub import BESIDES
from ..models.config_fields import text_part
from ..opening import Model
from ..weights.converted import converted_config
from .grouping import kinds_of_floats, quantization_config
from .layers import Recipe
from .shards import as_json, name_of


def description(model: Model, recipe: Recipe) -> dict[str, bytes]:
    """The files beside the weights, config.json last."""
    names = sorted(BESIDES - {"config.json"})
    found = {name: _read(model.directory / name) for name in names}
    files = {name: content for name, content in found.items() if content is not None}
    config = _config(model, recipe)
    if "generation_config.json" not in files:
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
        files["generation_config.json"] = as_json(ids)
    return files | {"config.json": as_json(config)}


def source_stamp(model: Model) -> dict[str, list[int]]:
    """By file of the source, its size and when it was changed."""
    files = model.manifest.files
    return {path.name: [stamp.size, stamp.mtime_ns] for path, stamp in sorted(files.items())}


def _config(model: Model, recipe: Recipe) -> dict[str, Any]:
    fields = text_part(read_json(model.directory / "config.json"))
    fields = converted_config(fields, model.manifest, model.config)
    for name in ("part_of", "num_nextn_predict_layers"):  # what is not written with it
        fields.pop(name, None)
    fields["tie_word_embeddings"] = model.names.head == model.names.embedding
    fields.setdefault("architectures", [model.config.family.architecture])
    dtype = name_of(recipe.dtype)
    if "torch_dtype" in fields:  # the older name of the same
        fields["torch_dtype"] = dtype
    floats = kinds_of_floats(model.config)
    quantization = quantization_config(recipe.groups, recipe.rounding.bits, floats)
    return fields | {"dtype": dtype, "quantization_config": quantization}


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
