"""GGML tensor types: how many bytes a block of elements takes in a GGUF file.

Facts of the format, by the ids of ``enum ggml_type`` in llama.cpp's ``ggml.h``. Ids of types that
were removed from the format (4, 5, 31 to 33, 36 to 38) are unknown here, as they are there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .safetensors import DTYPES


class GGMLType(NamedTuple):
    """One type: ``block_elements`` consecutive elements of a row take ``block_bytes`` bytes."""

    name: str
    block_elements: int
    block_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        """The native dtype, or uint8: a packed type is handed on as rows of raw bytes."""
        return DTYPES[self.name] if self.is_native else torch.uint8

    @property
    def is_native(self) -> bool:
        """Whether torch can view the bytes as they are; such types are named as in safetensors."""
        return self.block_elements == 1


GGML_TYPES = {
    0: GGMLType("F32", 1, 4),
    1: GGMLType("F16", 1, 2),
    2: GGMLType("Q4_0", 32, 18),
    3: GGMLType("Q4_1", 32, 20),
    6: GGMLType("Q5_0", 32, 22),
    7: GGMLType("Q5_1", 32, 24),
    8: GGMLType("Q8_0", 32, 34),
    9: GGMLType("Q8_1", 32, 36),  # two f16 and 32 bytes; gguf 0.19 still lists its older 40
    10: GGMLType("Q2_K", 256, 84),
    11: GGMLType("Q3_K", 256, 110),
    12: GGMLType("Q4_K", 256, 144),
    13: GGMLType("Q5_K", 256, 176),
    14: GGMLType("Q6_K", 256, 210),
    15: GGMLType("Q8_K", 256, 292),
    16: GGMLType("IQ2_XXS", 256, 66),
    17: GGMLType("IQ2_XS", 256, 74),
    18: GGMLType("IQ3_XXS", 256, 98),
    19: GGMLType("IQ1_S", 256, 50),
    20: GGMLType("IQ4_NL", 32, 18),
    21: GGMLType("IQ3_S", 256, 110),
    22: GGMLType("IQ2_S", 256, 82),
    23: GGMLType("IQ4_XS", 256, 136),
    24: GGMLType("I8", 1, 1),
    25: GGMLType("I16", 1, 2),
    26: GGMLType("I32", 1, 4),
    27: GGMLType("I64", 1, 8),
    28: GGMLType("F64", 1, 8),
    29: GGMLType("IQ1_M", 256, 56),
    30: GGMLType("BF16", 1, 2),
    34: GGMLType("TQ1_0", 256, 54),
    35: GGMLType("TQ2_0", 256, 66),
    39: GGMLType("MXFP4", 32, 17),
    40: GGMLType("NVFP4", 64, 36),
    41: GGMLType("Q1_0", 128, 18),
}
