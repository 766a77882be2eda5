"""An adapter's folder as peft writes it: what is in it, for the model that it stands beside."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from layer_streamer import CheckpointError, read_json

from ..errors import one_line_errors, optional_packages
from ..models.config import ModelConfig
from ..models.modules import expert_of
from ..models.names import WeightNames
from ..weights.converted import out_of_order, permuted_heads
from .pairs import Adapter, Pair

CONFIG, WEIGHTS, PICKLED = (
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin",
)  # fmt: skip
STEMS = ("", "model.", "model.language_model.", "language_model.model.", "language_model.")
"""What may stand before "layers." in the name of a module of a language model."""
MODULE = re.compile(r"(?:base_model\.model\.)?(.*)\.lora_([AB])(?:\.default)?\.weight")
OF_LAYER = re.compile(r"(.*?)layers\.(\d+)\.(.+)")
NEUTRAL: dict[str, Any] = {
    "bias": "none", "modules_to_save": None, "target_parameters": None, "layer_replication": None,
    "trainable_token_indices": None, "alora_invocation_tokens": None, "lora_bias": False,
    "fan_in_fan_out": False, "use_dora": False, "use_qalora": False, "use_bdlora": None,
}  # fmt: skip
"""Fields that change what an adapter adds and that this engine does not follow, each with the value
with which it changes nothing."""


class AdapterError(CheckpointError, ValueError):
    """An adapter is none, or none that this engine adds to this model."""


class Named(NamedTuple):
    """One of an adapter's tensors."""

    layer: int
    module: str
    """As transformers calls it, in the layer."""
    kind: str
    """"A" or "B"."""


def read_adapter(folder: Path, names: WeightNames, config: ModelConfig) -> tuple[Adapter, str]:
    """The adapter in a folder, in float32 in host memory, scales multiplied in, rows in the order
    that the checkpoint of ``names`` has; and which model it says that it is of, "" if none.

    AdapterError, naming the folder, for what is no LoRA, for parts that are not added to products
    of a layer's matrices, and for a model that it is not of. OSError.
    """
    try:
        fields = _fields(folder)
        found = _adapter(fields, dict(_tensors(folder, names)), names, config)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from error
    base = fields.get("base_model_name_or_path")
    return found, base if isinstance(base, str) else ""


def _fields(folder: Path) -> Mapping[str, Any]:
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"no adapter: has no {CONFIG}")
    fields = read_json(folder / CONFIG)
    if not isinstance(fields, dict) or str(fields.get("peft_type")).upper() != "LORA":
        kind = fields.get("peft_type") if isinstance(fields, dict) else None
        raise AdapterError(f"peft_type is {kind!r}: only LORA is added here")
    for name, value in fields.items():
        is_use = name.startswith("use_") and name != "use_rslora"
        neutral = NEUTRAL.get(name, None if is_use else value)
        if value != neutral and not (not value and not neutral):
            raise AdapterError(
                f"{name}={value!r}: not added here; merge the adapter into its model for that"
            )
    return fields


def _tensors(folder: Path, names: WeightNames) -> Iterator[tuple[Named, torch.Tensor]]:
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLED).is_file():
            raise AdapterError(f"has {PICKLED}, which is not read: save it as {WEIGHTS}")
        raise AdapterError(f"has no {WEIGHTS}")
    with optional_packages():
        from safetensors import safe_open
    with (
        one_line_errors(f"{WEIGHTS} cannot be read", AdapterError),
        safe_open(folder / WEIGHTS, framework="pt") as file,
    ):
        found = {key: file.get_tensor(key) for key in list(file.keys())}
    for key, tensor in found.items():
        if not tensor.is_floating_point() or tensor.dim() != 2:
            raise AdapterError(f"{key!r} is no matrix of floats")
        yield _named(key, names), tensor.float()


def _named(key: str, names: WeightNames) -> Named:
    match = MODULE.fullmatch(key)
    if match is None:
        raise AdapterError(f"{key!r} is none of LoRA's two matrices")
    at = OF_LAYER.fullmatch(match[1])
    if at is None or at[1] not in STEMS:
        raise AdapterError(f"{match[1]!r} is in no layer: only products of layers are added to")
    layer, module = int(at[2]), at[3]
    if layer >= len(names.layers):
        raise AdapterError(f"{match[1]!r}: the model has {len(names.layers)} layers: not its own")
    if ".experts" in module or expert_of(module) is not None:
        raise AdapterError(f"{match[1]!r} is of experts, whose products are not added to")
    if module not in names.layers[layer]:
        raise AdapterError(f"{match[1]!r}: the model's layer {layer} has no such matrix")
    return Named(layer, module, match[2])


def _adapter(
    fields: Mapping[str, Any],
    tensors: Mapping[Named, torch.Tensor],
    names: WeightNames,
    config: ModelConfig,
) -> Adapter:
    if not tensors:
        raise AdapterError(f"{WEIGHTS} is empty")
    layers: list[dict[str, Pair]] = [{} for _ in names.layers]
    for layer, module in dict.fromkeys((one.layer, one.module) for one in tensors):
        where = f"layers.{layer}.{module}"
        pair = [tensors.get(Named(layer, module, kind)) for kind in "AB"]
        down_RD, up_NR = pair
        if down_RD is None or up_NR is None:
            raise AdapterError(f"{where}: one of its two matrices is missing")
        own = names.layers[layer][module]
        rank = len(down_RD)
        if down_RD.shape != (rank, own.width) or up_NR.shape != (own.rows, rank) or not rank:
            raise AdapterError(
                f"{where}: {tuple(down_RD.shape)} and {tuple(up_NR.shape)} do not stand beside a "
                f"matrix of {(own.rows, own.width)}: it is of another model"
            )
        up_NR = up_NR * _scale(fields, where, rank)
        if heads := permuted_heads(module, names, config):
            up_NR = out_of_order(up_NR, heads)
        layers[layer][module] = Pair.of(down_RD.contiguous(), up_NR.contiguous())
    return Adapter(tuple(layers))


def _scale(fields: Mapping[str, Any], where: str, rank: int) -> float:
    """What the products of a module's pair count."""
    alpha: Any = fields.get("lora_alpha", 8)
    for pattern, own in (fields.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", where):
            alpha = own
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(f"lora_alpha={alpha!r}: must be a number")
    return alpha / math.sqrt(rank) if fields.get("use_rslora") else alpha / rank
