"""Triton kernels of what is done to activations between matrix products.

They round where plain torch rounds, so that results differ by no more than the order of a sum and
the last bit of a function.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_and_norm(  # noqa: PLR0913 - a kernel has no records
    x: tl.tensor,
    added: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    normed: tl.tensor,
    width: int,
    eps: float,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program norms a token of ``width`` numbers, after ``added`` is added to it, if ADD."""
    first = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    number = tl.load(x + first + column, mask=inside, other=0).to(tl.float32)
    if ADD:
        number += tl.load(added + first + column, mask=inside, other=0).to(tl.float32)
        rounded = number.to(total.dtype.element_ty)
        tl.store(total + first + column, rounded, mask=inside)
        number = rounded.to(tl.float32)
    number *= tl.rsqrt(tl.sum(number * number, axis=0) / width + eps)
    factor = tl.load(weight + column, mask=inside, other=0)
    number = number.to(weight.dtype.element_ty).to(tl.float32) * factor.to(tl.float32)
    number = number.to(weight.dtype.element_ty).to(normed.dtype.element_ty)
    tl.store(normed + first + column, number, mask=inside)


@triton.jit
def silu_times(gate: tl.tensor, up: tl.tensor, count: int, BLOCK: tl.constexpr) -> None:
    """gate = silu(gate) * up."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    place = tl.arange(0, BLOCK)
    inside = place < count - first
    number = tl.load(gate + first + place, mask=inside, other=0).to(tl.float32)
    number = (number / (1 + tl.exp(-number))).to(gate.dtype.element_ty).to(tl.float32)
    number *= tl.load(up + first + place, mask=inside, other=0).to(tl.float32)
    tl.store(gate + first + place, number.to(gate.dtype.element_ty), mask=inside)
