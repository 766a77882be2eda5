import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer.llm.weights import dequant
from layer_streamer.llm.weights.dequant import ROW_STEP, Unpacker, Widest, ggml_matrix, row_width
from layer_streamer.llm.weights.quants import BLOCK_TYPES

CPU = torch.device("cpu")
POWERS = ("MXFP4",)
"""Whose scales are powers of two in a byte; test_llm_gpt_oss.py has all of them."""
packed_types = st.sampled_from(sorted(BLOCK_TYPES))
EXTREME_SCALES = np.array(
    [0, -0.0, 6e-8, -6e-8, 6.1e-5, 65504, -65504, np.inf, -np.inf, np.nan], np.float16
)


def random_rows(rows: int, blocks: int, ggml_type: str, seed: int) -> torch.Tensor:
    """Packed rows of random bytes, with finite scales of either sign and any size."""
    rng = np.random.default_rng(seed)
    kind = BLOCK_TYPES[ggml_type]
    raw = rng.integers(0, 256, (rows, blocks, kind.nbytes), dtype=np.uint8)
    if ggml_type in POWERS:
        raw[..., 0] &= 0xF7  # 255 is not a number
    else:
        raw[..., [place + 1 for place in kind.scales]] &= 0xBF  # below infinities and NaNs
    return torch.from_numpy(raw.reshape(rows, -1))


def adversarial_rows(ggml_type: str, seed: int) -> torch.Tensor:
    """Every pair of extreme scales, with bytes that are random, all zero and all one."""
    kind, count = BLOCK_TYPES[ggml_type], len(EXTREME_SCALES)
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (count * count, 3, kind.nbytes), dtype=np.uint8)
    raw[:, 1], raw[:, 2] = 0, 255
    pairs = np.array([(a, b) for a in EXTREME_SCALES for b in EXTREME_SCALES], np.float16)
    for place, values in zip(kind.scales, pairs.T, strict=False):
        raw[:, :, place : place + 2] = values[:, None, None].view(np.uint8)
    return torch.from_numpy(raw.reshape(count * count, -1))


def expected(rows: torch.Tensor, ggml_type: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[ggml_type])


def equal_bits(found: torch.Tensor, wanted: np.ndarray) -> bool:
    """Every bit, but for those of what is not a number."""
    same = found.numpy().view(np.int32) == wanted.view(np.int32)
    return bool((same | (np.isnan(wanted) & np.isnan(found.numpy()))).all())


def width(blocks: int, ggml_type: str) -> int:
    return blocks * BLOCK_TYPES[ggml_type].weights


def an_unpacker(blocks: int, ggml_type: str, dtype=torch.float32, device=CPU) -> Unpacker:
    return Unpacker(device, dtype, Widest.of([(ggml_type, width(blocks, ggml_type), True)]))


def unpack(unpacker: Unpacker, rows: torch.Tensor, ggml_type: str) -> torch.Tensor:
    blocks = unpacker.blocks(ggml_matrix(rows, ggml_type))
    return torch.cat([block.clone() for _, _, block in blocks])


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
    found = unpack(an_unpacker(blocks, ggml_type), raw, ggml_type)
    assert found.numpy().tobytes() == expected(raw, ggml_type).tobytes()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ggml_type", [name for name in BLOCK_TYPES if name not in POWERS])
def test_extreme_scales_and_codes_equal_the_gguf_package_bit_for_bit(ggml_type, seed):
    raw = adversarial_rows(ggml_type, seed)
    found = unpack(an_unpacker(3, ggml_type), raw, ggml_type)
    wanted = expected(raw, ggml_type)
    assert np.isinf(wanted).any() and np.isnan(wanted).any()
    assert equal_bits(found, wanted)


@pytest.mark.parametrize("ggml_type", BLOCK_TYPES)
@pytest.mark.parametrize("rows_at_a_time", [8, 9.6, 16])
def test_rows_that_exceed_the_buffer_come_in_blocks_that_cover_them_once(
    monkeypatch, ggml_type, rows_at_a_time
):
    columns = width(2, ggml_type)
    monkeypatch.setattr(dequant, "_CPU_ELEMENTS", int(columns * rows_at_a_time))
    raw = random_rows(19, 2, ggml_type, 0)
    unpacker, covered = an_unpacker(2, ggml_type), 0
    for start, end, block in unpacker.blocks(ggml_matrix(raw, ggml_type)):
        assert start == covered and block.shape == (end - start, columns)
        assert np.array_equal(block.numpy(), expected(raw[start:end], ggml_type))
        covered = end
    assert covered == 19


@pytest.mark.parametrize("ggml_type", BLOCK_TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrower_dtype_is_the_float32_value_rounded_once(ggml_type, dtype):
    raw = random_rows(5, 3, ggml_type, 1)
    found = unpack(an_unpacker(3, ggml_type, dtype), raw, ggml_type)
    assert torch.equal(found, torch.from_numpy(expected(raw, ggml_type)).to(dtype))


def test_the_buffer_holds_rows_wider_than_its_usual_size(monkeypatch):
    monkeypatch.setattr(dequant, "_CPU_ELEMENTS", 32)
    raw = random_rows(ROW_STEP + 1, 8, "Q4_1", 2)
    found = unpack(an_unpacker(8, "Q4_1"), raw, "Q4_1")
    assert np.array_equal(found.numpy(), expected(raw, "Q4_1"))


@pytest.mark.parametrize("ggml_type", BLOCK_TYPES)
def test_unpacking_uses_the_same_buffer_for_every_block(ggml_type):
    raw = random_rows(64, 8, ggml_type, 3)
    unpacker, matrix = an_unpacker(8, ggml_type), ggml_matrix(raw, ggml_type)
    pointers = {block.data_ptr() for _ in range(3) for _, _, block in unpacker.blocks(matrix)}
    assert len(pointers) == 1


def test_the_memory_is_stated_and_none_is_taken_where_nothing_is_packed():
    assert Unpacker(CPU, torch.bfloat16, Widest()).nbytes == 0
    few, floats = 1024, 1 << 20
    assert an_unpacker(2, "Q4_1").nbytes == floats * (4 + 3) + few
    assert an_unpacker(2, "Q4_1", torch.bfloat16).nbytes == floats * (2 + 3 + 4) + few


@pytest.mark.parametrize("ggml_type", BLOCK_TYPES)
def test_a_row_of_bytes_is_as_wide_as_its_blocks(ggml_type):
    assert row_width(3 * BLOCK_TYPES[ggml_type].nbytes, ggml_type) == width(3, ggml_type)


@pytest.mark.gpu
@pytest.mark.parametrize("ggml_type", BLOCK_TYPES)
def test_unpacking_on_a_gpu_equals_the_gguf_package_bit_for_bit(ggml_type):
    raw = random_rows(37, 5, ggml_type, 4)
    unpacker = an_unpacker(5, ggml_type, device=torch.device("cuda"))
    found = unpack(unpacker, raw.cuda(), ggml_type).cpu()
    assert found.numpy().tobytes() == expected(raw, ggml_type).tobytes()
