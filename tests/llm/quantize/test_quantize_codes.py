"""Codes, scales and what they stand for, against compressed-tensors and by their properties."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer.llm.models.config import ModelConfig
from layer_streamer.llm.quantize.codes import code_range, decode, pack_codes, unpack_codes
from layer_streamer.llm.quantize.grouping import choose_groups, quantization_config
from layer_streamer.llm.quantize.matrix import Quantized
from layer_streamer.llm.quantize.scales import GRIDS, Rounding, search_scales

BITS = (4, 8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def scheme(bits: int, group: int) -> QuantizationScheme:
    args = QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group
    )
    return QuantizationScheme(targets=["Linear"], weights=args)


def random_codes(bits: int, rows: int, width: int, seed: int) -> torch.Tensor:
    low, high = code_range(bits)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (rows, width), generator=generator, dtype=torch.int8)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 9), st.integers(1, 70), st.integers(0, 9))
def test_codes_come_back_from_their_words_at_any_width(bits, rows, width, seed):
    codes = random_codes(bits, rows, width, seed)
    words = pack_codes(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, -(-width * bits // 32))
    assert torch.equal(unpack_codes(words, bits, width), codes)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(BITS),
    st.integers(1, 7),
    st.integers(1, 5),
    st.sampled_from((32, 64, 128)),
    st.sampled_from(DTYPES),
    st.integers(0, 9),
)
def test_the_package_unpacks_and_decodes_what_is_packed_here(
    bits, rows, groups, group, dtype, seed
):
    codes = random_codes(bits, rows, groups * group, seed)
    scales = (torch.rand(rows, groups) + 0.01).to(dtype)
    state = {
        "weight_packed": pack_codes(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
    }
    theirs = PackedQuantizationCompressor.decompress(state, scheme(bits, group))["weight"]
    assert torch.equal(theirs, decode(codes, scales).to(dtype))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(BITS),
    st.integers(1, 5),
    st.sampled_from((32, 64, 128)),
    st.sampled_from(DTYPES),
    st.integers(0, 9),
)
def test_weights_that_the_format_can_hold_come_back_exactly(bits, rows, group, dtype, seed):
    codes = random_codes(bits, rows, 2 * group, seed)
    codes[:, ::group] = code_range(bits)[1]  # so that the largest weight tells the scale
    scales = torch.exp2(torch.randint(-9, 3, (rows, 2)).float())
    expected = decode(codes, scales)
    quantized = Quantized(group, Rounding(bits, dtype), None)
    quantized.add(expected)
    found = quantized.tensors(0)
    theirs = PackedQuantizationCompressor.decompress(found, scheme(bits, group))["weight"]
    assert torch.equal(theirs.float(), expected)
    assert quantized.errors.squares == 0.0 and quantized.errors.weights == expected.numel()


def test_rows_that_are_added_in_pieces_give_the_same_words(monkeypatch):
    rows, importance, found = torch.randn(37, 64), torch.rand(64), []
    for block, cuts in ((1 << 18, (37,)), (64 * 3, (5, 1, 31))):
        monkeypatch.setattr("layer_streamer.llm.quantize.matrix.CPU_BLOCK", block)
        quantized = Quantized(32, Rounding(4, torch.bfloat16), importance)
        for part in rows.split(cuts):
            quantized.add(part)
        found.append(quantized.tensors(0))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def weighted_error(groups, importance, scales, rounding):
    error = rounding.codes(groups, scales) * scales[..., None] - groups
    return (error.square() * importance).sum(-1)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(BITS), st.sampled_from(DTYPES), st.integers(0, 99), st.floats(-6, 4))
def test_no_scale_of_the_grid_is_better_than_the_one_found(bits, dtype, seed, size):
    torch.manual_seed(seed)
    groups = torch.randn(7, 2, 32) ** 3 * 10**size
    importance, rounding = torch.rand(2, 32) ** 4, Rounding(bits, dtype)
    found = weighted_error(
        groups, importance, search_scales(groups, importance, rounding), rounding
    )
    largest = groups.abs().amax(-1) / (2 ** (bits - 1) - 1)
    first, last, count = GRIDS[bits]
    for i in range(count):
        tried = rounding.stored(largest * (first + (last - first) * i / (count - 1)))
        error = weighted_error(groups, importance, tried, rounding)
        assert (found <= error * 1.001).all()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from((32, 64, 128)), st.integers(0, 999))
def test_what_counts_more_is_rounded_better(group, seed):
    torch.manual_seed(seed)
    groups, importance = torch.randn(64, 4, group), torch.randn(4, group).exp() ** 2
    rounding = Rounding(4, torch.bfloat16)
    blind = search_scales(groups, None, rounding)
    aware = search_scales(groups, importance, rounding)
    errors = [weighted_error(groups, importance, s, rounding).sum() for s in (aware, blind)]
    assert errors[0] < errors[1]
    plain = [weighted_error(groups, torch.ones(()), s, rounding).sum() for s in (aware, blind)]
    assert plain[1] < plain[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30, -1e30])
def test_groups_of_zeros_and_of_extremes_get_a_scale_that_can_be_used(bits, dtype, value):
    quantized = Quantized(32, Rounding(bits, dtype), None)
    quantized.add(torch.full((2, 64), value))
    scales = quantized.tensors(0)["weight_scale"]
    assert scales.isfinite().all() and (scales != 0).all()
    if value == 0.0:
        assert quantized.errors.largest == 0.0


def sizes(hidden: int, ffn: int) -> ModelConfig:
    return ModelConfig(
        model_type="llama", num_layers=1, hidden_size=hidden, ffn_size=ffn, num_heads=2,
        num_kv_heads=1, head_dim=hidden // 2, vocab_size=9, norm_eps=1e-5, max_positions=9,
        tied_head=False, windows=(None,), ropes=(), attention_scale=1.0, embed_scale=1.0,
        biased=frozenset(), eos_ids=frozenset(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("hidden", "ffn", "asked", "groups"),
    [
        (576, 1536, None, {64, 128}),
        (3584, 18944, None, {128}),
        (576, 1536, 64, {64}),
        (96, 160, None, {32}),
    ],
)
def test_the_largest_group_that_divides_is_taken(hidden, ffn, asked, groups):
    chosen = choose_groups(sizes(hidden, ffn), asked)
    assert set(chosen.values()) == groups and len(chosen) == 7
    widths = {module: ffn if module == "mlp.down_proj" else hidden for module in chosen}
    assert all(widths[module] % group == 0 for module, group in chosen.items())


@pytest.mark.parametrize(
    ("hidden", "ffn", "asked", "message"),
    [
        (576, 1536, 128, "--group 128: does not divide the width of self_attn.q_proj, 576; "
         "--group 64 divides all widths"),
        (128, 96, 64, "--group 64: does not divide the width of mlp.down_proj, 96; "
         "--group 32 divides all widths"),
        (100, 96, None, "self_attn.q_proj has width 100, which none of 128, 64, 32 divides"),
    ],
)  # fmt: skip
def test_a_group_that_does_not_divide_is_refused_with_one_that_does(hidden, ffn, asked, message):
    with pytest.raises(ValueError, match=message):
        choose_groups(sizes(hidden, ffn), asked)


def test_each_module_belongs_to_one_entry_of_the_config():
    config = quantization_config({"a.b_proj": 64, "a.c_proj": 128, "a.d_proj": 64}, 4)
    entries = config["config_groups"].values()
    targets = [target for entry in entries for target in entry["targets"]]
    assert len(set(targets)) == len(targets) == 3
    assert [entry["weights"]["group_size"] for entry in entries] == [128, 64]
    alone = quantization_config({"a.b_proj": 64}, 8)["config_groups"]
    assert [entry["targets"] for entry in alone.values()] == [["Linear"]]
