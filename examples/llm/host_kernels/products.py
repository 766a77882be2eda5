"""Which products the compiled kernels serve, and how a packed matrix is handed to them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..weights.packed import CT_BITS, FLOATS, Packed
from .library import FEW_TOKENS, FORMATS, MOST_TOKENS, SCALE_TYPES, Matrix, library

PIECE = 32
"""Weights that share what they are scaled by, at least; kernels take them one after the other."""
NUMBERS = {kind: number for number, kind in enumerate(FORMATS)}


def prepare() -> None:
    """Have what computes on the processor compiled and loaded, before a pass wants it."""
    library()


def floats_serve(kinds: Iterable[tuple[str, int]]) -> bool:
    """True: among matrices of these formats and widths are floats of sixteen bits, and inputs in
    float32 are multiplied by all of them as they are stored."""
    widths = [width for kind, width in kinds if kind in FLOATS and kind in NUMBERS]
    if not widths or any(width % PIECE for width in widths):
        return False
    found = library()
    return found is not None and found.wide


def multiplies(packed: Packed, x_TD: torch.Tensor) -> bool:
    """True: ``multiply`` can be called, of inputs on the host."""
    if packed.format not in NUMBERS or not 0 < x_TD.shape[0] <= MOST_TOKENS:
        return False
    if x_TD.dtype not in SCALE_TYPES or packed.width % PIECE or not packed.rows:
        return False
    if packed.format in CT_BITS and not _in_order(packed):
        return False
    codes = _codes(packed)
    if packed.format in FLOATS and codes.dtype != FLOATS[packed.format]:
        return False  # cast, on their way
    if not codes.is_cpu or codes.stride(-1) != 1:
        return False
    return x_TD.shape[0] <= _most_tokens(x_TD.dtype, codes.dtype)


def _most_tokens(inputs: torch.dtype, codes: torch.dtype) -> int:
    """That are multiplied no slower than in other ways; 0: none are."""
    found = library()
    if found is None:
        return 0
    if inputs != codes:
        return found.most_tokens
    if not found.wide:
        return 0  # torch has products of its own for these
    return FEW_TOKENS if codes == torch.bfloat16 else MOST_TOKENS


def multiply(
    packed: Packed, x_TD: torch.Tensor, bias_N: torch.Tensor | None = None
) -> torch.Tensor:
    """x times the transposed matrix, plus a bias: (T, rows), in the dtype of x.

    Every weight is the float32 that unpacking makes of it, products are summed up in float32 in an
    order that does not depend on T, and rounded once, before the bias is added.
    """
    found = library()
    assert found is not None
    inputs_TD = x_TD.float().contiguous()
    y_TN = inputs_TD.new_empty(x_TD.shape[0], packed.rows)
    found.multiply(_matrix(packed), inputs_TD, y_TN)
    if x_TD.dtype != torch.float32:
        y_TN = y_TN.to(x_TD.dtype)
    return y_TN if bias_N is None else y_TN.add_(bias_N)


def _in_order(packed: Packed) -> bool:
    """True: columns of "ct4" and "ct8" are in the order of groups of whole pieces."""
    if "g_idx" in packed.parts or packed.parts["scale"].dtype not in SCALE_TYPES:
        return False
    return not packed.group or not (packed.group % PIECE or packed.width % packed.group)


def _codes(packed: Packed) -> torch.Tensor:
    if packed.format in CT_BITS:
        return packed.parts["packed"]
    return packed.parts["weight" if packed.format in FLOATS else "raw"]


def _matrix(packed: Packed) -> Matrix:
    codes = _codes(packed)
    matrix = Matrix(
        format=NUMBERS[packed.format],
        rows=packed.rows,
        width=packed.width,
        codes=codes.data_ptr(),
        codes_stride=codes.stride(0) * codes.itemsize,
    )
    if packed.format in CT_BITS:
        scale, zero = packed.parts["scale"], packed.parts.get("zero")
        matrix.scale_type = SCALE_TYPES[scale.dtype]
        matrix.group = packed.group or packed.width
        matrix.first_row = packed.first_row
        matrix.scale = scale.data_ptr()
        matrix.scale_row, matrix.scale_column = scale.stride()
        if zero is not None:
            matrix.zero = zero.data_ptr()
            matrix.zero_row, matrix.zero_column = zero.stride()
    return matrix
