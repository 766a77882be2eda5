"""Packed matrices of random codes, in every format and shape of its parts."""

from __future__ import annotations

from dataclasses import replace

import torch

from layer_streamer.llm.weights.packed import Packed
from layer_streamer.llm.weights.quants import BLOCK_TYPES

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def blocks(kind: str, rows: int, width: int, seed: int = 0) -> Packed:
    """GGML blocks of random bytes, whose float16 scales may be anything but infinite or NaN."""
    random = torch.Generator().manual_seed(seed)
    block = BLOCK_TYPES[kind]
    shape = (rows, width // block.weights, block.nbytes)
    raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    for place in block.scales:
        raw[..., place + 1] &= 0xBF  # the exponent below that of infinities and NaNs
    return Packed(
        format=kind,
        rows=rows,
        width=width,
        parts={"raw": raw.flatten(1)},
        group=block.weights,
    )


def with_scales(packed: Packed, bits: int) -> Packed:
    """The blocks with all scales replaced by the float16 number of these bits."""
    raw = packed.parts["raw"].clone()
    block = BLOCK_TYPES[packed.format]
    in_blocks = raw.view(packed.rows, -1, block.nbytes)
    for place in block.scales:
        in_blocks[..., place] = bits & 255
        in_blocks[..., place + 1] = bits >> 8
    return replace(packed, parts={"raw": raw})


def integers(
    kind: str,
    rows: int,
    width: int,
    group: int = 0,
    *,
    zero: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    first_row: int = 0,
) -> Packed:
    """ "ct4", "ct8" or "int8" codes; with ``first_row``, a piece of an output head."""
    random = torch.Generator().manual_seed(width + group)
    groups = width // group if group else 1
    scale = (torch.randn(rows, groups, generator=random) / 8).to(dtype)
    if kind == "int8":
        codes = torch.randint(-128, 128, (rows, width), dtype=torch.int8, generator=random)
        parts = {"weight": codes, "scale": scale}
        if zero:
            parts["zero"] = torch.randint(
                -128, 128, (rows, groups), dtype=torch.int8, generator=random
            )
    else:
        pack = 8 if kind == "ct4" else 4
        parts = {"packed": _words((rows, -(-width // pack)), random), "scale": scale}
        if zero:
            parts["zero"] = _words((-(-(first_row + rows) // pack), groups), random)
    return Packed(
        format=kind, rows=rows, width=width, parts=parts, group=group, first_row=first_row
    )


def fp8(
    rows: int,
    width: int,
    block: tuple[int, int] = (1, 0),
    *,
    dtype: torch.dtype = torch.float32,
    first_row: int = 0,
) -> Packed:
    """E4M3 numbers of all 256 bit patterns; ``block`` is (rows, columns) of a scale, 0: all."""
    random = torch.Generator().manual_seed(width)
    height, group = block
    weight = torch.randint(0, 256, (rows, width), dtype=torch.uint8, generator=random)
    shape = (-(-(first_row + rows) // height) if height else 1, -(-width // group) if group else 1)
    if dtype == torch.uint8:
        scale = torch.randint(1, 255, shape, dtype=torch.uint8, generator=random)
        scale.view(-1)[0] = 0
        scale.view(-1)[-1] = 255
    else:
        scale = (torch.randn(shape, generator=random) / 8).to(dtype)
    return Packed(
        format="fp8",
        rows=rows,
        width=width,
        parts={"weight": weight, "scale": scale},
        group=group,
        group_rows=height,
        first_row=first_row,
    )


def awq(rows: int, width: int, group: int = 128, dtype: torch.dtype = torch.float16) -> Packed:
    """Rows in a multiple of 8."""
    random = torch.Generator().manual_seed(rows)
    groups = width // group if group else 1
    parts = {
        "packed": _words((width, rows // 8), random),
        "zero": _words((groups, rows // 8), random),
        "scale": (torch.randn(groups, rows, generator=random) / 8).to(dtype),
    }
    return Packed(format="awq4", rows=rows, width=width, parts=parts, group=group)


def on(packed: Packed, device: torch.device) -> Packed:
    """The same on a device, with the strides of its parts."""
    return replace(packed, parts={name: part.to(device) for name, part in packed.parts.items()})


def _words(shape: tuple[int, int], random: torch.Generator) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, generator=random).to(
        torch.int32
    )
