"""Tiny quantized checkpoints: random packed numbers and scales, in the layouts that are published.

No quantizer makes them, so none need be installed; what they stand for, transformers says.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from packings import Packing
from recipes import write
from safetensors.torch import load_file
from tiny_models import tiny_model

Packed = dict[str, torch.Tensor]
BLOCK = 8
"""Rows and columns of an FP8 block; of a group of packed integers, columns."""


def fp8(name: str, weight: torch.Tensor, random: torch.Generator) -> Packed:
    """DeepSeek's: a scale for each block."""
    rows, columns = weight.shape
    scales = torch.rand(rows // BLOCK, columns // BLOCK, generator=random) + 0.5
    return {name: _fp8(weight), f"{name}_scale_inv": scales}


def ct_fp8(name: str, weight: torch.Tensor, random: torch.Generator) -> Packed:
    """compressed-tensors: a scale for each row."""
    scales = torch.rand(len(weight), 1, generator=random) + 0.5
    return {name: _fp8(weight), f"{name}_scale": scales}


def ct_int4(name: str, weight: torch.Tensor, random: torch.Generator) -> Packed:
    """compressed-tensors: eight numbers of four bits in an int32, a scale for each group."""
    rows, columns = weight.shape
    packed = torch.randint(-(2**31), 2**31 - 1, (rows, columns // 8), generator=random)
    return {
        f"{name}_packed": packed.to(torch.int32),
        f"{name}_scale": torch.rand(rows, columns // BLOCK, generator=random) + 0.5,
        f"{name}_shape": torch.tensor([rows, columns]),
    }


def mxfp4(name: str, weight: torch.Tensor, random: torch.Generator) -> Packed:
    """gpt-oss: experts [E, in, out], of whose transposes 32 numbers share a scale."""
    experts, columns, rows = weight.shape
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=random)
    scales = torch.randint(120, 130, (experts, rows, columns // 32), generator=random)
    return {f"{name}_blocks": blocks.to(torch.uint8), f"{name}_scales": scales.to(torch.uint8)}


def _fp8(weight: torch.Tensor) -> torch.Tensor:
    return (weight * 20).to(torch.float8_e4m3fn)


def _groups(**weights: Any) -> dict[str, Any]:
    return {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"], "quantization_status": "compressed",
    }  # fmt: skip


METHODS: dict[str, tuple[Callable[[str, torch.Tensor, torch.Generator], Packed], Any]] = {
    "fp8": (fp8, dict(quant_method="fp8", weight_block_size=[BLOCK, BLOCK])),
    "ct_fp8": (ct_fp8, dict(
        quant_method="compressed-tensors", format="float-quantized",
        **_groups(num_bits=8, type="float", strategy="channel", symmetric=True))),
    "ct_int4": (ct_int4, dict(
        quant_method="compressed-tensors", format="pack-quantized",
        **_groups(num_bits=4, type="int", strategy="group", group_size=BLOCK, symmetric=True))),
    "mxfp4": (mxfp4, dict(quant_method="mxfp4", modules_to_not_convert=["lm_head"])),
}  # fmt: skip
"""By short name: how a weight is stored, and what the configuration says of it."""


def quantized_checkpoint(folder: Path, name: str, method: str) -> Path:
    """Save a tiny model of the type with its blocks' matrices quantized; the folder."""
    tiny_model(name).save_pretrained(folder)
    pack, config = METHODS[method]
    random = torch.Generator().manual_seed(3)
    tensors: Packed = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        dense = tensor.to(torch.bfloat16)
        chosen = (
            ".experts." in key and dense.dim() == 3 if method == "mxfp4" else _matrix(key, dense)
        )
        tensors |= pack(key, dense.float(), random) if chosen else {key: dense}
    _save(folder, tensors, config)
    return folder


def packed_checkpoint(folder: Path, name: str, packing: Packing) -> Packed:
    """The same with the packing of another library; the numbers that this one reads from it."""
    tiny_model(name).save_pretrained(folder)
    random = torch.Generator().manual_seed(3)
    tensors: Packed = {}
    numbers: Packed = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        numbers[key] = tensor
        if _matrix(key, tensor):
            kinds = packing.pack(tensor, random)
            numbers[key] = packing.unpack(kinds)
            tensors |= {f"{key.removesuffix('weight')}{kind}": part for kind, part in kinds.items()}
        else:
            tensors[key] = tensor
    _save(folder, tensors, packing.config)
    return numbers


def _matrix(key: str, tensor: torch.Tensor) -> bool:
    return ".layers." in key and tensor.dim() == 2 and ".gate." not in key


def _save(folder: Path, tensors: Packed, config: Any) -> None:
    write(folder, tensors)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"quantization_config": config, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(settings))
