"""Packed matrices of safetensors checkpoints against the packages that define their formats."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packings import FP8, PACKINGS, Packing, Tensors
from paths import TESTS
from safetensors.torch import load_file, save_file
from test_llm_dequant import equal_bits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layer_streamer import read_manifest
from layer_streamer.llm.weights import dequant
from layer_streamer.llm.weights.dequant import Unpacker, Widest
from layer_streamer.llm.weights.finder import Finder
from layer_streamer.llm.weights.packed import Packed, scales, take_rows, unpack_rows
from layer_streamer.llm.weights.quantization import read_quantization
from layer_streamer.llm.weights.stored import Stored

CPU = torch.device("cpu")
MODULE = "self_attn.q_proj"
EXTREME = (0.0, -0.0, 6e-8, 6.1e-5, -65504.0, float("inf"), float("nan"))
packings = st.sampled_from(sorted(PACKINGS))
ROW_PACKED = [
    name for name in PACKINGS if not name.startswith(("awq", "gptq")) and "act" not in name
]


def locate(path: Path, tensors: Tensors, shape: tuple[int, int], packing: Packing) -> Stored:
    """The matrix as the engine finds it in a file with these tensors."""
    prefix = f"model.layers.0.{MODULE}."
    save_file({prefix + kind: tensor for kind, tensor in tensors.items()}, path)
    scheme = read_quantization(packing.config).scheme(prefix[:-1])
    return Finder(read_manifest(path).layers[0].tensors, "layer 0").find(MODULE, shape, scheme)


def matrix(path: Path, packing: Packing, tensors: Tensors, shape: tuple[int, int]) -> Packed:
    stored = locate(path, tensors, shape, packing)
    return stored.packed({f"{MODULE}.{kind}": tensor for kind, tensor in tensors.items()})


def unpacked(packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.empty(packed.rows, packed.width, dtype=dtype)
    unpack_rows(packed, 0, packed.rows, out)
    return out


def make(tmp_path: Path, name: str, shape=(80, 96), seed: int = 0) -> tuple[Packed, torch.Tensor]:
    """A random matrix and what its oracle finds in it."""
    generator, packing = torch.Generator().manual_seed(seed), PACKINGS[name]
    tensors = packing.pack(torch.randn(shape, generator=generator) * 0.2, generator)
    return matrix(tmp_path / "m.safetensors", packing, tensors, shape), packing.unpack(tensors)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packed")


@settings(deadline=None, max_examples=100)
@given(packings, st.integers(2, 9), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_unpacked_matrices_equal_their_oracle_bit_for_bit(folder, name, rows, columns, seed):
    packed, expected = make(folder, name, (8 * rows, 96 * columns), seed)
    assert equal_bits(unpacked(packed), expected.numpy())


def scramble(tensors: Tensors, generator: torch.Generator) -> None:
    """Any bits for codes and zero points, any scale."""
    for kind, tensor in tensors.items():
        if "g_idx" in kind or kind == "weight_shape":
            continue
        if "scale" not in kind and tensor.dtype == torch.int32:
            tensor.random_(-(2**31), 2**31 - 1, generator=generator)
        elif "scale" not in kind:
            tensor.view(torch.uint8).random_(0, 256, generator=generator)
        elif tensor.dtype == torch.float8_e8m0fnu:
            raw = tensor.view(torch.uint8)
            raw.copy_(torch.arange(raw.numel()).view(raw.shape) * 51 % 256)
        else:
            picks = torch.randint(0, len(EXTREME), tensor.shape, generator=generator)
            tensor.copy_(torch.tensor(EXTREME)[picks])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PACKINGS)
def test_any_codes_under_extreme_scales_equal_their_oracle_bit_for_bit(tmp_path, name, seed):
    generator, packing = torch.Generator().manual_seed(seed), PACKINGS[name]
    tensors = packing.pack(torch.randn(80, 96, generator=generator), generator)
    scramble(tensors, generator)
    packed = matrix(tmp_path / "m.safetensors", packing, tensors, (80, 96))
    assert equal_bits(unpacked(packed), packing.unpack(tensors).numpy())


@pytest.mark.parametrize("name", [n for n in ROW_PACKED if "channel" in n])
@pytest.mark.parametrize("shape", [(5, 9), (13, 30), (3, 65)])
def test_rows_that_fill_no_whole_words_equal_their_oracle(tmp_path, name, shape):
    packed, expected = make(tmp_path, name, shape)
    assert equal_bits(unpacked(packed), expected.numpy())


@pytest.mark.parametrize("shape", [(80, 96), (33, 49), (31, 47), (64, 100)])
def test_blocks_of_fp8_that_are_cut_off_equal_their_oracle(tmp_path, shape):
    packed, expected = make(tmp_path, "fp8-blocks", shape)
    assert equal_bits(unpacked(packed), expected.numpy())


def test_every_fp8_number_is_what_its_bits_say():
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    found = unpacked(
        Packed(
            format="fp8",
            rows=1,
            width=256,
            parts={"weight": codes, "scale": torch.ones(1, 1)},
        )
    )
    for code in range(256):
        sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
        value = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
        if code & 127 == 127:
            value = float("nan")
        assert np.array_equal(found[0, code], -value if sign else value, equal_nan=True)


def test_every_power_of_two_of_a_scale_is_what_its_byte_says():
    exponents = torch.arange(256, dtype=torch.uint8).view(256, 1)
    ones = torch.ones(256, 1).to(FP8).view(torch.uint8)
    parts = {"weight": ones, "scale": exponents}
    found = unpacked(Packed(format="fp8", rows=256, width=1, parts=parts))[:, 0].double()
    expected = torch.ldexp(torch.ones(256).double(), torch.arange(256) - 127)
    assert torch.equal(found[:255], expected[:255])
    assert found[255].isnan()


GPTQ = load_file(TESTS / "data/gptq.safetensors")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["group16.in_order", "group16.act_order", "group-1.in_order"])
def test_gptq_equals_another_implementation_bit_for_bit(tmp_path, bits, kind, version):
    name = f"bits{bits}.{kind}."
    start = f"{name}v{version}."
    tensors = {k.removeprefix(start): t for k, t in GPTQ.items() if k.startswith(start)}
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": int(kind.partition(".")[0][5:]),
        "desc_act": "act_order" in kind,
        "checkpoint_format": ("gptq", "gptq_v2")[version - 1],
    }
    packing = Packing(config, lambda *_: {}, lambda _: torch.empty(0))
    found = unpacked(matrix(tmp_path / "m.safetensors", packing, tensors, (32, 64)))
    assert torch.equal(found, GPTQ[f"{name}weight"])


@settings(deadline=None, max_examples=60)
@given(packings, st.data())
def test_any_range_of_rows_is_that_part_of_the_matrix(folder, name, data):
    packed, expected = make(folder, name)
    step = 8 if name.startswith("awq") else 1
    start = step * data.draw(st.integers(0, 80 // step - 1))
    end = step * data.draw(st.integers(start // step + 1, 80 // step))
    out = torch.empty(end - start, 96)
    unpack_rows(packed, start, end, out)
    assert equal_bits(out, expected[start:end].numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PACKINGS)
def test_a_narrower_dtype_is_the_float32_value_rounded_once(tmp_path, name, dtype):
    packed, expected = make(tmp_path, name)
    assert torch.equal(unpacked(packed, dtype), expected.to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("name", PACKINGS)
def test_a_gpu_unpacks_the_same_bits(tmp_path, name):
    packed, expected = make(tmp_path, name)
    out = torch.empty(80, 96, device="cuda")
    unpack_rows(packed.to(torch.device("cuda")), 0, 80, out)
    assert equal_bits(out.cpu(), expected.numpy())


class Sizes(TorchDispatchMode):
    """The largest tensor that is allocated while this is entered, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if is_it(t)}
        for tensor in filter(is_it, tree_leaves(found)):
            if tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return found


is_it = partial(lambda kind, value: isinstance(value, kind), torch.Tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PACKINGS)
def test_unpacking_makes_nothing_that_is_nearly_as_large_as_the_weights(
    tmp_path, monkeypatch, name, dtype
):
    monkeypatch.setattr(dequant, "_CPU_ELEMENTS", 8 * 768)
    packed, expected = make(tmp_path, name, (32, 768))
    widest = Widest.of([(packed.format, packed.width, "g_idx" not in packed.parts)])
    unpacker, places = Unpacker(CPU, dtype, widest), set()
    for start, end, rows in unpacker.blocks(packed):
        assert end - start == 8 and torch.equal(rows, expected[start:end].to(dtype))
        places.add(rows.data_ptr())
    assert len(places) == 1
    with Sizes() as sizes:
        assert len(list(unpacker.blocks(packed))) == 4
    assert sizes.largest <= 8 * 768 * 4 // 8
    with Sizes() as sizes:
        unpack_rows(packed, 0, 8, expected[:8].clone())  # what it makes must be seen
    assert sizes.largest >= 8 * 768 * 4


@pytest.mark.parametrize("name", [n for n in ROW_PACKED])
def test_rows_of_an_embedding_are_taken_in_any_order(tmp_path, name):
    packed, expected = make(tmp_path, name)
    ids = torch.tensor([79, 0, 5, 5, 64, 33, 7])
    assert equal_bits(unpacked(take_rows(packed, ids)), expected[ids].numpy())


@pytest.mark.parametrize("name", [n for n in ROW_PACKED])
@pytest.mark.parametrize(("first", "last"), [(0, 80), (0, 13), (13, 50), (50, 80)])
def test_a_piece_of_a_head_is_those_rows_of_it(tmp_path, name, first, last):
    generator, packing = torch.Generator().manual_seed(0), PACKINGS[name]
    tensors = packing.pack(torch.randn(80, 96, generator=generator), generator)
    stored = locate(tmp_path / "m.safetensors", tensors, (80, 96), packing)
    named = {f"{MODULE}.{kind}": tensor for kind, tensor in tensors.items()}
    named[stored.key] = named[stored.key][first:last]
    piece = stored.packed(named, first_row=first)
    assert equal_bits(unpacked(piece), packing.unpack(tensors)[first:last].numpy())


@pytest.mark.parametrize("name", PACKINGS)
def test_scales_are_found_where_they_are(tmp_path, name):
    packed, _ = make(tmp_path, name)
    (scale,) = scales(packed)
    assert scale is packed.parts["scale"]
