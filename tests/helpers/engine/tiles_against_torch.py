"""Products on tensor cores against plain torch: run by test_llm_tiles.py, in a process of its own.

As in ``kernels_against_torch``: in Triton's interpreter, or compiled, on a GPU.
"""

from dataclasses import replace

import packed_cases as cases
import pytest
import torch
from triton_runs import FEW

from layer_streamer.llm.kernel_timing import random_matrix
from layer_streamer.llm.kernels import tiles
from layer_streamer.llm.kernels.triton_support import interpreted
from layer_streamer.llm.weights.packed import Packed, unpack_rows

DEVICE = torch.device("cpu" if interpreted() else "cuda")
DTYPES = [torch.float16] + ([] if interpreted() else [torch.bfloat16])
HALF = 0x2C11
"""A float16 scale of 0.0635: no weight is beyond float16."""
ROWS = 70
"""No multiple of what a program has."""
compiled = pytest.mark.skipif(interpreted(), reason="of compiled kernels")


def blocks(kind: str, rows: int, width: int) -> Packed:
    return cases.with_scales(cases.blocks(kind, rows, width), HALF)


MATRICES = {
    "Q4_K": blocks("Q4_K", ROWS, 512),
    "Q6_K": blocks("Q6_K", ROWS, 256),
    "Q4_0": blocks("Q4_0", ROWS, 160),
    "Q8_0": blocks("Q8_0", ROWS, 160),
    "ct4, group 32": cases.integers("ct4", ROWS, 160, 32, dtype=torch.float16),
    "ct4, group 64": cases.integers("ct4", ROWS, 192, 64, dtype=torch.float32),
    "ct4, group 128": cases.integers("ct4", ROWS, 256, 128),
    "ct4, channel": cases.integers("ct4", ROWS, 96),
    "ct8": cases.integers("ct8", ROWS, 256, 128, dtype=torch.float16),
    "ct8, channel": cases.integers("ct8", ROWS, 96),
    "Q4_K, split": blocks("Q4_K", 3, 2560),
    "Q8_0, split": blocks("Q8_0", 3, 1376),
    "ct4, split": cases.integers("ct4", 3, 1376, 32),
}


def rows_of(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The weights as unpacking has them, (rows, width)."""
    weight = torch.empty(packed.rows, packed.width, dtype=dtype)
    unpack_rows(packed, 0, packed.rows, weight)
    return weight


def random_x(tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def product(packed: Packed, x: torch.Tensor, **options: object) -> torch.Tensor:
    packed, x = cases.on(packed, DEVICE), x.to(DEVICE)
    assert tiles.multiplies(packed, x)
    found = tiles.multiply(packed, x, **options)  # type: ignore[arg-type]
    assert found.dtype == x.dtype and found.shape == (len(x), packed.rows)
    return found.cpu()


def check_product(packed: Packed, x: torch.Tensor, **options: object) -> None:
    """Against the product of the same rounded weights in float64, by the size of its terms."""
    weight = rows_of(packed, x.dtype).double()
    expected = x.double() @ weight.t()
    terms = x.double().abs() @ weight.abs().t()
    error = (product(packed, x, **options).double() - expected).abs()
    half_ulp = torch.finfo(x.dtype).eps / 2
    assert (error <= 1.01 * half_ulp * expected.abs() + 2**-20 * terms).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MATRICES)
def test_weights_in_a_tile_are_those_of_unpacked_rows(name, dtype):
    packed = MATRICES[name]
    columns = torch.arange(packed.width)
    if name.endswith("split"):  # where shares begin and end is where they could go wrong
        columns = torch.cat([columns[at : at + 8] for at in range(0, packed.width, 312)])
    units = torch.eye(packed.width, dtype=dtype)[columns]
    found = torch.cat([product(packed, some) for some in units.split(64)])
    assert torch.equal(found.t(), rows_of(packed, dtype)[:, columns])


@pytest.mark.parametrize("tokens", [1, 17, 70] if FEW else [1, 5, 16, 17, 33, 70])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q4_0", "Q8_0", "ct4, group 32", "ct8"])
def test_a_product_is_that_of_the_rounded_weights(name, tokens):
    for dtype in DTYPES:
        check_product(MATRICES[name], random_x(tokens, MATRICES[name].width, dtype))


@pytest.mark.parametrize("name", ["Q4_K, split", "Q8_0, split", "ct4, split"])
def test_a_product_whose_columns_are_split_is_that_of_the_rounded_weights(name):
    packed = MATRICES[name]
    assert tiles.splits_of(packed.rows, packed.width) > 1
    for dtype in DTYPES:
        check_product(packed, random_x(19, packed.width, dtype))


@pytest.mark.parametrize("bias_dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("name", ["ct4, channel", "Q8_0, split"])
def test_a_bias_is_added_to_the_rounded_product(name, bias_dtype):
    packed = MATRICES[name]
    bias = 9 * torch.randn(packed.rows, generator=torch.Generator().manual_seed(0))
    bias = bias.to(bias_dtype)
    for dtype in DTYPES:
        x = random_x(6, packed.width, dtype)
        expected = product(packed, x).add_(bias)
        assert torch.equal(product(packed, x, bias_N=bias.to(DEVICE)), expected)


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "ct4, group 128"])
def test_a_piece_of_the_rows_has_their_products(name):
    packed = MATRICES[name]
    x = random_x(9, packed.width, DTYPES[-1])
    parts = {part: whole[34:] for part, whole in packed.parts.items()}
    piece = replace(packed, rows=ROWS - 34, parts=parts, first_row=34)
    assert torch.equal(product(piece, x), product(packed, x)[:, 34:])


@pytest.mark.parametrize("kind", ["ct4", "ct8"])
def test_a_piece_of_the_columns_goes_by_strides_of_whole_chunks(kind):
    wide = cases.integers(kind, 6, 192, 64)
    words = wide.parts["packed"].shape[1]
    parts = {"packed": wide.parts["packed"][:, words // 3 :], "scale": wide.parts["scale"][:, 1:]}
    right = replace(wide, width=128, parts=parts)
    x = random_x(7, 192, DTYPES[-1])
    x[:, :64] = 0
    assert torch.equal(product(right, x[:, 64:].contiguous()).float(), product(wide, x).float())
    odd = torch.zeros(6, words + 1, dtype=torch.int32)[:, :words]
    assert not tiles.multiplies(replace(wide, parts=wide.parts | {"packed": odd}), x)


def test_what_tiles_do_not_serve_is_left_to_others():
    x = random_x(9, 96, torch.float16)
    channel = MATRICES["ct4, channel"]
    assert tiles.multiplies(channel, x)
    assert not tiles.multiplies(channel, x.float())
    assert not tiles.multiplies(channel, x.repeat(1, 2)[:, :96])
    assert not tiles.multiplies(cases.integers("ct4", ROWS, 96, 32, zero=True), x)
    assert not tiles.multiplies(cases.integers("ct4", ROWS, 96, 16), x)
    assert not tiles.multiplies(cases.integers("int8", ROWS, 96), x)
    columns = torch.arange(96, dtype=torch.int32)
    assert not tiles.multiplies(replace(channel, parts=channel.parts | {"g_idx": columns}), x)


@pytest.mark.parametrize("name", ["Q4_K", "ct4, group 32"] if interpreted() else MATRICES)
def test_a_product_is_the_same_in_other_shapes(name):
    packed = MATRICES[name]
    for shape in tiles.ALTERNATIVES[2::2] if interpreted() else tiles.ALTERNATIVES:
        check_product(packed, random_x(11, packed.width, DTYPES[-1]), shape=shape)


@pytest.mark.parametrize("rows", [1, 64, 1024, 5120, 18944, 152064])
@pytest.mark.parametrize("width", [32, 640, 1280, 5120, 27648])
def test_shares_of_columns_are_no_more_than_make_work(rows, width):
    splits = tiles.splits_of(rows, width)
    assert splits & (splits - 1) == 0 and splits >= 1
    assert splits == 1 or width >= splits * tiles.LEAST_COLUMNS
    assert splits == 1 or splits * -(-rows // 64) <= tiles.PROGRAMS
    assert splits == 1 or 4 * 64 * splits * rows <= 8 << 20


@compiled
@pytest.mark.parametrize("name", MATRICES)
def test_tokens_beside_others_change_no_bit(name):
    packed = MATRICES[name]
    x = random_x(150, packed.width, torch.bfloat16)
    every = product(packed, x)
    for tokens in (1, 16, 17, 33, 64, 65):
        assert torch.equal(product(packed, x[:tokens]), every[:tokens])


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "ct4, split", "ct4, channel"])
def test_alike_neither_the_tokens_nor_the_rows_at_a_time_decide_a_bit(name):
    packed = MATRICES[name]
    first = packed.rows // 2 - packed.rows // 2 % 2
    parts = {part: whole[first:] for part, whole in packed.parts.items()}
    piece = replace(packed, rows=packed.rows - first, parts=parts, first_row=first)
    for dtype in DTYPES:
        x = random_x(70, packed.width, dtype)
        every = product(packed, x, alike=True)
        for some in (slice(0, 1), slice(69, 70), slice(3, 20)):
            assert torch.equal(product(packed, x[some].clone(), alike=True), every[some])
        assert torch.equal(product(piece, x[:5].clone(), alike=True), every[:5, first:])
        check_product(packed, x[:5].clone(), alike=True)


@compiled
@pytest.mark.parametrize("shape", [(3584, 18944), (5120, 27648), (5120, 5120)])
@pytest.mark.parametrize("kind", tiles.STEPS)
def test_real_matrices_have_the_products_of_unpacked_rows(kind, shape):
    torch.manual_seed(0)
    packed = random_matrix(kind, *shape, DEVICE)
    weight = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    unpack_rows(packed, 0, packed.rows, weight)
    for tokens in (5, 16, 64, 70):
        x = torch.randn(tokens, shape[1], device=DEVICE).bfloat16()
        expected, terms = (
            x.double() @ weight.double().t(),
            x.abs().float() @ weight.abs().float().t(),
        )
        error = (tiles.multiply(packed, x).double() - expected).abs()
        assert (error <= 2**-8 * 1.01 * expected.abs() + 2**-18 * terms).all()
