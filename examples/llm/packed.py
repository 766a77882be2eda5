"""A matrix whose numbers are packed, as it lies in the tensors of a streamed layer.

One record serves every format: the engine makes it from a checkpoint's tensors, which stay where
they are, and whoever unpacks it (plain torch here, kernels elsewhere) reads it. Every weight is
``(code - zero) * scale`` or what its format says, computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


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
    * "awq4": transposed, rows packed. ``packed`` int32 (width, rows / 8): word [c, j] holds column c
      of rows 8 j to 8 j + 7, row 8 j + AWQ_ORDER[p] in bits 4 p to 4 p + 3; ``zero`` int32
      (groups, rows / 8), likewise; ``scale`` (groups, rows). So rows [start, end) with both
      multiples of 8 are columns [start / 8, end / 8) of the words. W = (code - zero) * scale.
    * "gptq4", "gptq8": transposed, columns packed. ``packed`` int32 (width / pack, rows): word [i, r]
      holds columns i * pack to i * pack + pack - 1 of row r; ``zero`` int32
      (groups, rows / pack), codes along the rows; ``scale`` (groups, rows); ``g_idx`` as above, if
      columns are not in order. So rows [start, end) are columns [start, end) of the words, and of
      the zeros' words those from start // pack. W = (code - (zero + zero_offset)) * scale.

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
    """Columns that share a scale; 0: the whole row does. For GGML's types, the weights of a block."""
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

    @property
    def device(self) -> torch.device:
        """Where all parts are."""
        return next(iter(self.parts.values())).device


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of 8 rows lies in which 4 bits of an AWQ word, from the lowest on."""
