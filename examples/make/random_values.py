"""Random weights as bytes, at the speed of memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from layer_streamer.llm.quantize.shards import DTYPES

SCALE = 0.02
MIN_POOL_ELEMENTS = 1 << 23
"""More than any file system compresses at a time (ZFS: 16 MiB), so that it sees no repetition."""
CHUNK_NBYTES = 16 << 20


class RandomValues:
    """The tensors of a checkpoint of up to ``num_blocks`` blocks, from N(0, 0.02).

    They are cut out of one pool of values, walking round and round it, so that making them costs
    nothing. The pool has an odd number of elements, and at least as many as there are blocks:
    then no two blocks of the walk begin at the same element, and none repeats another, which
    would let storage that deduplicates look fast.

    A seed, a dtype and a number of blocks always give the same bytes. Shared by all threads.
    """

    def __init__(self, dtype: str, seed: int, num_blocks: int) -> None:
        self._dtype, self._seed = dtype, seed
        self._pool = self._normal("", max(num_blocks, MIN_POOL_ELEMENTS) | 1, mean=0.0)

    def tensor(self, name: str, count: int, begin: int) -> Iterator[memoryview]:
        """The bytes of a tensor of ``count`` elements, in pieces.

        Weights and biases are the walk from byte ``begin`` on, a multiple of the item size. Norms
        are drawn around 1: with 0.02, a model's activations would die out.
        """
        if name.endswith("norm.weight"):
            yield self._normal(name, count, mean=1.0).data
            return
        yield from walk(self._pool, begin, count * DTYPES[self._dtype][1])

    def _normal(self, name: str, count: int, *, mean: float) -> npt.NDArray[np.uint8]:
        generator = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        values = generator.standard_normal(count, dtype=np.float32)
        values *= SCALE
        values += mean
        return encode(values, self._dtype)


def walk(pool: npt.NDArray[np.uint8], begin: int, nbytes: int) -> Iterator[memoryview]:
    """So many bytes, in pieces, round and round a pool that stands at its byte 0 at the start."""
    end = begin + nbytes
    while begin < end:
        start = begin % pool.nbytes
        piece = pool[start : start + min(end - begin, CHUNK_NBYTES)]
        yield piece.data
        begin += piece.nbytes


def encode(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.uint8]:
    """The bytes of finite values in a dtype, rounded to nearest even. May change ``values``."""
    if dtype == "float32":
        return values.astype("<f4", copy=False).view(np.uint8)
    if dtype == "float16":
        return values.astype("<f2").view(np.uint8)
    assert dtype == "bfloat16"
    bits = values.view(np.uint32)  # a bfloat16 is the upper half of a float32
    bits += 0x7FFF + ((bits >> 16) & 1)
    bits >>= 16
    return bits.astype("<u2").view(np.uint8)
