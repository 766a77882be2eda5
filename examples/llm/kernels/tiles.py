"""The launch of products on tensor cores: which matrices they serve, and in which tiles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

from ..weights.packed import Packed
from ..weights.quants import BLOCK_TYPES
from . import pointwise, tile_products
from .code_floats import ONE
from .triton_support import run_kernel
from .unpacking import CHUNK, EXACT

LEAST_CAPABILITY = (8, 0)
"""Tensor cores of before do not know bfloat16."""
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Step:
    """Which columns a step has of a format: chunks, of which a tile has a piece each."""

    piece: int
    """Columns. A second tile has the others of the chunk."""
    chunk: int
    chunks: int


STEPS = {
    "Q4_K": Step(32, 64, 2),
    "Q6_K": Step(64, 128, 1),
    "Q4_0": Step(16, 32, 4),
    "Q8_0": Step(32, 32, 4),
    "ct4": Step(32, 32, 4),
    "ct8": Step(32, 32, 4),
    "mxfp4": Step(32, 32, 4),
}
"""128 columns each: registers for several programs on a multiprocessor, of which some load while
others compute; 256 take twice as many, and spill in Q6_K."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a program."""

    rows: int
    """64 for four warps: the fewest that Hopper's tensor cores take."""
    warps: int
    stages: int
    """Steps under way, of which all but one load. What they keep must fit in 99 KiB: Ada's most."""
    step: Step | None = None
    """Another than the format's."""


SHAPES = {16: Shape(64, 4, 4), 32: Shape(64, 4, 3), 64: Shape(128, 8, 3)}
"""By tokens of a program. With 64, x has more bytes than 64 rows, so that more rows share it.
Fixed, so that nothing is tuned while a model runs."""
ALTERNATIVES = (
    *(Shape(64, 4, 2), Shape(64, 4, 3), Shape(64, 4, 4), Shape(128, 8, 2), Shape(128, 8, 3)),
    *(Shape(128, 4, 3), Shape(32, 4, 4)),
)
"""What measurements compare."""

_CHUNK_NBYTES = {"ct4": CHUNK // 2, "ct8": CHUNK, "mxfp4": CHUNK // 2}
PROGRAMS = 512
"""A matrix of few rows has its columns split among up to so many programs of 64 rows: about four on
each multiprocessor of the largest GPUs. One alone cannot load fast enough."""
LEAST_COLUMNS = 640
"""Of a share: with fewer, a program is done before its loads are well under way."""
SUMS_BLOCK = 1024


def multiplies(packed: Packed, x_TD: torch.Tensor) -> bool:
    """True: ``multiply`` can be called."""
    if packed.format not in STEPS or not packed.symmetric or "g_idx" in packed.parts:
        return False
    if packed.width % CHUNK or packed.group % CHUNK or not x_TD.is_contiguous():
        return False
    if x_TD.dtype not in DTYPES or not _has_cores(x_TD.device):
        return False
    if packed.format in BLOCK_TYPES:
        raw = packed.parts["raw"]
        return raw.is_contiguous() and raw.data_ptr() % 4 == 0
    codes = packed.parts["packed"]
    apart = codes.stride(0) * codes.itemsize
    return codes.stride(-1) == 1 and apart % _CHUNK_NBYTES[packed.format] == 0


def splits_of(rows: int, width: int) -> int:
    """Into how many shares columns go: by the matrix alone, so that tokens beside others do not
    decide the order of sums."""
    programs, splits = triton.cdiv(rows, 64), 1
    while 2 * splits * programs <= PROGRAMS and width >= 2 * splits * LEAST_COLUMNS:
        splits *= 2
    return splits


def multiply(
    packed: Packed,
    x_TD: torch.Tensor,
    shape: Shape | None = None,
    bias_N: torch.Tensor | None = None,
    *,
    alike: bool = False,
) -> torch.Tensor:
    """x times the transposed matrix, plus a bias: (T, rows), in the dtype of x.

    The sums of columns that are split take up to 8 MiB for 64 tokens. ``alike``: none are, and all
    programs are of one size, so that neither the tokens nor the rows at a time decide a bit.
    """
    tokens, rows = len(x_TD), packed.rows
    at_once, splits = (max(SHAPES), 1) if alike else _fastest(tokens, packed)
    own = shape or SHAPES[at_once]
    step = own.step or STEPS[packed.format]
    y_TN = x_TD.new_empty(tokens, rows)
    bias, sums = y_TN if bias_N is None else bias_N, y_TN
    if splits > 1:
        sums = torch.empty(splits, tokens, rows, dtype=torch.float32, device=x_TD.device)
    codes, scale, strides, nbytes = parts_of(packed)
    grid = (triton.cdiv(tokens, at_once), triton.cdiv(rows, own.rows), splits)
    run_kernel(
        tile_products.multiply_tiles, grid,
        codes, scale, x_TD, bias, sums, rows, tokens, packed.width, ONE, splits, *strides,
        KIND=packed.format,
        NBYTES=nbytes,
        GROUP=packed.group // CHUNK,
        STEP=(step.piece, step.chunk, step.chunks),
        EVEN=packed.width % (step.chunk * step.chunks) == 0,
        BIAS=int(bias_N is not None and splits == 1),
        ROWS=own.rows,
        TOKENS=at_once,
        num_warps=own.warps,
        num_stages=own.stages,
        **EXACT,
    )  # fmt: skip
    if splits > 1:
        _add_shares(sums, bias_N, y_TN)
    return y_TN


def _add_shares(sums: torch.Tensor, bias_N: torch.Tensor | None, y_TN: torch.Tensor) -> None:
    """y = the sum of the shares' (splits, T, rows), plus a bias."""
    bias, biased = (y_TN, 0) if bias_N is None else (bias_N, 1)
    count, rows = y_TN.numel(), y_TN.shape[1]
    run_kernel(
        pointwise.add_splits,
        (triton.cdiv(count, SUMS_BLOCK),),
        sums,
        bias,
        y_TN,
        rows,
        count,
        BIAS=biased,
        SPLITS=len(sums),
        BLOCK=SUMS_BLOCK,
    )


def _fastest(tokens: int, packed: Packed) -> tuple[int, int]:
    """Tokens of a program, and into how many shares columns go."""
    at_once = min(max(triton.next_power_of_2(tokens), min(SHAPES)), max(SHAPES))
    return at_once, splits_of(packed.rows, packed.width)


def parts_of(packed: Packed) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...], int]:
    """Bytes of codes; scales; the pieces that rows lie apart, and the strides of scales; bytes of a
    piece."""
    parts, kind = packed.parts, packed.format
    if kind in BLOCK_TYPES:
        block = BLOCK_TYPES[kind]
        return parts["raw"], parts["raw"], (packed.width // block.weights, 0, 0), block.nbytes
    codes, scale = parts["packed"].view(torch.uint8), parts["scale"]
    nbytes = _CHUNK_NBYTES[kind]
    return codes, scale, (codes.stride(0) // nbytes, *scale.stride()), nbytes


def _has_cores(device: torch.device) -> bool:
    """True: tensor cores for all of DTYPES, or Triton's interpreter."""
    return device.type != "cuda" or _capability(device.index or 0) >= LEAST_CAPABILITY


@lru_cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
