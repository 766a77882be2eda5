"""Experts found in layers: each layout, what is none, what is refused, what has to be read."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from checkpoints import random_tensor, tensor_bytes, write_gguf
from expert_layouts import PREFIX, Written, assert_banks, bytes_of, experts_of, layer_of
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from layer_streamer.checkpoint.experts import (
    MAX_EXPERTS,
    ExpertLayer,
    expert_extents,
    split_experts,
)
from layer_streamer.checkpoint.formats import read_manifest
from layer_streamer.checkpoint.manifest import LayerSpec, TensorSpec
from layer_streamer.errors import CheckpointError, ConfigError

DTYPES = st.sampled_from([torch.bfloat16, torch.float32, torch.uint8, torch.int32, torch.int8])
SHARED = [
    ("mlp.gate.weight", 5, 8), ("mlp.gate.e_score_correction_bias", 5), ("mlp.router.bias", 5),
    ("mlp.experts.router.weight", 5, 8), ("mlp.experts.e_score_correction_bias", 5),
    ("mlp.shared_expert.up_proj.weight", 5, 8), ("mlp.shared_experts.0.w1.weight", 5, 8),
    ("mlp.shared_expert_gate.weight", 1, 8), ("mlp.expert_bias", 5), ("mlp.experts.act_scale",),
    ("self_attn.q_proj.weight", 8, 8), ("mlp.sconv.weight", 8, 1, 4),
]  # fmt: skip
"""What all experts share, or what has nothing to do with them."""


@st.composite
def written(draw: st.DrawFn) -> Written:
    """A layer in any layout: experts by themselves, stacked, or partly this and partly that."""
    layer = Written()
    count = draw(st.integers(1, 13))
    place = draw(st.sampled_from(["mlp.", "block_sparse_moe.", "", "feed_forward.moe."]))
    names = st.sampled_from([
        "w1.weight", "w2.weight", "gate_proj.weight_scale_inv", "up_proj.qweight",
        "up_proj.qzeros", "down_proj.bias", "down_proj.weight_packed",
    ])  # fmt: skip
    shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)
    for seed, name in enumerate(draw(st.lists(names, max_size=4, unique=True))):
        layer.add_alone(place, name, experts_of(count, draw(shapes), draw(DTYPES), seed))
    for seed in range(draw(st.integers(0 if layer.banks else 1, 3))):
        # A first dimension alone says nothing: one at least has two more.
        shape = draw(shapes) if layer.banks else (2, *draw(shapes), 3)
        tensors = experts_of(count, shape, draw(DTYPES), 10 + seed)
        layer.add_stacked(f"{place}experts.stacked_{seed}", tensors)
    for key, *shape in draw(st.lists(st.sampled_from(SHARED), unique=True)):
        layer.add_dense(key, *shape)
    return layer


@given(layer=written(), files=st.integers(1, 3))
def test_every_expert_is_found_with_its_bytes_and_the_rest_stays(
    tmp_path_factory: pytest.TempPathFactory, layer: Written, files: int
) -> None:
    spec = layer_of(tmp_path_factory.mktemp("experts"), layer.tensors, files)
    dense, experts = split_experts(spec)
    assert set(dense.tensors) == layer.dense
    assert all(dense.tensors[key] is spec.tensors[key] for key in layer.dense)
    assert_banks(experts, layer.banks)
    assert experts is not None and experts.nbytes + dense.nbytes == spec.nbytes


@given(layer=written(), files=st.integers(1, 3))
def test_the_extents_of_an_expert_are_its_bytes_each_once_and_none_adjoins_another(
    tmp_path_factory: pytest.TempPathFactory, layer: Written, files: int
) -> None:
    spec = layer_of(tmp_path_factory.mktemp("extents"), layer.tensors, files)
    _, experts = split_experts(spec)
    assert experts is not None
    for index in range(experts.num_experts):
        found = expert_extents(experts, index)
        places = [(e.path, at) for e in found for at in range(e.offset, e.offset + e.nbytes)]
        wanted = [
            (s.path, at)
            for s in experts.expert(index).tensors.values()
            for at in range(s.offset, s.offset + s.nbytes)
        ]
        assert sorted(places) == sorted(wanted)
        ends = {(e.path, e.offset + e.nbytes) for e in found}
        assert ends.isdisjoint((e.path, e.offset) for e in found)


def test_what_lies_side_by_side_is_one_extent_and_another_experts_bytes_end_it() -> None:
    here, there = Path("a.safetensors"), Path("b.safetensors")

    def spec(offset: int, path: Path = here) -> TensorSpec:
        return TensorSpec("w", torch.uint8, (10,), path, offset, 10)

    banks = {
        "gate": (spec(0), spec(30)), "up": (spec(10), spec(50)), "down": (spec(20), spec(40)),
        "scale": (spec(60), spec(60, there)),
    }  # fmt: skip
    experts = ExpertLayer(0, 2, banks)
    first, second = (expert_extents(experts, index) for index in range(2))
    assert [(e.path, e.offset, e.nbytes) for e in first] == [(here, 0, 30), (here, 60, 10)]
    assert [(e.path, e.offset, e.nbytes) for e in second] == [(here, 30, 30), (there, 60, 10)]


def test_experts_of_gpt_oss_as_it_is_published_have_blocks_scales_and_biases(
    tmp_path: Path,
) -> None:
    layer, shapes = Written(), {"gate_up": (12, 2), "down": (6, 1)}
    for seed, (name, (rows, blocks)) in enumerate(shapes.items()):
        key = f"mlp.experts.{name}_proj_"
        layer.add_stacked(f"{key}blocks", experts_of(5, (rows, blocks, 16), torch.uint8, seed))
        layer.add_stacked(f"{key}scales", experts_of(5, (rows, blocks), torch.uint8, 5 + seed))
        layer.add_stacked(f"{key}bias", experts_of(5, (rows,), torch.bfloat16, 9 + seed))
    layer.add_dense("mlp.router.weight", 5, 8)
    layer.add_dense("mlp.router.bias", 5)
    dense, experts = split_experts(layer_of(tmp_path, layer.tensors))
    assert set(dense.tensors) == layer.dense
    assert_banks(experts, layer.banks)


def test_a_layer_without_experts_is_handed_back_as_it_is() -> None:
    tensors = {"mlp.shared_experts.up_proj.weight": spec_of("mlp.shared_experts.up_proj.weight")}
    layer = LayerSpec(3, tensors)
    assert split_experts(layer) == (layer, None)


def test_flat_matrices_of_many_experts_rows_are_no_experts() -> None:
    """Their first dimension would be taken for the number of experts."""
    names = ("ffn.experts.mlp.w1", "ffn.experts.mlp.v1")
    layer = LayerSpec(0, {name: spec_of(name, (64, 8)) for name in names})
    assert split_experts(layer) == (layer, None)


def spec_of(key: str, shape: tuple[int, ...] = (4,)) -> TensorSpec:
    count = int(np.prod(shape))
    return TensorSpec(PREFIX + key, torch.uint8, shape, Path("model.safetensors"), 0, count)


def alone(count: int, *names: str) -> dict[str, TensorSpec]:
    keys = [f"mlp.experts.{e}.{name}" for e in range(count) for name in names]
    return {key: spec_of(key, (2, 3)) for key in keys}


def refused(tensors: dict[str, TensorSpec]) -> str:
    with pytest.raises(CheckpointError) as caught:
        split_experts(LayerSpec(7, tensors))
    return str(caught.value)


@given(count=st.integers(2, 9), data=st.data())
def test_an_expert_that_lacks_one_tensor_is_named(count: int, data: st.DataObject) -> None:
    tensors = alone(count, "up_proj.weight", "down_proj.weight")
    # All of the last expert's would only mean that there are fewer.
    gone = data.draw(st.integers(0, count - 1))
    del tensors[f"mlp.experts.{gone}.down_proj.weight"]
    said = refused(tensors)
    assert said.startswith(f"model.safetensors: layer 7: tensor '{PREFIX}mlp.experts.")
    assert f"expert {gone} lacks 'mlp.experts.down_proj.weight': {count - 1} of {count}" in said


def test_an_expert_that_is_missing_altogether_is_named() -> None:
    tensors = alone(5, "w1")
    del tensors["mlp.experts.3.w1"]
    assert "expert 3 lacks 'mlp.experts.w1': 4 of 5 experts have it" in refused(tensors)


@given(count=st.integers(3, 9), data=st.data())
def test_an_expert_of_another_shape_or_dtype_is_named_with_expected_and_got(
    count: int, data: st.DataObject
) -> None:
    tensors = alone(count, "w1")
    odd = data.draw(st.integers(0, count - 1))
    other = data.draw(st.sampled_from([{"shape": (3, 2)}, {"dtype": torch.int8}]))
    key = f"mlp.experts.{odd}.w1"
    tensors[key] = replace(tensors[key], **other)
    got = f"{'int8' if 'dtype' in other else 'uint8'} of shape {list(tensors[key].shape)}"
    assert refused(tensors) == (
        f"model.safetensors: layer 7: tensor '{PREFIX}{key}': expert {odd}: "
        f"expected uint8 of shape [2, 3], got {got}"
    )


def test_tensors_stacked_of_different_numbers_of_experts_are_refused() -> None:
    shapes = {"up": (4, 2, 3), "down": (4, 3, 2), "up_scales": (5, 2)}
    tensors = {f"mlp.experts.{name}": spec_of(name, shape) for name, shape in shapes.items()}
    said = refused(tensors)
    assert "layer 7: tensor" in said and "up_scales" in said
    assert "expected 4 experts, got 5 uint8 of shape [5, 2]" in said


def test_experts_in_two_places_of_a_layer_are_refused_by_name() -> None:
    other = {
        f"vision.experts.{expert}.w": spec_of(f"vision.experts.{expert}.w") for expert in (0, 1)
    }
    said = refused({**alone(2, "w"), **other})
    assert said == (
        "model.safetensors: layer 7: experts in 2 places, such as tensors "
        f"'{PREFIX}mlp.experts.0.w' and '{PREFIX}vision.experts.0.w'"
    )
    both = {**alone(2, "w"), "ffn_up_exps.weight": spec_of("ffn_up_exps.weight", (2, 3, 4))}
    assert f"2 places, such as tensors '{PREFIX}ffn_up_exps.weight' and" in refused(both)


def test_more_experts_than_any_model_has_are_refused_before_any_is_looked_at() -> None:
    key = "mlp.experts.w"
    stacked = {key: spec_of(key, (MAX_EXPERTS + 1, 1, 0))}
    assert f"{MAX_EXPERTS + 1} experts, more than {MAX_EXPERTS}" in refused(stacked)
    one = {**alone(1, "w"), "mlp.experts.999999999.w": spec_of("w", (2, 3))}
    assert f"expert 999999999, more than {MAX_EXPERTS} experts" in refused(one)


@pytest.mark.parametrize("index", [-1, 3])
def test_an_expert_that_there_is_not_cannot_be_asked_for(index: int) -> None:
    _, experts = split_experts(LayerSpec(7, alone(3, "w")))
    assert experts is not None
    with pytest.raises(ConfigError, match=rf"expert={index}: must be from 0 to 2 in layer 7"):
        expert_extents(experts, index)


@given(
    count=st.integers(1, 5), nbytes=st.integers(1, 6),
    cuts=st.lists(st.integers(1, 29), max_size=6, unique=True),
)  # fmt: skip
def test_a_stacked_tensor_of_pieces_is_cut_wherever_its_experts_end(
    tmp_path_factory: pytest.TempPathFactory, count: int, nbytes: int, cuts: list[int]
) -> None:
    """As where a module has stacked what its checkpoint keeps apart."""
    path = tmp_path_factory.mktemp("pieces") / "bytes"
    total = count * nbytes
    content = random_tensor((total,), torch.uint8)
    edges = sorted({0, *(cut for cut in cuts if cut < total), total})
    spans = list(pairwise(edges))
    # The last piece lies first in the file.
    data, pieces = b"", []
    for begin, end in reversed(spans):
        pieces.insert(
            0, TensorSpec("piece", torch.uint8, (end - begin,), path, len(data), end - begin)
        )
        data += tensor_bytes(content[begin:end])
    path.write_bytes(data)
    joined = replace(
        pieces[0], name="mlp.experts.w", shape=(count, nbytes, 1), nbytes=total,
        pieces=tuple(pieces) if len(pieces) > 1 else (),
    )  # fmt: skip
    _, experts = split_experts(LayerSpec(0, {"mlp.experts.w": joined}))
    parts = list(content.view(count, nbytes, 1))
    assert_banks(experts, {"mlp.experts.w": parts})
    assert experts is not None
    for index, part in enumerate(parts):
        spec = experts.banks["mlp.experts.w"][index]
        assert (spec.path, spec.offset) == (spec.extents[0].path, spec.extents[0].offset)
        assert sum(e.nbytes for e in expert_extents(experts, index)) == part.nbytes


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q8_0])
def test_experts_of_a_real_gguf_file_are_slices_of_its_rows(
    tmp_path: Path, kind: GGMLQuantizationType
) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = {
        name: random_tensor((6, 3, 512 // block * size), torch.uint8, seed=seed)
        for seed, name in enumerate(("gate", "up", "down"))
    }
    bias = random_tensor((6, 7), torch.float32, seed=9)
    flat = np.zeros(32, np.float32)
    dense = {
        "ffn_gate_inp.weight": np.zeros((6, 32), np.float32), "exp_probs_b.bias": flat[:6],
        "ffn_up_shexp.weight": np.zeros((4, 32), np.float32), "ffn_norm_exps.weight": flat,
        "ffn_gate_inp_shexp.weight": flat, "attn_norm.weight": flat,
    }  # fmt: skip
    tensors = {f"blk.0.{key}": value for key, value in dense.items()}
    packed = {f"blk.0.ffn_{name}_exps.weight": (t.numpy(), kind) for name, t in rows.items()}
    path = write_gguf(
        tmp_path / "m.gguf",
        {**tensors, **packed, "blk.0.ffn_down_exps.bias": bias.numpy()},
    )
    rest, experts = split_experts(read_manifest(path).layers[0])
    assert set(rest.tensors) == set(dense)
    banks = {f"ffn_{name}_exps.weight": list(tensor) for name, tensor in rows.items()}
    assert_banks(experts, {**banks, "ffn_down_exps.bias": list(bias)})
    assert experts is not None
    kinds = {bank: specs[0].ggml_type for bank, specs in experts.banks.items()}
    assert kinds == {"ffn_down_exps.bias": "F32", **dict.fromkeys(banks, kind.name)}


def test_an_experts_own_layer_has_its_banks_and_nothing_else(tmp_path: Path) -> None:
    written = Written()
    written.add_alone("mlp.", "w", experts_of(4, (3, 2), torch.float32))
    written.add_dense("norm", 8)
    _, experts = split_experts(layer_of(tmp_path, written.tensors))
    assert experts is not None
    one = experts.expert(2)
    assert (one.layer_idx, list(one.tensors)) == (0, ["mlp.experts.w"])
    assert one.nbytes == experts.expert_nbytes == 24
    assert bytes_of(one.tensors["mlp.experts.w"]) == tensor_bytes(written.banks["mlp.experts.w"][2])
    assert re.fullmatch(r"model\.layers\.0\.mlp\.experts\.2\.w", one.tensors["mlp.experts.w"].name)
