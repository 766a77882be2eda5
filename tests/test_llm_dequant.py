import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm import dequant
from llm.dequant import Unpacker, row_width
from llm.quants import BLOCK_TYPES

CPU = torch.device("cpu")
SCALES = {"Q4_1": [1, 3], "Q5_0": [1], "Q8_0": [1], "Q4_K": [1, 3], "Q6_K": [209]}
"""Where the upper bytes of a block's float16 numbers are."""
packed_types = st.sampled_from(sorted(BLOCK_TYPES))


def random_rows(rows: int, blocks: int, ggml_type: str, seed: int) -> torch.Tensor:
    """Packed rows of random bytes, with finite scales of either sign and any size."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, blocks, BLOCK_TYPES[ggml_type].nbytes), dtype=np.uint8)
    raw[..., SCALES[ggml_type]] &= 0xBF  # exponent below that of infinities and NaNs
    return torch.from_numpy(raw.reshape(rows, -1))


def expected(rows: torch.Tensor, ggml_type: str) -> np.ndarray:
    return gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[ggml_type])


def width(blocks: int, ggml_type: str) -> int:
    return blocks * BLOCK_TYPES[ggml_type].weights


def unpack(unpacker: Unpacker, rows: torch.Tensor, ggml_type: str) -> torch.Tensor:
    return torch.cat([block.clone() for _, _, block in unpacker.blocks(rows, ggml_type)])


@pytest.mark.parametrize("ggml_type", BLOCK_TYPES)
def test_blocks_are_as_large_as_the_gguf_package_says(ggml_type):
    kind = BLOCK_TYPES[ggml_type]
    assert (kind.weights, kind.nbytes) == gguf.GGML_QUANT_SIZES[
        gguf.GGMLQuantizationType[ggml_type]
    ]


@settings(deadline=None, max_examples=100)
@given(packed_types, st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_unpacked_rows_equal_the_gguf_package_bit_for_bit(ggml_type, rows, blocks, seed):
    raw = random_rows(rows, blocks, ggml_type, seed)
    found = unpack(Unpacker(CPU, torch.float32, width(blocks, ggml_type)), raw, ggml_type)
    assert found.numpy().tobytes() == expected(raw, ggml_type).tobytes()


@pytest.mark.parametrize("ggml_type", BLOCK_TYPES)
@pytest.mark.parametrize("rows_at_a_time", [1, 1.6, 10])
def test_rows_that_exceed_the_buffer_come_in_blocks_that_cover_them_once(
    monkeypatch, ggml_type, rows_at_a_time
):
    columns = width(2, ggml_type)
    monkeypatch.setattr(dequant, "_CPU_ELEMENTS", int(columns * rows_at_a_time))
    raw = random_rows(11, 2, ggml_type, 0)
    unpacker, covered = Unpacker(CPU, torch.float32, columns), 0
    for start, end, block in unpacker.blocks(raw, ggml_type):
        assert start == covered and block.shape == (end - start, columns)
        assert np.array_equal(block.numpy(), expected(raw[start:end], ggml_type))
        covered = end
    assert covered == 11


@pytest.mark.parametrize("ggml_type", BLOCK_TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrower_dtype_is_the_float32_value_rounded_once(ggml_type, dtype):
    raw = random_rows(5, 3, ggml_type, 1)
    found = unpack(Unpacker(CPU, dtype, width(3, ggml_type)), raw, ggml_type)
    assert torch.equal(found, torch.from_numpy(expected(raw, ggml_type)).to(dtype))


def test_the_buffer_holds_a_row_wider_than_its_usual_size(monkeypatch):
    monkeypatch.setattr(dequant, "_CPU_ELEMENTS", 32)
    raw = random_rows(2, 8, "Q4_1", 2)
    found = unpack(Unpacker(CPU, torch.float32, 256), raw, "Q4_1")
    assert np.array_equal(found.numpy(), expected(raw, "Q4_1"))


@pytest.mark.parametrize("ggml_type", BLOCK_TYPES)
def test_unpacking_uses_the_same_buffer_for_every_block(ggml_type):
    raw = random_rows(64, 8, ggml_type, 3)
    unpacker = Unpacker(CPU, torch.float32, width(8, ggml_type))
    pointers = {
        block.data_ptr() for _ in range(3) for _, _, block in unpacker.blocks(raw, ggml_type)
    }
    assert len(pointers) == 1


def test_the_memory_is_stated_and_none_is_taken_where_nothing_is_packed():
    assert Unpacker(CPU, torch.bfloat16, 0).nbytes == 0
    assert Unpacker(CPU, torch.bfloat16, 64).nbytes == (1 << 20) * (4 + 2 + 2) + (1 << 20) // 4


@pytest.mark.parametrize("ggml_type", BLOCK_TYPES)
def test_a_row_of_bytes_is_as_wide_as_its_blocks(ggml_type):
    assert row_width(3 * BLOCK_TYPES[ggml_type].nbytes, ggml_type) == width(3, ggml_type)


@pytest.mark.gpu
@pytest.mark.parametrize("ggml_type", BLOCK_TYPES)
def test_unpacking_on_a_gpu_equals_the_gguf_package_bit_for_bit(ggml_type):
    raw = random_rows(37, 5, ggml_type, 4)
    unpacker = Unpacker(torch.device("cuda"), torch.float32, width(5, ggml_type))
    found = unpack(unpacker, raw.cuda(), ggml_type).cpu()
    assert found.numpy().tobytes() == expected(raw, ggml_type).tobytes()
