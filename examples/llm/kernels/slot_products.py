"""Products of few tokens with experts of a mixture, each a slot of a bank, in one launch.

A pair is a token and an expert that it passes. A program computes ROWS numbers of one pair, as the
kernels of one matrix do for one token: in the same pieces and steps, so a pair's bits are those of
its matrix and token alone. Two matrices of an expert that are alike take one launch. Which slots
these are is read on the device, so that a launch can be part of a CUDA graph; what they hold may
change between its replays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..weights.packed import FLOATS, Packed
from .code_floats import ONE, eight_x
from .launching import PIECE, PRODUCTS, narrowed, rows_at_once
from .matvec import own_rows, store_sums, sums_of_fp4, sums_of_words, zeros
from .matvec_blocks import sums_of_blocks
from .matvec_q4_k import sums_of_q4_k
from .triton_support import run_kernel
from .unpacking import CHUNK, Launch

ALIGNMENT = 16
"""Bytes: of the first slot, and of the distance to the next."""

_KINDS = {
    "ct4": "words", "ct8": "words", "mxfp4": "words",
    "Q4_0": "blocks", "Q8_0": "blocks", "Q4_K": "Q4_K",
}  # fmt: skip
_FLOAT_TILE, _FLOAT_WARPS, _FLOAT_PIECE = (4, 64), 2, 8


@triton.jit
def sums_of_floats(
    weights: tl.tuple,
    x: tl.tuple,
    pieces: int,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
) -> tl.tuple:
    """Of one token and rows of floats, the sums that threads have; a piece is eight."""
    total = zeros(ROWS, PIECES)
    for step in range(0, pieces, PIECES):
        own = step + tl.arange(0, PIECES)
        at = tl.minimum(own, pieces - 1) * 8
        numbers = eight_x(x[0], at)
        added: tl.tuple = ()
        for r in tl.static_range(ROWS):
            factors = eight_x(weights[r], at)
            part = factors[0] * numbers[0]
            for k in tl.static_range(1, 8):
                part = tl.fma(factors[k], numbers[k], part)
            added += (tl.where(own < pieces, total[r] + part, total[r]),)
        total = added
    return total


@triton.jit(do_not_specialize=["rows", "pairs", "per_x", "one"])
def multiply_slots(  # noqa: PLR0913 - a kernel has no records
    codes: tl.tensor,
    scale: tl.tensor,
    x: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    slots: tl.tensor,
    rows: int, pairs: int, per_x: int, pieces: int, one: int,
    code_slot: int, code_row: int, scale_slot: int, scale_row: int, scale_group: int,
    bias_slot: int, code_bank: int, scale_bank: int, bias_bank: int,
    KIND: tl.constexpr, PIECE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr,
) -> None:  # fmt: skip
    """y (banks, pairs, rows): pair p is row p // per_x of x times the matrix in slot ``slots[p]``,
    or in the first where that is None.

    Slots lie ``code_slot`` times 16 bytes apart, banks ``code_bank`` times. KIND "words" (E2M1
    where scales are bytes), "blocks" and "Q4_K" are what ``matvec`` and its like know, rows of
    words ``code_row`` pieces apart. "floats" are of BITS and of x's dtype, likewise. A piece is
    PIECE weights.
    """
    pair, bank = tl.program_id(1), tl.program_id(2)
    slot = tl.zeros((), tl.int64) if slots is None else tl.load(slots + pair).to(tl.int64)
    first = slot * code_slot + bank * code_bank
    scale += slot * scale_slot + bank * scale_bank
    y += bank.to(tl.int64) * pairs * rows
    x += (pair // per_x).to(tl.int64) * (pieces * PIECE)
    if KIND == "words":
        words = codes.to(tl.pointer_type(tl.uint32)) + first * 4
        words = own_rows(words, code_row * BITS, rows, ROWS)
        scales = own_rows(scale, scale_row, rows, ROWS)
        if scale.dtype.element_ty == tl.uint8:
            total = sums_of_fp4(words, scales, (x,), pieces, ROWS, PIECES)
        else:
            total = sums_of_words(words, scales, (x,), pieces, one, scale_group,
                                  BITS, GROUP, 1, ROWS, PIECES)  # fmt: skip
    elif KIND == "blocks":
        own = codes.to(tl.pointer_type(tl.uint16)) + first * 8
        own = own_rows(own, pieces // (BITS // 2) * (1 + 2 * BITS), rows, ROWS)
        total = sums_of_blocks(own, (x,), pieces, one, BITS, 1, ROWS, PIECES)
    elif KIND == "Q4_K":
        words = codes.to(tl.pointer_type(tl.uint32)) + first * 4
        words = own_rows(words, pieces // 4 * 36, rows, ROWS)
        total = sums_of_q4_k(words, (x,), pieces, one, 1, ROWS, PIECES)
    else:
        own = codes + first * (128 // BITS)
        total = sums_of_floats(own_rows(own, code_row * 8, rows, ROWS), (x,), pieces, ROWS, PIECES)
    bias += slot * bias_slot + bank * bias_bank
    store_sums(y, bias, total, rows, pairs, BIAS, 1, ROWS)


def serves(bank: Packed, x_TD: torch.Tensor) -> bool:
    """True: ``launch_slots`` can be called."""
    kind, width = bank.format, bank.width
    if not x_TD.is_contiguous() or x_TD.data_ptr() % ALIGNMENT:
        return False
    codes = _codes(bank)
    if codes is None or codes.dim() != 3 or not _aligned(codes):
        return False
    if kind in FLOATS:
        rows_apart = codes.stride(-1) == 1 and codes.stride(1) % _FLOAT_PIECE == 0
        return FLOATS[kind] == x_TD.dtype and width % _FLOAT_PIECE == 0 and rows_apart
    if width % CHUNK or bank.group % CHUNK or not bank.symmetric or "g_idx" in bank.parts:
        return False
    if _KINDS[kind] == "words":
        return codes.stride(-1) == 1 and codes.stride(1) % _piece_length(bank) == 0
    return codes.stride(-1) == 1 and codes.stride(1) == codes.shape[-1]


def launch_slots(
    banks: Sequence[Packed], x_TD: torch.Tensor, slots_P: torch.Tensor, per_x: int = 1
) -> torch.Tensor:
    """Of each bank and pair p, row p // per_x of x times the transposed matrix in slot
    ``slots_P[p]``, plus the bank's ``bias`` (slots, rows) if it has one: (banks, P, rows), in the
    dtype of x.

    A bank is of one matrix, but for a first dimension of its parts, the slots; all are of one shape
    and format. ``slots_P``, integers, is contiguous; no number is outside of a bank: nobody looks.
    """
    y_BPN = x_TD.new_empty(len(banks), len(slots_P), banks[0].rows)
    steps = _steps(banks)
    for i, bank in enumerate(banks[:1] if steps else banks):
        together = (len(banks), steps) if steps else (1, (0, 0, 0))
        _launch(bank, *together, (x_TD, slots_P, per_x), y_BPN[i])
    return y_BPN


def multiply_floats(weight_ND: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor | None:
    """x times one transposed matrix of floats, (T, N); None where it lies as no bank may."""
    kind = next(kind for kind, dtype in FLOATS.items() if dtype == weight_ND.dtype)
    rows, width = weight_ND.shape
    bank = Packed(format=kind, rows=rows, width=width, parts={"weight": weight_ND[None]})
    if not serves(bank, x_TD):
        return None
    y_TN = x_TD.new_empty(len(x_TD), rows)
    _launch(bank, 1, (0, 0, 0), (x_TD, None, 1), y_TN)
    return y_TN


_Asked = tuple[torch.Tensor, torch.Tensor | None, int]
"""x, slots, and how many pairs share a row of x."""


def _launch(
    bank: Packed, count: int, steps: tuple[int, int, int], asked: _Asked, y: torch.Tensor
) -> None:
    """``launch_slots`` of so many banks, the first of them this one."""
    (x_TD, slots_P, per_x), kind, rows = asked, bank.format, bank.rows
    pairs, codes, scale = len(y), _codes(bank), bank.parts.get("scale")
    bias = bank.parts.get("bias")
    assert codes is not None
    own = PRODUCTS.get(kind) or Launch(multiply_slots, _FLOAT_TILE, _FLOAT_WARPS)
    piece = _FLOAT_PIECE if kind in FLOATS else PIECE.get(kind, CHUNK)
    own = narrowed(own, bank.width // piece)
    height = rows_at_once(own, rows * pairs * count, 1)
    run_kernel(
        multiply_slots,
        (triton.cdiv(rows, height), pairs, count),
        codes,
        codes if scale is None else scale,
        x_TD,
        y if bias is None else bias,
        y,
        slots_P,
        rows,
        pairs,
        per_x,
        bank.width // piece,
        ONE,
        codes.stride(0) * codes.element_size() // ALIGNMENT,
        codes.stride(1) // _piece_length(bank),
        *((0, 0, 0) if scale is None else scale.stride()),
        0 if bias is None else bias.stride(0),
        *steps,
        KIND=_KINDS.get(kind, "floats"),
        PIECE=piece,
        BITS=_bits(kind),
        GROUP=bank.group // CHUNK,
        BIAS=0 if bias is None else bias.stride(1),
        ROWS=height,
        PIECES=own.tile[1],
        num_warps=own.warps,
    )


def _steps(banks: Sequence[Packed]) -> tuple[int, int, int] | None:
    """From one bank to the next, of codes in 16 bytes, of scales and biases in numbers; None: there
    is no such step."""
    first, *others = banks
    if not others:
        return 0, 0, 0
    if len(others) > 1 or _form(first) != _form(others[0]):
        return None
    apart = {
        name: others[0].parts[name].data_ptr() - part.data_ptr()
        for name, part in first.parts.items()
    }
    codes = apart["packed" if "packed" in apart else "raw" if "raw" in apart else "weight"]
    if codes % ALIGNMENT:
        return None
    sizes = ((apart.get(name, 0), first.parts.get(name)) for name in ("scale", "bias"))
    scale, bias = (0 if part is None else step // part.itemsize for step, part in sizes)
    return codes // ALIGNMENT, scale, bias


def _form(bank: Packed) -> tuple[object, ...]:
    """What banks of one launch agree in."""
    parts = [
        (name, part.dtype, part.shape, part.stride(), part.untyped_storage().data_ptr())
        for name, part in bank.parts.items()
    ]
    return bank.format, bank.rows, bank.width, bank.group, parts


def _codes(bank: Packed) -> torch.Tensor | None:
    """What weights are read from; None: of a format that no kernel here reads."""
    if bank.format in FLOATS:
        return bank.parts["weight"]
    if bank.format not in _KINDS:
        return None
    return bank.parts["packed" if _KINDS[bank.format] == "words" else "raw"]


def _piece_length(bank: Packed) -> int:
    """Elements of what weights are read from that a piece takes; of blocks, any number."""
    if bank.format == "mxfp4":
        return CHUNK // 2
    return _bits(bank.format) if _KINDS.get(bank.format) == "words" else _FLOAT_PIECE


def _bits(kind: str) -> int:
    """Of a code, or of a float."""
    return 8 * FLOATS[kind].itemsize if kind in FLOATS else 8 if "8" in kind else 4


def _aligned(codes: torch.Tensor) -> bool:
    """As the widest loads need it."""
    return not (codes.data_ptr() % ALIGNMENT or codes.stride(0) * codes.itemsize % ALIGNMENT)
