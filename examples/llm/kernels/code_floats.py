"""What the products of packed matrices are made of: floats from codes, and numbers of x.

An integer becomes a float32 without a conversion, which GPUs do at a fraction of their rate: with
the exponent of a power of two above it, it is the low end of a fraction, and that power is then
taken off, exactly. ``one`` is 1.0 as an integer, ONE, from which these exponents are computed: an
argument of the kernels, or compilers write the exponent as a constant beside the mask, which no
instruction takes two of.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks256 import half_float

ONE = 127 << 23
UNIT = tl.constexpr(2.0**126)


@triton.jit
def code(
    word: tl.tensor, one: int, AT: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr
) -> tl.tensor:
    """BITS of words from bit AT on, less ZERO, as float32; none is above bit 22."""
    bits = (word & (((1 << BITS) - 1) << AT)) | (one + ((23 - AT) << 23))
    return bits.to(tl.float32, bitcast=True) - ((1 << (23 - AT)) + ZERO)


@triton.jit
def signed_byte(word: tl.tensor, one: int, AT: tl.constexpr) -> tl.tensor:
    """Eight bits of words from bit AT on, of which the last is a sign, as float32."""
    bits = (word & (255 << AT)) ^ (one + (((23 - AT) << 23) + (128 << AT)))
    return bits.to(tl.float32, bitcast=True) - ((1 << (23 - AT)) + 128)


@triton.jit
def fp4(word: tl.tensor, AT: tl.constexpr) -> tl.tensor:
    """The E2M1 number (sign, two bits of exponent, one of mantissa) in words from bit AT on, as
    float32. With its bits where a float32 has such, it stands for 2 ** -126 times as much; numbers
    without an exponent do, too."""
    bits = (((word >> AT) & 7) << 22) | (((word >> AT) & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * UNIT


@triton.jit
def power_of_two(byte: tl.tensor) -> tl.tensor:
    """2 ** (byte - 127) as float32; NaN for 255."""
    exponent = byte.to(tl.uint32)
    bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
    return tl.where(exponent == 255, 0x7FC00000, bits).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def four(words: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """What lies along the last of two dimensions, of 4: a thread that loaded it keeps it."""
    halves = tl.reshape(words, (words.shape[0], 2, 2))
    even, odd = tl.split(halves)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def four_words(base: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Four words from each of these pointers on, in one load."""
    words = tl.load(base[:, None] + tl.arange(0, 4)[None, :])
    first, second, third, fourth = four(words)
    return first, second, third, fourth


@triton.jit
def brain_floats(both: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The low and the high 16 bits of words, bfloat16, as float32."""
    low = (both << 16).to(tl.float32, bitcast=True)
    return low, (both & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def eight_x(x: tl.tensor, at: tl.tensor) -> tuple[tl.tensor, ...]:
    """Numbers ``at`` to ``at`` + 7 of x as eight tensors of float32; ``at`` is a multiple of 8."""
    if x.dtype.element_ty == tl.float32:
        a, b, c, d = four_words(x + at)
        e, f, g, h = four_words(x + at + 4)
    else:
        ab, cd, ef, gh = four_words(x.to(tl.pointer_type(tl.uint32)) + at // 2)
        if x.dtype.element_ty == tl.bfloat16:
            a, b = brain_floats(ab)
            c, d = brain_floats(cd)
            e, f = brain_floats(ef)
            g, h = brain_floats(gh)
        else:
            a, b = half_float(ab), half_float(ab >> 16)
            c, d = half_float(cd), half_float(cd >> 16)
            e, f = half_float(ef), half_float(ef >> 16)
            g, h = half_float(gh), half_float(gh >> 16)
    return a, b, c, d, e, f, g, h


@triton.jit
def sum_of_eight(x: tl.tuple) -> tl.tensor:
    """Of what ``eight_x`` gives."""
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))
