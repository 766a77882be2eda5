"""A matrix whose numbers are packed, as it lies in the tensors of a streamed layer.

One record serves every format: the engine makes it from a checkpoint's tensors, which stay where
they are, and whoever unpacks it (plain torch here, kernels elsewhere) reads it. Every weight is
``(code - zero) * scale`` or what its format says, computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from .int_codes import (
    AWQ_ORDER,
    pack_rows,
    put_awq_codes,
    put_gptq_codes,
    put_row_codes,
    zeros_along_rows,
    zeros_of_columns,
)
from .k_quants import put_levels
from .quants import BLOCK_TYPES, FP4_LEVELS, SCRATCH_NBYTES, powers_of_two
from .scratch import Scratch


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A matrix of ``rows`` x ``width`` weights: y = x times its transpose, as in ``nn.Linear``.

    ``parts`` are tensors by what they hold; ``pack`` is the number of codes in 32 bits, 8 or 4, the
    first in the lowest bits; ``groups`` is width / group, or 1 where group is 0. Formats:

    * GGML's names of its block types ("Q4_0", "Q4_K", ...): ``raw`` uint8 (rows, bytes of a row).
    * "F32", "F16", "BF16": ``weight`` (rows, width), floats that are only to be cast.
    * "ct4", "ct8", compressed-tensors: ``packed`` int32 (rows, width / pack, rounded up), codes
      along the width; ``scale`` (rows, groups); ``zero``, if asymmetric, int32
      (all rows / pack, rounded up; groups), codes along the *rows*: that of row r is number
      (first_row + r) % pack in the word of row (first_row + r) // pack; ``g_idx``, if columns
      are not in the order of groups, int32 (width): the group of each column.
      W = (code - zero) * scale; symmetric: zero is 2 ** (bits - 1).
    * "int8": ``weight`` int8 (rows, width); ``scale`` (rows, groups); ``zero``, if asymmetric, int8
      (rows, groups). W = (weight - zero) * scale.
    * "fp8": ``weight`` uint8 (rows, width), the bits of E4M3 numbers without infinities; ``scale``
      (row blocks, column blocks): that of row r and column c is
      scale[(first_row + r) // group_rows, c // group], each index 0 where the divisor is 0. Blocks
      at the edges may be cut off, so group need not divide the width. W = weight * scale. A scale
      in uint8 is a power of two, 2 ** (scale - 127), and NaN for 255.
    * "awq4": transposed, rows packed. ``packed`` int32 (width, rows / 8): word [c, j] holds column
      c of rows 8 j to 8 j + 7, row 8 j + int_codes.AWQ_ORDER[p] in bits 4 p to 4 p + 3; ``zero``
      int32 (groups, rows / 8), likewise; ``scale`` (groups, rows). So rows [start, end) with both
      multiples of 8 are columns [start / 8, end / 8) of the words. W = (code - zero) * scale.
    * "gptq4", "gptq8": transposed, columns packed. ``packed`` int32 (width / pack, rows): word
      [i, r] holds columns i * pack to i * pack + pack - 1 of row r; ``zero`` int32
      (groups, rows / pack), codes along the rows; ``scale`` (groups, rows); ``g_idx`` as above, if
      columns are not in order. So rows [start, end) are columns [start, end) of the words, and of
      the zeros' words those from start // pack. The stored zero point is short of
      ``zero_offset``: W = (code - (zero + zero_offset) % 2 ** bits) * scale.

    * "mxfp4": ``packed`` uint8 (rows, width / 2), codes along the width, the first in the low bits,
      each of which stands for half of one of quants.FP4_LEVELS; ``scale`` uint8 (rows, width / 32),
      powers of two as those of "fp8". ``bias``, if its expert has one, (rows).

    Scales are float32, float16 or bfloat16, as stored. Where all scales are of one channel or
    tensor, ``scale`` may be an expanded view: go by its strides. The same holds for every part: no
    one is promised to be contiguous, only to have a last stride of 1 where it was not expanded.
    Values of ``g_idx`` are in range: that is checked when a checkpoint is opened.
    """

    format: str
    rows: int
    width: int
    parts: Mapping[str, torch.Tensor]
    group: int = 0
    """Columns that share a scale; 0: the whole row does. For GGML's types, those of a block."""
    group_rows: int = 1
    """Rows that share a scale ("fp8" only); 0: all do."""
    first_row: int = 0
    """Which row row 0 is, in parts that several rows share a number of ("zero" of "ct4" and "ct8",
    "scale" of "fp8"): above 0 in a piece of an output head, of which these parts come whole."""
    zero_offset: int = 0
    """What stored zero points lack: 1 in GPTQ's first version, else 0."""

    @property
    def symmetric(self) -> bool:
        """True: no zero points are stored; half of the codes stand for what is below zero."""
        return "zero" not in self.parts

    def to(self, device: torch.device) -> Packed:
        """The same with all parts on this device."""
        return replace(self, parts={name: part.to(device) for name, part in self.parts.items()})


def unpack_rows(
    packed: Packed, start: int, end: int, out: torch.Tensor, scratch: Scratch | None = None
) -> None:
    """Write rows [start, end) as floats into ``out``, (end - start, width), contiguous.

    ``out`` is float32, bfloat16 or float16: the float32 value rounded once. Rows of "awq4" come in
    eights. ``scratch`` has ``scratch_nbytes`` for each weight; without it, it is made.
    """
    if scratch is None:
        each = scratch_nbytes(packed.format, out.dtype, ordered="g_idx" not in packed.parts)
        scratch = Scratch(each * out.numel(), out.device)
    scratch.reset()
    if packed.format in FLOATS:
        out.copy_(packed.parts["weight"][start:end])
        return
    floats = out
    if out.dtype != torch.float32:
        floats = scratch.take(torch.float32, *out.shape)
    if packed.format in BLOCK_TYPES:
        raw = packed.parts["raw"][start:end].reshape(-1)
        BLOCK_TYPES[packed.format].unpack(raw, floats.view(-1), scratch)
    else:
        _put_codes(packed, (start, end), floats, scratch)
        _scale(packed, (start, end), floats, scratch)
    if floats is not out:
        out.copy_(floats)


def scratch_nbytes(kind: str, dtype: torch.dtype, *, ordered: bool) -> int:
    """Bytes for each weight that unpacking to ``dtype`` takes; ``ordered``: without g_idx."""
    if kind in FLOATS:
        return 0
    nbytes = SCRATCH_NBYTES if kind in BLOCK_TYPES else _CODE_NBYTES.get(kind, 0)
    return nbytes + (0 if dtype == torch.float32 else 4) + (0 if ordered else 4)


def scales(packed: Packed) -> list[torch.Tensor]:
    """The numbers of a matrix that must be finite, as they are stored."""
    if packed.format in FLOATS:
        return []
    if packed.format not in BLOCK_TYPES:
        return [packed.parts["scale"]]
    kind, raw = BLOCK_TYPES[packed.format], packed.parts["raw"]
    if kind.nbytes % 2:  # a power of two in a byte
        return [raw.reshape(-1, kind.nbytes)[:, place] for place in kind.scales]
    halves = raw.reshape(-1).view(torch.float16).view(-1, kind.nbytes // 2)
    return [halves[:, place // 2] for place in kind.scales]


def scales_in_slots(bank: Packed) -> list[torch.Tensor]:
    """The same of a matrix whose parts have a first dimension for slots, as they have."""
    if bank.format not in BLOCK_TYPES:
        return [] if bank.format in FLOATS else [bank.parts["scale"]]
    kind, raw = BLOCK_TYPES[bank.format], bank.parts["raw"]
    halves = raw.unflatten(-1, (-1, kind.nbytes)).view(torch.float16)
    return [halves[..., place // 2] for place in kind.scales]


Take = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(tensor, row numbers) -> a copy of these rows."""


def copied_rows(part: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The rows with these numbers, in new memory."""
    return part[ids]


def take_rows(packed: Packed, ids: torch.Tensor, take: Take = copied_rows) -> Packed:
    """The rows with these numbers, copied: of an embedding. Not of "awq4" and "gptq*".

    ``take`` makes every part of the result, once for each.
    """
    whole = ("zero", "scale") if packed.format == "fp8" else ("zero",)
    parts = {name: take(part, ids) for name, part in packed.parts.items() if name not in whole}
    if packed.format == "fp8":
        parts["scale"] = take(packed.parts["scale"], _block_rows(packed, ids))
    elif packed.format in CT_BITS and not packed.symmetric:
        bits = CT_BITS[packed.format]
        numbers = packed.first_row + ids
        words = pack_rows(zeros_along_rows(packed.parts["zero"], bits, numbers), bits)
        parts["zero"] = take(words, torch.arange(len(words), device="cpu"))
    elif not packed.symmetric:
        parts["zero"] = take(packed.parts["zero"], ids)
    return replace(packed, rows=len(ids), parts=parts, first_row=0, group_rows=1)


FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Formats that are no more than floats of another dtype."""
CT_BITS = {"ct4": 4, "ct8": 8}
GPTQ_BITS = {"gptq4": 4, "gptq8": 8}
FORMATS = (*BLOCK_TYPES, *FLOATS, *CT_BITS, "int8", "fp8", "awq4", "mxfp4", *GPTQ_BITS)
_AWQ_BITS = 4
MXFP4_GROUP = 32
"""Numbers of "mxfp4" that share a scale."""
_CODE_NBYTES = {"ct4": 2, "mxfp4": 3, "awq4": 1, "gptq4": 1, "gptq8": 1}
"""What taking codes apart needs, for each weight."""


def _put_codes(packed: Packed, rows: tuple[int, int], out: torch.Tensor, scratch: Scratch) -> None:
    start, end = rows
    kind, parts = packed.format, packed.parts
    if kind in CT_BITS:
        put_row_codes(parts["packed"][start:end], CT_BITS[kind], out, scratch)
    elif kind == "awq4":
        put_awq_codes(parts["packed"][:, start // 8 : end // 8], out, scratch)
    elif kind in GPTQ_BITS:
        put_gptq_codes(parts["packed"][:, start:end], GPTQ_BITS[kind], out, scratch)
    elif kind == "mxfp4":
        codes = parts["packed"][start:end].unflatten(1, (-1, MXFP4_GROUP // 2))
        pairs = out.view(*codes.shape, 2).transpose(-1, -2)
        put_levels(codes, pairs, scratch, FP4_LEVELS)
        out.mul_(0.5)
    elif kind == "fp8":  # torch decodes these bits itself, on every device alike
        out.copy_(parts["weight"][start:end].view(torch.float8_e4m3fn))
    else:
        out.copy_(parts["weight"][start:end])


def _zeros(packed: Packed, rows: tuple[int, int]) -> torch.Tensor | int:
    """What is to be taken off the codes: (rows, groups), or one number for all."""
    start, end = rows
    kind, zero = packed.format, packed.parts.get("zero")
    bits = CT_BITS.get(kind) or GPTQ_BITS.get(kind) or _AWQ_BITS
    if zero is None:
        return 0 if kind in ("int8", "fp8", "mxfp4") else 1 << (bits - 1)
    if kind in CT_BITS:
        numbers = torch.arange(start, end, device=zero.device) + packed.first_row
        return zeros_along_rows(zero, bits, numbers)
    if kind == "int8":
        return zero[start:end]
    order = AWQ_ORDER if kind == "awq4" else range(32 // bits)
    zeros = zeros_of_columns(zero, bits, rows, order)
    return (zeros + packed.zero_offset) & ((1 << bits) - 1)


def _block_rows(packed: Packed, rows: torch.Tensor) -> torch.Tensor:
    """Which row of the scales of "fp8" serves these rows."""
    return (packed.first_row + rows) // (packed.group_rows or packed.first_row + packed.rows)


def _scales(packed: Packed, rows: tuple[int, int]) -> torch.Tensor:
    """float32 (rows, groups)."""
    start, end = rows
    scale = packed.parts["scale"]
    if packed.format == "fp8":
        scale = scale[_block_rows(packed, torch.arange(start, end, device=scale.device))]
        return powers_of_two(scale) if scale.dtype == torch.uint8 else scale.float()
    if packed.format == "mxfp4":
        return powers_of_two(scale[start:end])
    if packed.format == "awq4" or packed.format in GPTQ_BITS:
        return scale[:, start:end].t().float()
    return scale[start:end].float()


def _scale(packed: Packed, rows: tuple[int, int], out: torch.Tensor, scratch: Scratch) -> None:
    """(code - zero) * scale, in place."""
    zeros, factors = _zeros(packed, rows), _scales(packed, rows)
    columns = packed.parts.get("g_idx")
    if columns is not None:
        each = scratch.take(torch.float32, *out.shape)
        if isinstance(zeros, torch.Tensor):
            zeros = torch.index_select(zeros.float(), 1, columns, out=each)
        out.sub_(zeros)
        out.mul_(torch.index_select(factors, 1, columns, out=each))
        return
    group = packed.group or packed.width
    whole = packed.width // group
    _scale_groups(out[:, : whole * group].unflatten(1, (whole, group)), zeros, factors, 0)
    if whole * group < packed.width:  # the last block of columns is cut off
        _scale_groups(out[:, None, whole * group :], zeros, factors, whole)


def _scale_groups(
    out: torch.Tensor, zeros: torch.Tensor | int, factors: torch.Tensor, first: int
) -> None:
    """Of floats (rows, groups, columns), the groups from number ``first`` on."""
    last = first + out.shape[1]
    if isinstance(zeros, torch.Tensor):
        out.sub_(zeros[:, first:last, None])
    elif zeros:
        out.sub_(zeros)
    out.mul_(factors[:, first:last, None])
