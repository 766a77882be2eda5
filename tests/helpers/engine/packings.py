"""Random packed matrices of every format, written as other tools do, beside the floats they hold.

Each packing makes the tensors of one module from a (rows, width) matrix of floats, and gives the
weights that the oracle of the format reads from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import (
    pack_to_int32,
    unpack_from_int32,
)
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

Tensors = dict[str, torch.Tensor]
FP8 = torch.float8_e4m3fn
AWQ_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's order_map: which of eight rows goes to which four bits."""


@dataclass(frozen=True)
class Packing:
    """One way to pack a model."""

    config: dict[str, Any]
    """The checkpoint's quantization_config."""
    pack: Callable[[torch.Tensor, torch.Generator], Tensors]
    """A module's tensors, by their kinds."""
    unpack: Callable[[Tensors], torch.Tensor]
    """The weights that the oracle finds in them, float32."""


def codes_of(
    weight: torch.Tensor, group: int, *, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounded to nearest: unsigned codes (rows, width), scales and zeros (rows, groups)."""
    rows, width = weight.shape
    grouped = weight.view(rows, -1, group or width)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        scale = grouped.abs().amax(-1) / (middle - 0.5)
        zero = torch.full_like(scale, middle)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = (high - low) / top
        zero = (-low / scale).round().clamp(1, top)
    scale = scale.half().float()
    codes = (grouped / scale[..., None] + zero[..., None]).round().clamp(0, top)
    return codes.view(rows, width).int(), scale, zero.int()


def ct_scheme(config: dict[str, Any]) -> QuantizationScheme:
    group = config["config_groups"]["group_0"]
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**group["weights"]))


def ct_config(kind: str, **weights: Any) -> dict[str, Any]:
    weights = {"type": "int", "symmetric": True, "dynamic": False} | weights
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def packed_words(bits: int, group: int, *, symmetric: bool, scale_dtype=torch.float16) -> Packing:
    """compressed-tensors ``pack-quantized``."""
    shape = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    config = ct_config("pack-quantized", num_bits=bits, symmetric=symmetric, **shape)
    middle = 2 ** (bits - 1)

    def pack(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
        codes, scale, zero = codes_of(weight, group, bits=bits, symmetric=symmetric)
        tensors = {
            "weight_packed": pack_to_int32((codes - middle).to(torch.int8), bits),
            "weight_scale": scale.to(scale_dtype),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            signed = (zero - middle).to(torch.int8)
            tensors["weight_zero_point"] = pack_to_int32(signed, bits, packed_dim=0).contiguous()
        return tensors

    return Packing(config, pack, lambda tensors: decompress(tensors, config))


def decompress(tensors: Tensors, config: dict[str, Any]) -> torch.Tensor:
    """What compressed-tensors makes of it, with scales in float32."""
    tensors = tensors | {"weight_scale": tensors["weight_scale"].float()}
    compressor = BaseCompressor.load_from_registry(config["format"])
    return compressor.decompress(dict(tensors), ct_scheme(config))["weight"]


def words_in_any_order(bits: int, group: int) -> Packing:
    """``pack-quantized`` whose columns belong to groups in any order. The package has given that up
    and reads it no more: the oracle is the package on columns that are put in order."""
    plain = packed_words(bits, group, symmetric=False)
    weights = plain.config["config_groups"]["group_0"]["weights"] | {"actorder": "group"}
    config = plain.config | {"config_groups": {"g": {"targets": ["Linear"], "weights": weights}}}

    def pack(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
        width = weight.shape[1]
        order = torch.randperm(width, generator=generator)
        tensors = plain.pack(weight[:, order], generator)
        inverse, shape = order.argsort(), tuple(weight.shape)
        codes = unpack_from_int32(tensors["weight_packed"], bits, shape)
        tensors["weight_packed"] = pack_to_int32(codes[:, inverse].contiguous(), bits)
        return tensors | {"weight_g_idx": (torch.arange(width) // group)[inverse].int()}

    def unpack(tensors: Tensors) -> torch.Tensor:
        order = tensors["weight_g_idx"].argsort(stable=True)
        shape = tuple(tensors["weight_shape"].tolist())
        codes = unpack_from_int32(tensors["weight_packed"], bits, shape)
        sorted_words = pack_to_int32(codes[:, order].contiguous(), bits)
        found = plain.unpack(tensors | {"weight_packed": sorted_words})
        return found[:, order.argsort()].contiguous()

    return Packing(config, pack, unpack)


def int_bytes(group: int | None, *, symmetric: bool) -> Packing:
    """compressed-tensors ``int-quantized``; one scale for all of it if ``group`` is None."""
    shape = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    if group is None:
        shape = {"strategy": "tensor"}
    config = ct_config("int-quantized", num_bits=8, symmetric=symmetric, **shape)

    def pack(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
        if group is None:
            codes, scale, zero = codes_of(weight.view(1, -1), 0, bits=8, symmetric=symmetric)
            codes, scale = codes.view(weight.shape), scale.view(1)
        else:
            codes, scale, zero = codes_of(weight, group, bits=8, symmetric=symmetric)
        tensors = {"weight": (codes - 128).to(torch.int8), "weight_scale": scale.bfloat16()}
        if not symmetric:
            tensors["weight_zero_point"] = (zero - 128).to(torch.int8)
        return tensors

    return Packing(config, pack, lambda tensors: decompress(tensors, config))


def awq(group: int) -> Packing:
    """AutoAWQ's GEMM layout; the oracle is the converter of compressed-tensors."""
    config = {
        "quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True,
        "version": "gemm", "modules_to_not_convert": None,
    }  # fmt: skip

    def words(codes: torch.Tensor) -> torch.Tensor:
        parts = codes.view(codes.shape[0], -1, 8)[..., list(AWQ_ROWS)].long()
        found = (parts << (4 * torch.arange(8))).sum(-1)
        return torch.where(found >= 2**31, found - 2**32, found).int()

    def pack(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
        codes, scale, zero = codes_of(weight, group, bits=4, symmetric=False)
        return {
            "qweight": words(codes.t().contiguous()),
            "qzeros": words(zero.t().contiguous()),
            "scales": scale.t().contiguous().half(),
        }

    def unpack(tensors: Tensors) -> torch.Tensor:
        converter = AutoAWQConverter(group_size=group)
        named = {f"m.{kind}": tensor for kind, tensor in tensors.items()}
        named["m.scales"] = named["m.scales"].float()
        converted = converter.process(named)
        plain = {key.removeprefix("m."): tensor for key, tensor in converted.items()}
        form = ct_config(
            "pack-quantized", num_bits=4, symmetric=False, strategy="group", group_size=group
        )
        return decompress(plain, form)

    return Packing(config, pack, unpack)


def gptq(bits: int, group: int, *, act_order: bool, version: int) -> Packing:
    """GPTQ; its layout is tested against another implementation's matrices, so that the floats
    here are those that were packed."""
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group or -1, "desc_act": act_order,
        "sym": False, "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }  # fmt: skip
    pack_size, offset = 32 // bits, int(version == 1)

    def words(codes: torch.Tensor) -> torch.Tensor:
        shifts = bits * torch.arange(pack_size)
        found = (codes.long().view(codes.shape[0], -1, pack_size) << shifts).sum(-1)
        return torch.where(found >= 2**31, found - 2**32, found).int()

    def pack(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
        width = weight.shape[1]
        order = torch.arange(width)
        if act_order:
            order = torch.randperm(width, generator=generator)
        codes, scale, zero = codes_of(weight[:, order], group, bits=bits, symmetric=False)
        groups, inverse = torch.arange(width) // (group or width), order.argsort()
        return {
            "qweight": words(codes[:, inverse]).t().contiguous(),
            "qzeros": words((zero - offset).t().contiguous()),
            "scales": scale.t().contiguous().half(),
            "g_idx": groups[inverse].int(),
        }

    def unpack(tensors: Tensors) -> torch.Tensor:
        def codes(words: torch.Tensor) -> torch.Tensor:
            shifts = bits * torch.arange(pack_size)
            return ((words[..., None].long() >> shifts) & (2**bits - 1)).flatten(-2)

        zero = (codes(tensors["qzeros"]) + offset) & (2**bits - 1)
        columns = tensors["g_idx"].long()
        number = codes(tensors["qweight"].t()).t() - zero[columns]
        return (number.float() * tensors["scales"].float()[columns]).t().contiguous()

    return Packing(config, pack, unpack)


def fp8(block: tuple[int, int] | None, *, kind: str = "fp8", scale_dtype=torch.float32) -> Packing:
    """Blocks, or whole rows; the oracle is transformers' own."""
    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    name = "weight_scale" if block is None else "weight_scale_inv"
    if block is not None:
        config["weight_block_size"] = list(block)
    if kind == "tensor":  # one scale, without dimensions
        name = "weight_scale"
    if kind == "ct":
        config = ct_config("float-quantized", type="float", num_bits=8, strategy="channel")
        name = "weight_scale"

    def padded(weight: torch.Tensor) -> torch.Tensor:
        rows, columns = block or (1, weight.shape[1])
        return torch.nn.functional.pad(
            weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows)
        )

    def pack(weight: torch.Tensor, generator: torch.Generator) -> Tensors:
        rows, columns = block or (1, weight.shape[1])
        rows = len(weight) if kind == "tensor" else rows
        whole = padded(weight)
        blocks = whole.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
        scale = (blocks.abs().amax((1, 3)) / 448).to(scale_dtype)
        if scale_dtype == torch.float8_e8m0fnu:
            scale = (blocks.abs().amax((1, 3)) / 448).log2().ceil().exp2().to(scale_dtype)
        spread = scale.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        codes = (whole / spread).to(FP8)[: weight.shape[0], : weight.shape[1]]
        scale = scale.view(()) if kind == "tensor" else scale
        return {"weight": codes.contiguous(), name: scale}

    def unpack(tensors: Tensors) -> torch.Tensor:
        codes, scale = tensors["weight"], tensors[name]
        whole = padded(codes.float()).to(FP8)
        scale = scale.view(1, 1) if kind == "tensor" else scale
        found = Fp8Dequantize(None)._dequantize_one(whole, scale, torch.float32)
        return found[: codes.shape[0], : codes.shape[1]].contiguous()

    return Packing(config, pack, unpack)


PACKINGS = {
    "ct4-g32": packed_words(4, 32, symmetric=True),
    "ct4-channel": packed_words(4, 0, symmetric=True, scale_dtype=torch.bfloat16),
    "ct4-asym-g16": packed_words(4, 16, symmetric=False),
    "ct8-g32": packed_words(8, 32, symmetric=True, scale_dtype=torch.float32),
    "ct8-channel": packed_words(8, 0, symmetric=True),
    "ct4-act-order": words_in_any_order(4, 16),
    "ct8-asym-channel": packed_words(8, 0, symmetric=False),
    "int8-channel": int_bytes(0, symmetric=True),
    "int8-asym-g32": int_bytes(32, symmetric=False),
    "int8-tensor": int_bytes(None, symmetric=True),
    "awq-g32": awq(32),
    "gptq4-g32": gptq(4, 32, act_order=False, version=1),
    "gptq4-v2-act-order": gptq(4, 16, act_order=True, version=2),
    "gptq8-act-order": gptq(8, 32, act_order=True, version=1),
    "gptq8-v2-channel": gptq(8, 0, act_order=False, version=2),
    "fp8-blocks": fp8((32, 48)),
    "fp8-powers-of-two": fp8((32, 32), scale_dtype=torch.float8_e8m0fnu),
    "fp8-channel": fp8(None),
    "fp8-tensor": fp8(None, kind="tensor"),
    "fp8-ct-channel": fp8(None, kind="ct", scale_dtype=torch.bfloat16),
}
"""A packing of each kind, whose groups divide 64 and 96 columns."""
