import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm import dequant
from llm.dequant import BLOCK_BYTES, Unpacker, row_width

CPU = torch.device("cpu")
packed_types = st.sampled_from(sorted(BLOCK_BYTES))


def random_rows(rows: int, blocks: int, ggml_type: str, seed: int) -> torch.Tensor:
    """Packed rows of random bytes, with finite scales of either sign and any size."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, blocks, BLOCK_BYTES[ggml_type]), dtype=np.uint8)
    scales = 4 if ggml_type == "Q4_1" else 2
    raw[..., 1:scales:2] &= 0xBF  # exponent below that of infinities and NaNs
    return torch.from_numpy(raw.reshape(rows, -1))


def expected(rows: torch.Tensor, ggml_type: str) -> np.ndarray:
    return gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[ggml_type])


def unpack(unpacker: Unpacker, rows: torch.Tensor, ggml_type: str) -> torch.Tensor:
    return torch.cat([block.clone() for _, _, block in unpacker.blocks(rows, ggml_type)])


@settings(deadline=None, max_examples=60)
@given(packed_types, st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_unpacked_rows_equal_the_gguf_package_bit_for_bit(ggml_type, rows, blocks, seed):
    raw = random_rows(rows, blocks, ggml_type, seed)
    found = unpack(Unpacker(CPU, torch.float32, blocks * 32), raw, ggml_type)
    assert found.numpy().tobytes() == expected(raw, ggml_type).tobytes()


@pytest.mark.parametrize("ggml_type", BLOCK_BYTES)
@pytest.mark.parametrize("limit", [64, 100, 640])
def test_rows_that_exceed_the_buffer_come_in_blocks_that_cover_them_once(
    monkeypatch, ggml_type, limit
):
    monkeypatch.setattr(dequant, "_CPU_ELEMENTS", limit)
    raw = random_rows(11, 2, ggml_type, 0)
    unpacker, covered = Unpacker(CPU, torch.float32, 64), 0
    for start, end, block in unpacker.blocks(raw, ggml_type):
        assert start == covered and block.shape == (end - start, 64)
        assert np.array_equal(block.numpy(), expected(raw[start:end], ggml_type))
        covered = end
    assert covered == 11


@pytest.mark.parametrize("ggml_type", BLOCK_BYTES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrower_dtype_is_the_float32_value_rounded_once(ggml_type, dtype):
    raw = random_rows(5, 3, ggml_type, 1)
    found = unpack(Unpacker(CPU, dtype, 96), raw, ggml_type)
    assert torch.equal(found, torch.from_numpy(expected(raw, ggml_type)).to(dtype))


def test_the_buffer_holds_a_row_wider_than_its_usual_size(monkeypatch):
    monkeypatch.setattr(dequant, "_CPU_ELEMENTS", 32)
    raw = random_rows(2, 8, "Q4_1", 2)
    found = unpack(Unpacker(CPU, torch.float32, 256), raw, "Q4_1")
    assert np.array_equal(found.numpy(), expected(raw, "Q4_1"))


def test_unpacking_allocates_nothing_after_the_first_block():
    raw = random_rows(64, 8, "Q4_1", 3)
    unpacker = Unpacker(CPU, torch.float32, 256)
    pointers = {block.data_ptr() for _ in range(3) for _, _, block in unpacker.blocks(raw, "Q4_1")}
    assert len(pointers) == 1


def test_a_row_of_bytes_is_as_wide_as_its_blocks():
    assert row_width(3 * 20, "Q4_1") == row_width(3 * 34, "Q8_0") == 96


@pytest.mark.gpu
@pytest.mark.parametrize("ggml_type", BLOCK_BYTES)
def test_unpacking_on_a_gpu_equals_the_gguf_package_bit_for_bit(ggml_type):
    raw = random_rows(37, 5, ggml_type, 4)
    unpacker = Unpacker(torch.device("cuda"), torch.float32, 160)
    found = unpack(unpacker, raw.cuda(), ggml_type).cpu()
    assert found.numpy().tobytes() == expected(raw, ggml_type).tobytes()
