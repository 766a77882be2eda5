"""Triton kernels against plain torch: run by test_llm_kernels.py, in a process of its own.

With TRITON_INTERPRET=1 on the CPU, in Triton's interpreter; otherwise compiled, on a GPU. The
interpreter cuts bfloat16 off where a GPU rounds, so that dtype is compared on a GPU only.
"""

from dataclasses import replace

import numpy as np
import packed_cases as cases
import pytest
import torch
import torch.nn.functional as F
from triton_runs import FEW, of_many

from layer_streamer.llm.kernels import fused, launching, unpacking
from layer_streamer.llm.kernels.triton_support import interpreted
from layer_streamer.llm.kernels.unpacking import Launch
from layer_streamer.llm.models.rope import plain_rotate
from layer_streamer.llm.weights.dequant import Unpacker, Widest
from layer_streamer.llm.weights.packed import Packed, unpack_rows

DEVICE = torch.device("cpu" if interpreted() else "cuda")
DTYPES = [torch.float32, torch.float16] + ([] if interpreted() else [torch.bfloat16])
SMALL, LARGE = ["Q4_0", "Q4_1", "Q5_0", "Q8_0"], ["Q4_K", "Q5_K", "Q6_K"]
POISON = 77.0

MATRICES = {
    **{kind: cases.blocks(kind, 9, 32 * 17) for kind in SMALL},
    **{kind: cases.blocks(kind, 7, 256 * 5) for kind in LARGE},
    **{f"{kind}, one block": cases.blocks(kind, 3, 32) for kind in SMALL},
    **{f"{kind}, one block": cases.blocks(kind, 3, 256) for kind in LARGE},
    "ct4": cases.integers("ct4", 5, 1152, 128),
    "ct4, channel": cases.integers("ct4", 5, 96, dtype=torch.float16),
    "ct4, asymmetric": cases.integers("ct4", 13, 96, 32, zero=True, first_row=3),
    "ct4, asymmetric channel": cases.integers("ct4", 5, 64, zero=True, dtype=torch.float32),
    "ct8": cases.integers("ct8", 5, 1152, 128, dtype=torch.float16),
    "ct8, channel": cases.integers("ct8", 5, 96),
    "ct8, asymmetric": cases.integers("ct8", 13, 96, 32, zero=True, first_row=3),
    "int8": cases.integers("int8", 5, 96),
    "int8, asymmetric": cases.integers("int8", 5, 96, 32, zero=True),
    "fp8, channel": cases.fp8(6, 96, dtype=torch.bfloat16),
    "fp8, tensor": cases.fp8(6, 96, (0, 0)),
    "fp8, blocks": cases.fp8(9, 192, (4, 128), first_row=2),
    "fp8, powers of two": cases.fp8(9, 96, (1, 32), dtype=torch.uint8),
    "awq4": cases.awq(152, 256, 128),
    "awq4, group 32": cases.awq(24, 96, 32, torch.bfloat16),
    "awq4, channel": cases.awq(16, 96, 0),
}


def unpack_both(
    packed: Packed, rows: tuple[int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows by plain torch on the CPU, and by a kernel, which leaves what is around them alone."""
    start, end = rows
    expected = torch.empty(end - start, packed.width, dtype=dtype)
    unpack_rows(packed, start, end, expected)
    on_device = cases.on(packed, DEVICE)
    around = torch.full((expected.numel() + 128,), POISON, dtype=dtype, device=DEVICE)
    found = around[64:-64].view(expected.shape)
    assert unpacking.serves(on_device)
    with np.errstate(all="ignore"):
        unpacking.launch_unpack(on_device, start, end, found)
    assert (around[:64] == POISON).all() and (around[-64:] == POISON).all()
    return expected, found.cpu()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal to the sign of zero; NaN is NaN whatever its other bits."""
    integer = {2: torch.int16, 4: torch.int32}[one.element_size()]
    equal = one.view(integer) == other.view(integer)
    return bool((equal | (one.isnan() & other.isnan())).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MATRICES)
def test_unpacked_rows_equal_plain_torch_bit_for_bit(name, dtype):
    packed = MATRICES[name]
    expected, found = unpack_both(packed, (0, packed.rows), dtype)
    assert same_bits(expected, found)


@pytest.mark.parametrize("name", MATRICES)
def test_a_few_rows_are_those_of_the_matrix(name):
    packed = MATRICES[name]
    first, last = (8, packed.rows) if name.startswith("awq4") else (1, packed.rows - 1)
    expected, found = unpack_both(packed, (first, last), torch.float32)
    assert same_bits(expected, found)


@pytest.mark.parametrize("bits", [0x0001, 0x8001, 0x03FF, 0x7BFF, 0x7C00, 0xFC00, 0x7E00])
@pytest.mark.parametrize("kind", SMALL + LARGE)
def test_extreme_scales_give_what_plain_torch_gives(kind, bits):
    packed = cases.with_scales(cases.blocks(kind, 2, 256, seed=bits), bits)
    expected, found = unpack_both(packed, (0, 2), torch.float32)
    assert same_bits(expected, found)


@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x80, 0x0F])
@pytest.mark.parametrize("kind", SMALL + LARGE)
def test_extreme_codes_give_what_plain_torch_gives(kind, byte):
    packed = cases.blocks(kind, 2, 256)
    raw = torch.full_like(packed.parts["raw"], byte)
    packed = cases.with_scales(replace(packed, parts={"raw": raw}), 0x3555)
    expected, found = unpack_both(packed, (0, 2), torch.float32)
    assert same_bits(expected, found)


def test_parts_that_are_views_are_read_by_their_strides():
    wide = cases.integers("ct4", 6, 192, 64, zero=True)
    parts = {
        "packed": wide.parts["packed"][:, :16],
        "scale": wide.parts["scale"][:1, :2].expand(6, 2),
        "zero": wide.parts["zero"][:, :2],
    }
    expected, found = unpack_both(replace(wide, width=128, parts=parts), (1, 6), torch.float32)
    assert same_bits(expected, found)
    wide = cases.awq(48, 64, 32)
    parts = {name: part[:, : part.shape[1] // 2] for name, part in wide.parts.items()}
    expected, found = unpack_both(replace(wide, rows=24, parts=parts), (8, 24), torch.float32)
    assert same_bits(expected, found)


UNSERVED = {
    "act-order": replace(
        MATRICES["ct4"],
        parts=MATRICES["ct4"].parts | {"g_idx": torch.arange(1152, dtype=torch.int32) % 9},
    ),
    "a width that is no multiple of 32": cases.integers("ct8", 5, 100),
    "a group of 16": cases.integers("ct4", 5, 96, 16),
    "a type without a kernel": cases.blocks("Q2_K", 3, 256),
    "bytes that are not contiguous": replace(
        MATRICES["Q8_0"], width=32, parts={"raw": MATRICES["Q8_0"].parts["raw"][:, :34]}
    ),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_what_no_kernel_serves_is_unpacked_by_plain_torch(name):
    packed = UNSERVED[name]
    on_device = cases.on(packed, DEVICE)
    if name.startswith("bytes"):  # copies to a device are contiguous
        on_device = replace(
            on_device, parts={"raw": MATRICES["Q8_0"].parts["raw"].to(DEVICE)[:, :34]}
        )
    expected = torch.empty(packed.rows, packed.width)
    unpack_rows(packed, 0, packed.rows, expected)
    found = torch.empty_like(expected, device=DEVICE)
    assert not fused.kernel_unpacks(on_device, found)
    fused.unpack(on_device, 0, packed.rows, found)
    assert same_bits(expected, found.cpu())


@pytest.mark.parametrize("name", ["Q6_K", "ct4", "a type without a kernel", "act-order"])
def test_the_engines_buffer_gets_the_same_rows_with_kernels_and_without(name):
    packed = cases.on((MATRICES | UNSERVED)[name], DEVICE)
    ordered = "g_idx" not in packed.parts
    widest = Widest.of([(packed.format, packed.width, ordered)])
    one, other = (
        Unpacker(DEVICE, torch.float16, widest, kernels=kernels) for kernels in (True, False)
    )
    rows, expected = (torch.cat([b for _, _, b in u.blocks(packed)]) for u in (one, other))
    assert same_bits(rows, expected)
    scratch = other.nbytes - one.nbytes
    assert scratch > 0 if name in MATRICES else scratch == 0


ROWS = 3 if interpreted() else 7
PRODUCTS = {
    "ct4": cases.integers("ct4", ROWS, 1152, 128),
    "ct4, channel": cases.integers("ct4", ROWS, 96),
    "ct8": cases.integers("ct8", ROWS, 1152, 128, dtype=torch.float32),
    "ct8, channel": cases.integers("ct8", ROWS, 96),
    "Q4_0": cases.with_scales(cases.blocks("Q4_0", ROWS, 1056), 0x2C11),
    "Q8_0": cases.with_scales(cases.blocks("Q8_0", ROWS, 1056), 0x2C11),
    "Q4_K": cases.with_scales(cases.blocks("Q4_K", ROWS, 2304), 0x2C11),
}
OF_EACH_KERNEL = ["ct4", "Q8_0", "Q4_K"] if FEW else list(PRODUCTS)


def check_product(packed: Packed, x: torch.Tensor, launch: Launch | None = None) -> None:
    """Of x and the matrix, against the product in float64."""
    weight = torch.empty(packed.rows, packed.width)
    unpack_rows(packed, 0, packed.rows, weight)
    expected = (x.double() @ weight.double().t()).float()
    packed, x = cases.on(packed, DEVICE), x.to(DEVICE)
    assert launching.multiplies(packed, x)
    found = launching.multiply(packed, x, launch).cpu()
    assert found.dtype == x.dtype
    bound = max(torch.finfo(x.dtype).eps, 1e-6) * expected.abs().max()
    assert (found.float() - expected).abs().max() < bound


def random_x(tokens: int, width: int) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize(
    "tokens", [1, 3, pytest.param(8, marks=of_many)] if interpreted() else range(1, 10)
)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_with_few_tokens_is_that_of_the_unpacked_matrix(name, tokens):
    if tokens == 1 and name not in OF_EACH_KERNEL:
        pytest.skip("one of many")
    packed = PRODUCTS[name]
    for dtype in DTYPES if tokens < 3 else DTYPES[-1:]:
        check_product(packed, random_x(tokens, packed.width).to(dtype))


def product_launch(name: str, tile: tuple[int, int], warps: int) -> Launch:
    return Launch(launching.PRODUCTS[PRODUCTS[name].format].kernel, tile, warps)


TILES = [((1, 128), 4), ((2, 32), 1), ((4, 64), 1)]


@pytest.mark.parametrize("name", OF_EACH_KERNEL)
def test_a_product_is_the_same_in_other_tiles(name):
    """A selection: each tile is compiled for each matrix."""
    for tile, warps in TILES:
        launch = product_launch(name, tile, warps)
        check_product(PRODUCTS[name], random_x(1, PRODUCTS[name].width), launch)


@pytest.mark.parametrize("name", OF_EACH_KERNEL)
def test_rows_and_tokens_that_a_program_has_beside_others_change_no_bit(name, monkeypatch):
    packed = cases.on(PRODUCTS[name], DEVICE)
    tokens = 2 if interpreted() else 4
    x = random_x(tokens, packed.width).to(DEVICE)
    alone = torch.cat([launching.multiply(packed, x[i : i + 1]) for i in range(tokens)])
    monkeypatch.setattr(launching, "WARPS", 1)
    assert torch.equal(launching.multiply(packed, x), alone)
    assert torch.equal(launching.multiply(packed, x[:1]), alone[:1])


@pytest.mark.parametrize("rows", [1, 512, 3584, 18944, 152064])
@pytest.mark.parametrize("at_once", [1, 2, 4])
@pytest.mark.parametrize("tile", [((2, 32), 1), ((4, 32), 1), ((2, 128), 4), ((4, 64), 1)])
def test_programs_have_work_for_all_warps_and_no_more_sums_than_fit(rows, at_once, tile):
    (height, pieces), warps = tile
    found = launching.rows_at_once(product_launch("ct4", *tile), rows, at_once)
    assert found & (found - 1) == 0 and found >= 1
    assert at_once * found * pieces <= launching.MOST_SUMS * 32 * warps
    assert found == 1 or rows * warps >= launching.WARPS * found
    assert found <= max(height, launching.MANY_ROWS if at_once > 1 else 0)


@pytest.mark.parametrize("kind", launching.PRODUCTS)
def test_every_tile_has_pieces_for_each_thread(kind):
    own = launching.PRODUCTS[kind]
    tiles = [(own.tile, own.warps), *launching.PRODUCT_ALTERNATIVES]
    assert all(pieces >= 32 * warps for (_, pieces), warps in tiles)


@pytest.mark.parametrize("kind", [pytest.param("ct4", marks=of_many), "ct8"])
def test_a_product_of_columns_goes_by_strides_of_whole_chunks(kind):
    wide = cases.on(cases.integers(kind, 6, 192, 64), DEVICE)
    words = wide.parts["packed"].shape[1]
    parts = {
        "packed": wide.parts["packed"][:, words // 3 :],
        "scale": wide.parts["scale"][:, 1:],
    }
    right = replace(wide, width=128, parts=parts)
    x = random_x(2, 192).to(DEVICE)
    x[:, :64] = 0
    expected = launching.multiply(wide, x)
    found = launching.multiply(right, x[:, 64:].contiguous())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    odd = torch.zeros(6, words + 1, dtype=torch.int32, device=DEVICE)[:, :words]
    assert not launching.multiplies(replace(wide, parts=wide.parts | {"packed": odd}), x)


@pytest.mark.parametrize("bias_dtype", DTYPES[:1] if FEW else DTYPES, ids=str)
@pytest.mark.parametrize("name", ["ct4, channel", "Q8_0"])
def test_a_bias_is_added_to_the_rounded_product(name, bias_dtype):
    packed = cases.on(PRODUCTS[name], DEVICE)
    bias = 9 * torch.randn(packed.rows, generator=torch.Generator().manual_seed(0))
    bias = bias.to(bias_dtype).to(DEVICE)
    for dtype in DTYPES[-1:] if FEW else DTYPES:
        x = random_x(2, packed.width).to(dtype).to(DEVICE)
        expected = launching.multiply(packed, x).add_(bias)
        assert torch.equal(launching.multiply(packed, x, bias_N=bias), expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [64, 80])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotated_heads_are_plain_torchs_bit_for_bit(width, interleaved, dtype):
    random = torch.Generator().manual_seed(width)
    tokens, counts = 3, (5, 2)
    table = torch.rand(2, tokens + 2, width // 2, generator=random).to(DEVICE)[:, 1:-1] * 2 - 1
    heads = [torch.randn(tokens, count * width, generator=random) for count in counts]
    heads = [y.to(dtype).to(DEVICE).view(tokens, -1, width).transpose(0, 1) for y in heads]
    expected = [plain_rotate(x, table, interleaved=interleaved) for x in heads]
    found = launching.launch_rotate(heads, table, interleaved=interleaved)
    found += launching.launch_rotate(heads[1:], table, interleaved=interleaved)
    for one, other in zip(found, [*expected, expected[1]], strict=True):
        assert one.is_contiguous() and torch.equal(one, other)


@pytest.mark.parametrize("width", [64, 100, 896])
@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=["float32", "its own"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_of_a_sum_is_plain_torchs(width, weight_dtype, dtype):
    random = torch.Generator().manual_seed(width)
    x, added = torch.randn(2, 3, width, generator=random).to(dtype).to(DEVICE)
    weight = torch.randn(width, generator=random).to(weight_dtype or dtype).to(DEVICE)
    total, normed = launching.launch_norm(x, added, weight, 1e-5)
    assert torch.equal(total, x + added)
    expected = fused.plain_rms_norm(x + added, weight, 1e-5)
    tolerance = {"rtol": max(2 * torch.finfo(dtype).eps, 2e-6), "atol": 1e-7}
    torch.testing.assert_close(normed, expected, **tolerance)
    same, normed = launching.launch_norm(x, None, weight, 1e-5)
    assert same is x
    torch.testing.assert_close(normed, fused.plain_rms_norm(x, weight, 1e-5), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_is_plain_torchs(dtype):
    random = torch.Generator().manual_seed(0)
    gate, up = (8 * torch.randn(2, 3, 700, generator=random)).to(dtype).to(DEVICE)
    gate[0, :4] = torch.tensor([0.0, -0.0, 60.0, -60.0])
    expected = F.silu(gate) * up
    found = launching.launch_swiglu(gate, up)
    assert found is gate
    torch.testing.assert_close(
        found, expected, rtol=max(2 * torch.finfo(dtype).eps, 2e-6), atol=1e-6
    )


@pytest.mark.skipif(interpreted(), reason="needs 5 GB of a GPU")
def test_more_than_two_to_the_31_weights_are_counted_right():
    rows, width = 1 << 16, 1 << 15
    packed = cases.blocks("Q8_0", 64, width)
    raw = packed.parts["raw"].to(DEVICE).repeat(rows // 64 + 1, 1)
    tall = replace(packed, rows=len(raw), parts={"raw": raw})
    out = torch.empty(len(raw), width, dtype=torch.bfloat16, device=DEVICE)
    unpacking.launch_unpack(tall, 0, len(raw), out)
    expected, _ = unpack_both(packed, (0, 64), torch.bfloat16)
    assert torch.equal(out[-64:].cpu(), expected)
