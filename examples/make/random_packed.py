"""Random packed weights as bytes, at the speed of memory: ``random_values`` for packed formats.

Codes are any bits; scales are such that weights deviate about as much as plain ones do, so that a
model's forward pass stays finite.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from random_values import SCALE, RandomValues, encode, walk

Bytes = npt.NDArray[np.uint8]
MIN_POOL_NBYTES = 1 << 24
"""As for plain values: more than any file system compresses at a time."""
SPREAD = 0.25
"""Scales are up to so much above and below their mean."""
EXPONENT = 119
"""The smaller of two bytes for a power of two, with which random codes of MXFP4 deviate by 0.9
SCALE; its exponent is 127 less."""
GGML_TYPES = {"F32": (0, 1, 4), "Q5_0": (6, 32, 22), "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144)}
"""GGML's number of a type, the weights of a block, and its bytes."""


@dataclass(frozen=True, slots=True)
class Fill:
    """What a tensor is filled with."""

    kind: str
    """"codes": any bytes; "exponents": powers of two of MXFP4's blocks; "fp8": any numbers but NaN;
    "scale": numbers of ``dtype`` around ``mean``; "Q4_K", "Q5_0", "Q8_0": blocks of that type;
    "exact": ``content``."""
    nbytes: int
    dtype: str = "float32"
    mean: float = 0.0
    content: bytes = b""

    @property
    def pool(self) -> tuple[str, str, float]:
        """What fills of the same pool have in common."""
        return self.kind, self.dtype, self.mean


class PackedValues:
    """The tensors of a packed checkpoint of up to ``num_blocks`` blocks.

    Each kind of bytes is cut out of a pool of its own, of whole units (a GGML block, a number),
    walking round and round it as in RandomValues. Shared by all threads.
    """

    def __init__(
        self, plain: RandomValues, fills: Mapping[str, Fill], seed: int, num_blocks: int
    ) -> None:
        """``plain`` makes the tensors that have no fill."""
        self._plain, self._fills = plain, fills
        self._pools: dict[tuple[str, str, float], tuple[Bytes, int]] = {}
        for fill in sorted(set(fills.values()), key=lambda fill: fill.pool):
            if fill.kind != "exact" and fill.pool not in self._pools:
                generator = np.random.default_rng([seed, zlib.crc32(repr(fill.pool).encode())])
                self._pools[fill.pool] = _make_pool(fill, generator, num_blocks)

    def tensor(self, name: str, count: int, begin: int) -> Iterator[memoryview]:
        """The bytes of a tensor, in pieces; ``begin`` is where they will be."""
        fill = self._fills.get(name)
        if fill is None:
            yield from self._plain.tensor(name, count, begin)
            return
        if fill.kind == "exact":
            yield memoryview(fill.content)
            return
        pool, unit = self._pools[fill.pool]
        yield from walk(pool, begin // unit * unit, fill.nbytes)


def code_scale(kind: str) -> float:
    """The scale that makes weights of random codes deviate by SCALE."""
    if kind == "fp8":
        numbers = fp8_numbers()
        return float(SCALE / np.sqrt(np.mean(numbers**2)))
    levels = {"ct4": 16, "ct8": 256, "Q5_0": 32, "Q8_0": 256}[kind]
    return SCALE / math.sqrt((levels**2 - 1) / 12)


def fp8_numbers() -> npt.NDArray[np.float64]:
    """Of all bits of E4M3 but those of NaN, in order."""
    bits = np.arange(256)[np.arange(256) & 127 != 127]
    exponent, mantissa = bits >> 3 & 15, bits & 7
    sizes = np.where(exponent, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    return np.asarray(np.where(bits >> 7, -sizes, sizes))


def _make_pool(fill: Fill, generator: np.random.Generator, num_blocks: int) -> tuple[Bytes, int]:
    """The pool, and the bytes of its unit."""
    if fill.kind in GGML_TYPES:
        unit = GGML_TYPES[fill.kind][2]
    elif fill.kind == "scale":
        unit = 4 if fill.dtype == "float32" else 2
    else:
        unit = 1
    odd = unit // (unit & -unit)
    # An odd number of units: files' blocks then meet the pool's units at a new place each round.
    count = max(num_blocks // odd + 1, MIN_POOL_NBYTES // unit) | 1
    if fill.kind == "scale":
        return encode(_around(fill.mean, count, generator), fill.dtype), unit
    raw = generator.integers(0, 256, count * unit, dtype=np.uint8)
    if fill.kind == "exponents":
        raw &= 1
        raw += EXPONENT
    if fill.kind == "fp8":
        raw[raw & 127 == 127] ^= 1
    if fill.kind in GGML_TYPES:
        blocks = raw.reshape(count, unit)
        for place, mean in _block_scales(fill.kind):
            halves = _around(mean, count, generator).astype("<f2").view(np.uint8)
            blocks[:, place : place + 2] = halves.reshape(count, 2)
    return raw, unit


def _around(mean: float, count: int, generator: np.random.Generator) -> npt.NDArray[np.float32]:
    values = generator.random(count, dtype=np.float32)
    values -= 0.5
    values *= 2 * SPREAD * mean
    values += mean
    return values


def _block_scales(kind: str) -> list[tuple[int, float]]:
    """Where a block's float16 numbers are, and their means."""
    if kind != "Q4_K":
        return [(0, code_scale(kind))]
    # w = d * sc * q - dmin * m, of uniform sc and m below 64 and q below 16: a mean of zero.
    codes, scales = np.arange(16.0), np.arange(64.0)
    products = np.outer(scales, codes)
    ratio = products.mean() / scales.mean()
    d = SCALE / math.sqrt(products.var() + ratio**2 * scales.var())
    return [(0, d), (2, d * ratio)]
