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


@triton.jit
def clamped_times(
    gate: tl.tensor, up: tl.tensor, count: int, alpha: float, limit: float, BLOCK: tl.constexpr
) -> None:
    """gate = (up + 1) * gate * sigmoid(alpha * gate), both clamped before."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    place = tl.arange(0, BLOCK)
    inside = place < count - first
    number = tl.load(gate + first + place, mask=inside, other=0).to(tl.float32)
    factor = tl.load(up + first + place, mask=inside, other=0).to(tl.float32)
    # Which keep what is not a number.
    number = tl.where(number > limit, limit, number)
    factor = tl.where(factor > limit, limit, tl.where(factor < -limit, -limit, factor))
    number = (factor + 1) * (number / (1 + tl.exp(-alpha * number)))
    tl.store(gate + first + place, number.to(gate.dtype.element_ty), mask=inside)


@triton.jit
def rope(  # noqa: PLR0913 - a kernel has no records
    x: tl.tensor,
    out: tl.tensor,
    table: tl.tensor,
    first: int,
    heads: int,
    tokens: int,
    head_stride: int,
    token_stride: int,
    sines: int,
    rows: int,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The program's token in HEADS of x's ``heads`` heads, from number ``first`` on."""
    token = tl.program_id(0).to(tl.int64)
    head = first + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (pair < HALF)
    angle = table + token * rows + pair
    cos = tl.load(angle, mask=pair < HALF, other=0)
    sin = tl.load(angle + sines, mask=pair < HALF, other=0)
    x += token * token_stride + head.to(tl.int64) * head_stride
    if INTERLEAVED:
        one = tl.load(x + 2 * pair, mask=inside, other=0).to(tl.float32)
        other = tl.load(x + 2 * pair + 1, mask=inside, other=0).to(tl.float32)
    else:
        one = tl.load(x + pair, mask=inside, other=0).to(tl.float32)
        other = tl.load(x + HALF + pair, mask=inside, other=0).to(tl.float32)
    place = out + (head.to(tl.int64) * tokens + token) * (2 * HALF) + pair
    tl.store(place, (one * cos - other * sin).to(out.dtype.element_ty), mask=inside)
    tl.store(place + HALF, (other * cos + one * sin).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def rotate_pairs(  # noqa: PLR0913 - a kernel has no records
    q: tl.tensor,
    k: tl.tensor,
    q_out: tl.tensor,
    k_out: tl.tensor,
    table: tl.tensor,
    q_heads: int,
    k_heads: int,
    tokens: int,
    q_head: int,
    q_token: int,
    k_head: int,
    k_token: int,
    sines: int,
    rows: int,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program rotates a token in HEADS heads of q, or, past those, of k: see ``rope.rotate``."""
    first = tl.program_id(1) * HEADS
    past = tl.cdiv(q_heads, HEADS) * HEADS
    if first < past:
        rope(q, q_out, table, first, q_heads, tokens, q_head, q_token, sines, rows,
             HALF, INTERLEAVED, HEADS, BLOCK)  # fmt: skip
    else:
        rope(k, k_out, table, first - past, k_heads, tokens, k_head, k_token, sines, rows,
             HALF, INTERLEAVED, HEADS, BLOCK)  # fmt: skip


@triton.jit
def rounded(
    total: tl.tensor,
    bias: tl.tensor,
    row: tl.tensor,
    inside: tl.tensor,
    kind: tl.constexpr,
    BIAS: tl.constexpr,
) -> tl.tensor:
    """float32 sums in the dtype ``kind``; the bias of their rows, which lie BIAS elements apart, is
    added to that, unless BIAS is 0."""
    one = total.to(kind)
    if BIAS:
        added = tl.load(bias + row * BIAS, mask=inside, other=0).to(tl.float32)
        one = (one.to(tl.float32) + added).to(kind)
    return one


@triton.jit(do_not_specialize=["rows", "count"])
def add_splits(  # noqa: PLR0913
    sums: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: int,
    count: int,
    BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The totals of sums (SPLITS, tokens, rows), added up in their order: y (tokens, rows), of
    ``count`` numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.load(sums + at, mask=inside, other=0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(sums + at + split * count, mask=inside, other=0)
    number = rounded(total, bias, at % rows, inside, y.dtype.element_ty, BIAS)
    tl.store(y + at, number, mask=inside)


@triton.jit
def combine_shares(
    y: tl.tensor,
    shares: tl.tensor,
    out: tl.tensor,
    width: int,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """out (T, width) = the sum of a token's K rows of y, from the first on, times their shares."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        pair = token * K + k
        one = tl.load(y + pair * width + column, mask=inside, other=0).to(tl.float32)
        total += one * tl.load(shares + pair)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def choose_experts(  # noqa: PLR0913 - a kernel has no records
    logits: tl.tensor,
    ids: tl.tensor,
    shares: tl.tensor,
    experts: int,
    K: tl.constexpr,
    NORMED: tl.constexpr,
    OVER_CHOSEN: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program finds the K experts of a token, ascending, and what each counts.

    An expert's rank is its logit's bits as an integer of the same order, above the number of
    experts behind it: of equals the first wins, and K are found whatever the logits are. BLOCK is
    at most 1024.
    """
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    inside = expert < experts
    logit = tl.load(logits + token * experts + expert, mask=inside, other=0).to(tl.float32)
    bits = tl.where(logit == 0, 0.0, logit).to(tl.int32, bitcast=True)
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)  # any NaN
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    rank = tl.where(inside, order * 1024 + (1023 - expert), -(1 << 62))
    left = rank
    chosen = expert < 0
    for _ in tl.static_range(K):
        best = left == tl.max(left, axis=0)
        chosen = chosen | best
        left = tl.where(best, -(1 << 62), left)
    counted = chosen if OVER_CHOSEN else inside
    logit = tl.where(inside, logit, -float("inf"))
    power = tl.where(counted, tl.exp(logit - tl.max(logit, axis=0)), 0.0)
    share = tl.div_rn(power, tl.sum(power, axis=0))
    if NORMED:
        share = tl.div_rn(share, tl.sum(tl.where(chosen, share, 0.0), axis=0))
    if ROUNDED:
        share = share.to(logits.dtype.element_ty).to(tl.float32)
    place = token * K + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(ids + place, expert.to(tl.int64), mask=chosen)
    tl.store(shares + place, share, mask=chosen)
