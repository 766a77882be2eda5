"""Packed checkpoints that are not what their config says, and configs that are not supported."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import edit_weights
from packed_models import write_packed
from packings import PACKINGS, ct_config
from zoo import zoo_model

from layer_streamer import read_manifest
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.errors import UnsupportedModelError
from layer_streamer.llm.metadata import load_config
from layer_streamer.llm.models.names import weight_names
from layer_streamer.llm.weights.quantization import read_quantization
from layer_streamer.llm.weights.scale_check import not_finite
from layer_streamer.transport.weights import Weights

LAYER = "model.layers.1.self_attn.q_proj."
Edit = Callable[[dict[str, torch.Tensor]], Any]


def drop(kind: str) -> Edit:
    return lambda tensors: tensors.pop(LAYER + kind)


def change(kind: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return lambda tensors: tensors.update({LAYER + kind: make(tensors[LAYER + kind]).contiguous()})


def put(kind: str, tensor: torch.Tensor) -> Edit:
    return lambda tensors: tensors.update({LAYER + kind: tensor})


def refuse(path: Path, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        weight_names(read_manifest(path), load_config(path))
    assert "\n" not in str(caught.value)


def first(count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor[:count]


def columns(count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor[:, :count]


FILE = r" \(/.*model.safetensors\)$"
BAD_TENSORS = [
    ("ct4-g32", drop("weight_scale"), "layer 1: tensor 'self_attn.q_proj.weight_scale' is missing; "
     "'model.layers.1.self_attn.q_proj.weight_packed' in /.*model.safetensors is packed and needs"),
    ("ct4-asym-g16", drop("weight_zero_point"), "weight_zero_point' is missing; .* needs it"),
    ("ct4-g32", drop("weight_packed"), "layer 1: tensor 'self_attn.q_proj.weight' is missing"),
    ("ct4-g32", change("weight_packed", columns(7)),
     r"q_proj.weight_packed' has shape \[96, 7\], the config says \[96, 8\]" + FILE),
    ("ct4-g32", change("weight_packed", lambda t: t.view(torch.uint8)), "dtype torch.uint8, its"),
    ("ct4-g32", change("weight_scale", columns(1)), r"\[96, 1\], the config says \[96, 2\]" + FILE),
    ("ct4-g32", change("weight_scale", columns(0)), r"\[96, 0\], the config says \[96, 2\]" + FILE),
    ("ct4-g32", change("weight_scale", lambda t: t.int()), "dtype torch.int32, its config says"),
    ("ct4-g32", put("weight_shape", torch.tensor([96, 63])),
     r"weight_shape' says \[96, 63\], the config says \[96, 64\]" + FILE),
    ("ct4-asym-g16", change("weight_zero_point", first(11)), r"\[11, 4\], the config says \[12, 4"),
    ("ct8-channel", change("weight_scale", first(95)), r"\[95, 1\], the config says \[96, 1\]"),
    ("int8-channel", change("weight", columns(63)), r"\[96, 63\], the config says \[96, 64\]"),
    ("int8-channel", drop("weight_scale"), "weight_scale' is missing"),
    ("int8-asym-g32", change("weight_zero_point", columns(1)), r"\[96, 1\], the config says \[96"),
    ("awq-g32", change("qweight", columns(11)), r"qweight' has shape \[64, 11\], .* \[64, 12\]"),
    ("awq-g32", drop("qzeros"), "qzeros' is missing"),
    ("awq-g32", drop("scales"), "scales' is missing"),
    ("awq-g32", change("scales", first(1)), r"scales' has shape \[1, 96\], .* \[2, 96\]"),
    ("gptq4-g32", change("qweight", first(7)), r"qweight' has shape \[7, 96\], .* \[8, 96\]"),
    ("gptq4-v2-act-order", drop("g_idx"), "g_idx' is missing"),
    ("gptq4-v2-act-order", change("g_idx", lambda t: t + 1), "g_idx' has values from 1 to 4, t"),
    ("gptq4-v2-act-order", change("g_idx", lambda t: t - 1), "values from -1 to 2, there are 4 gr"),
    ("fp8-blocks", drop("weight_scale_inv"), "weight_scale' is missing"),
    ("fp8-blocks", change("weight_scale_inv", first(2)), r"\[2, 2\], the config says \[3, 2\]"),
    ("fp8-channel", change("weight_scale", first(3)), r"\[3, 1\], the config says \[96, 1\]"),
    ("fp8-channel", change("weight", lambda t: t.view(torch.float8_e5m2)), "torch.float8_e5m2"),
    ("fp8-channel", put("scales", torch.ones(3)), "q_proj.scales' is no part of a llama model"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "edit", "message"), BAD_TENSORS)
def test_a_packed_tensor_that_contradicts_its_config_is_named_with_its_file(
    tmp_path, name, edit, message
):
    edit_weights(write_packed(tmp_path, zoo_model("llama"), name), edit)
    refuse(tmp_path, message)


def with_config(path: Path, quantization: dict[str, Any] | None) -> Path:
    """Replace the quantization_config of a checkpoint."""
    fields = json.loads((path / "config.json").read_text())
    fields["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize(
    ("name", "field"),
    [("awq-g32", "group_size"), ("gptq4-g32", "group_size"), ("ct4-g32", None)],
)
def test_a_group_that_does_not_divide_is_named(tmp_path, name, field):
    config = copy.deepcopy(PACKINGS[name].config)
    (config if field else config["config_groups"]["group_0"]["weights"])["group_size"] = 48
    with_config(write_packed(tmp_path, zoo_model("llama"), name), config)
    refuse(tmp_path, "'model.layers.0.self_attn.*group_size of 48, which does not divide 64 colu")


@pytest.mark.parametrize("name", ["ct4-g32", "awq-g32", "fp8-blocks", "int8-channel"])
def test_packed_tensors_without_a_config_are_named(tmp_path, name):
    with_config(write_packed(tmp_path, zoo_model("llama"), name), None)
    refuse(tmp_path, "'model.layers.0.self_attn.q_proj.*quantization_config does not say how")


@pytest.mark.parametrize("name", ["ct4-g32", "awq-g32", "gptq4-g32", "fp8-channel"])
def test_a_packed_module_that_its_config_leaves_out_is_named(tmp_path, name):
    config = PACKINGS[name].config
    field = "ignore" if "config_groups" in config else "modules_to_not_convert"
    skipped = config | {field: ["re:.*v_proj"] if field == "ignore" else ["v_proj"]}
    with_config(write_packed(tmp_path, zoo_model("llama"), name), skipped)
    refuse(tmp_path, "'model.layers.0.self_attn.v_proj.*does not say how this module is packed")


def ct(kind: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    shape = {"num_bits": 4, "strategy": "group", "group_size": 32}
    return ct_config(kind, **shape | weights)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' is not supported .only compressed-ten"),
        ({"quant_method": "auto-round"}, "'auto-round' is not supported .*awq, gptq, fp8"),
        ({}, None),
        ({"bits": 4}, "'None' is not supported"),
        ("awq", "'awq', not an object"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ version 'gemv' .*only gemm"),
        ({"quant_method": "awq", "bits": 8}, "AWQ bits 8 is not supported .only 4"),
        ({"quant_method": "awq", "zero_point": False}, "AWQ zero_point False"),
        ({"quant_method": "awq", "group_size": "many"}, "group_size 'many'"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ bits 3 is not supported .only 4, 8"),
        ({"quant_method": "gptq"}, "GPTQ bits None"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "_format 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size 0"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:x(": {}}}, "quantization_config of gp"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "FP8 fmt 'e5m2' .*only e4m3"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"block size \[128\]"),
        (ct("nvfp4-pack-quantized"), "group_0: format 'nvfp4-pack-quantized' .*only pack-quant"),
        (ct(num_bits=3), "group_0: pack-quantized num_bits 3 .*only 4, 8"),
        (ct("int-quantized"), "group_0: int-quantized num_bits 4 .*only 8"),
        (ct(strategy="token"), "group_0: strategy 'token'"),
        (ct(strategy="tensor", symmetric=False), "group_0: asymmetric strategy 'tensor'"),
        (ct(type="float"), "group_0: pack-quantized float of bits 4"),
        (ct() | {"transform_config": {"config_groups": {"a": {}}}}, "transform_config is not"),
        (
            ct() | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config: format 'sp",
        ),
        (ct() | {"config_groups": [1]}, "quantization_config of compressed-tensors"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, message):
    if message is None:
        assert read_quantization(config) is None
        return
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        read_quantization(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", ["ct4-g32", "int8-channel", "awq-g32", "gptq4-g32", "fp8-blocks"])
def test_a_scale_that_is_not_finite_is_named_in_the_first_pass(tmp_path, name, value):
    write_packed(tmp_path, zoo_model("llama"), name)
    kind = next(kind for kind in PACKINGS[name].pack(torch.rand(32, 96), None) if "scale" in kind)

    def spoil(tensors):
        tensors[LAYER + kind].view(-1)[5] = value

    edit_weights(tmp_path, spoil)
    with StreamingEngine(tmp_path, device="cpu", max_length=32) as engine:
        row = engine._runner.kv.rows.add(32)
        for _ in range(2):  # nothing is kept of a pass that failed
            with pytest.raises(UnsupportedModelError, match=f"{LAYER}{kind}' has scales") as caught:
                engine._runner.forward([(row, torch.tensor([3, 4]))])
            assert str(caught.value).endswith("model.safetensors)")
            assert row.length == 0


@pytest.mark.parametrize("name", ["ct4-g32", "gptq4-g32"])
def test_layers_bring_what_passes_look_at_and_nothing_else(tmp_path, monkeypatch, name):
    """No shapes, say, which are as many copies as matrices."""
    write_packed(tmp_path, zoo_model("qwen2"), name)
    seen, look = set(), Weights.__getitem__
    monkeypatch.setattr(Weights, "__getitem__", lambda w, key: seen.add(key) or look(w, key))
    with StreamingEngine(tmp_path, device="cpu", n_cpu=0) as engine:
        list(engine.events([[1, 2, 3]], max_new_tokens=1))
        for layer in engine.streamer.manifest.layers:
            assert set(layer.tensors) <= seen


def test_scales_that_are_finite_are_looked_at_once(tmp_path, monkeypatch):
    write_packed(tmp_path, zoo_model("llama"), "ct4-g32")
    with StreamingEngine(tmp_path, device="cpu", max_length=32) as engine:
        runner = engine._runner
        row = runner.kv.rows.add(32)
        runner.forward([(row, torch.tensor([3, 4]))])
        monkeypatch.setattr(
            "layer_streamer.llm.weights.scale_check.scales", None
        )  # to be called no more
        runner.forward([(row, torch.tensor([5]))])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scale_is_taken_for_finite_if_and_only_if_it_is(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    assert not not_finite(finite)
    for value in every[~every.isfinite()][::8]:
        assert not_finite(torch.stack((finite[7], value)))


@pytest.mark.parametrize("bits", [0x7F7FFFFF, 0x7F800000, 0x7F800001, -1, 0, 1, -0x800000])
def test_a_float32_scale_is_taken_for_finite_if_and_only_if_it_is(bits):
    scale = torch.tensor([1.0, 0.0])
    scale.view(torch.int32)[1] = bits
    assert bool(not_finite(scale)) == (not bool(scale.isfinite().all()))
