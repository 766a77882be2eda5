"""Matrices of experts in the tensors of all experts of a layer: of GGUF files, and of gpt-oss.

In a GGUF file each kind of matrix is one tensor. On the hub gpt-oss has gate and up in one, whose
rows take turns: either floats, of which rows of a matrix are columns, or blocks of 32 numbers in
four bits beside their scales. Biases are tensors likewise, with a row for each expert.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .finder import EXPONENT_DTYPES, Finder
from .packed import MXFP4_GROUP
from .stored import Stored, check_plain

TURNS = {"gate_proj": (0, 2), "up_proj": (1, 2), "down_proj": (0, 1)}
"""Of rows that take turns: which is the first of a matrix, and how many matrices there are."""

Shape = tuple[int, int, int]
"""Experts, rows of one's matrix, and its width."""


def find_slice(finder: Finder, module: str, shape: Shape, expert: int, *, biased: bool) -> Stored:
    """An expert's matrix in a GGUF file. UnsupportedModelError, here and below, for a tensor that
    is missing or not as it should be."""
    stored = finder.plain(finder.spec(f"{module}.weight"), f"{module}.weight", shape)
    if biased:
        check_plain(finder.spec(f"{module}.bias"), shape[:2])
        stored = replace(stored, keys={**stored.keys, "bias": f"{module}.bias"})
    return replace(stored, expert=expert)


def find_turns(finder: Finder, module: str, shape: Shape, expert: tuple[int, str]) -> Stored:
    """That of (expert, matrix) in a checkpoint of gpt-oss."""
    first, step = TURNS[expert[1]]
    count, rows, width = shape[0], shape[1] * step, shape[2]
    bias = f"{module}_bias"
    check_plain(finder.spec(bias), (count, rows))
    if f"{module}_blocks" not in finder:
        stored = finder.plain(finder.spec(module), module, (count, width, rows))
        stored = replace(stored, rows=shape[1], width=width, turned=True)
    else:
        stored = _blocks(finder, module, (count, rows, width))
        stored = replace(stored, rows=shape[1])
    keys = {**stored.keys, "bias": bias}
    return replace(stored, keys=keys, expert=expert[0], first=first, step=step)


def _blocks(finder: Finder, module: str, shape: Shape) -> Stored:
    """All rows of an expert in "mxfp4"."""
    width = shape[2]
    blocks, scales = (finder.spec(f"{module}_{kind}") for kind in ("blocks", "scales"))
    groups = (*shape[:2], width // MXFP4_GROUP)
    for spec, dtypes, expected in (
        (blocks, (torch.uint8,), (*groups, MXFP4_GROUP // 2)),
        (scales, EXPONENT_DTYPES, groups),
    ):
        if spec.dtype not in dtypes:
            raise finder.error(spec, f"has dtype {spec.dtype}, not {dtypes[-1]}")
        if spec.shape != expected or width % MXFP4_GROUP:
            found = f"has shape {list(spec.shape)}, the config says {list(expected)}"
            raise finder.error(spec, found)
    keys = {"packed": f"{module}_blocks", "scale": f"{module}_scales"}
    return Stored("mxfp4", shape[1], width, keys, "packed", MXFP4_GROUP)
