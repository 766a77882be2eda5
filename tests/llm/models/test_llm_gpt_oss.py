"""gpt-oss: sinks, clamps, biases of experts, in floats, in blocks of four bits, in GGUF files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from assets import edit_weights, open_runner, relative_error, tiny_checkpoint
from forward import open_forward
from gguf_models import STATIC, add_metadata, file_config
from gpt_oss_models import write_blocks
from safetensors.torch import load_file
from test_llm_experts_on_demand import check
from zoo import IDS, PROMPT, reference, stepwise, zoo_model

from layer_streamer import read_manifest
from layer_streamer.llm.errors import UnsupportedModelError
from layer_streamer.llm.metadata import load_config
from layer_streamer.llm.models.config import model_config
from layer_streamer.llm.models.config_fields import config_fields
from layer_streamer.llm.models.gguf_config import gguf_config
from layer_streamer.llm.models.names import weight_names
from layer_streamer.llm.weights.quants import unpack_mxfp4
from layer_streamer.llm.weights.scratch import Scratch

TOLERANCE = 1e-5
VISIBLE = 100 * TOLERANCE


def write_oss_gguf(path: Path, model: Any) -> None:
    """The model with experts in MXFP4 and all else in float32; it gets the floats of the file."""
    config = model.config
    writer = gguf.GGUFWriter(path, "gpt-oss")
    add_metadata(writer, config)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT_OSS, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        values = parameter.data
        if ".experts." in name:
            _add_experts(writer, name, values)
            continue
        module, _, kind = name.rpartition(".")
        if kind == "sinks":
            module, kind = name, "weight"
        target = STATIC.get(module) or names.get_name(module)
        writer.add_tensor(f"{target}.{kind}", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_experts(writer: gguf.GGUFWriter, name: str, values: torch.Tensor) -> None:
    """Gate and up apart, rows before columns."""
    layer, kind = name.split(".")[2], name.rpartition(".")[2]
    is_bias, mxfp4 = kind.endswith("_bias"), gguf.GGMLQuantizationType.MXFP4
    parts = {"down": values}
    if kind.startswith("gate_up"):
        parts = {"gate": values[..., 0::2], "up": values[..., 1::2]}
    for part, own in parts.items():
        target = f"blk.{layer}.ffn_{part}_exps"
        if is_bias:
            writer.add_tensor(f"{target}.bias", own.contiguous().numpy())
            continue
        rows = np.ascontiguousarray(own.transpose(1, 2).numpy())
        packed = gguf.quants.quantize(rows, mxfp4)
        writer.add_tensor(f"{target}.weight", packed, raw_dtype=mxfp4)
        floats = gguf.quants.dequantize(packed, mxfp4).reshape(rows.shape)
        own.copy_(torch.from_numpy(floats).transpose(1, 2))


def error(path: Path, config: Any, expected: torch.Tensor) -> float:
    with open_forward(path, config) as forward:
        return relative_error(stepwise(forward), expected)


def test_experts_of_gpt_oss_in_blocks_of_four_bits_are_what_the_blocks_stand_for(
    tmp_path: Path,
) -> None:
    model = zoo_model("gpt_oss")
    path = write_blocks(tmp_path, model)
    assert error(path, load_config(path), reference(model)) <= TOLERANCE


def test_a_gguf_file_of_gpt_oss_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    model, path = zoo_model("gpt_oss"), tmp_path / "a.gguf"
    write_oss_gguf(path, model)
    config = model_config(config_fields(gguf_config(read_manifest(path))))
    assert config == file_config(path)
    assert config.windows == (10, None, 10)
    assert config.experts is not None and config.experts.clamp is not None
    clamp = replace(config.experts.clamp, limit=1.5)  # of the tiny model; files do not say
    config = replace(config, experts=replace(config.experts, clamp=clamp))
    assert error(path, config, reference(model)) <= TOLERANCE


@pytest.mark.parametrize("kind", ["floats", "blocks", "gguf"])
def test_experts_of_gpt_oss_come_on_demand(tmp_path: Path, kind: str) -> None:
    model, path = zoo_model("gpt_oss"), tmp_path / "a.gguf"
    if kind == "gguf":
        write_oss_gguf(path, model)
        check(path, file_config(path), slots=(1, 2))
    else:
        path = (tiny_checkpoint if kind == "floats" else write_blocks)(tmp_path, model)
        check(path, load_config(path), slots=(1, 2))


@pytest.mark.parametrize(
    "key", ["sinks", "router.bias", "gate_up_proj_bias", "down_proj_bias", "o_proj.bias"]
)
def test_sinks_and_biases_of_gpt_oss_that_are_left_out_show(tmp_path: Path, key: str) -> None:
    model = zoo_model("gpt_oss")
    expected, path = reference(model), tiny_checkpoint(tmp_path, model)
    edit_weights(path, lambda t: [x.zero_() for name, x in t.items() if name.endswith(key)])
    assert error(path, load_config(path), expected) > VISIBLE


@pytest.mark.parametrize("wrong", [{"limit": 7.0}, {"alpha": 1.0}])
def test_clamps_of_gpt_oss_that_are_others_show(tmp_path: Path, wrong: dict[str, float]) -> None:
    model = zoo_model("gpt_oss")
    path = tiny_checkpoint(tmp_path, model)
    config = load_config(path)
    assert config.experts is not None and config.experts.clamp is not None
    clamp = replace(config.experts.clamp, **wrong)
    changed = replace(config, experts=replace(config.experts, clamp=clamp))
    assert error(path, changed, reference(model)) > VISIBLE


def spoil_blocks(path: Path, change: Any) -> None:
    """Change tensors of one file by their names."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    edit_weights(path, lambda found: (found.clear(), found.update(tensors)))


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (
            "gate_up_proj_scales",
            lambda x: x[:, :, :1],
            r"_scales' has shape \[5, 192, 1\], the con",
        ),
        ("down_proj_blocks", lambda x: x[:, :63], r"_blocks' has shape \[5, 63, 3, 16\], the con"),
        (
            "down_proj_blocks",
            lambda x: x.short(),
            "_blocks' has dtype torch.int16, not torch.uint8",
        ),
        ("gate_up_proj_bias", lambda x: x[:, ::2], r"_bias' has shape \[5, 96\], the config says"),
    ],
)
def test_blocks_of_gpt_oss_that_contradict_the_config_are_named(
    tmp_path: Path, key: str, change: Any, message: str
) -> None:
    path = write_blocks(tmp_path, zoo_model("gpt_oss"))
    name = f"model.layers.1.mlp.experts.{key}"
    spoil_blocks(path, lambda t: t.update({name: change(t[name]).contiguous()}))
    with pytest.raises(UnsupportedModelError, match=message):
        weight_names(read_manifest(path), load_config(path))


@pytest.mark.parametrize("kind", ["scales", "bias"])
def test_a_part_of_the_experts_of_gpt_oss_that_is_missing_is_named(
    tmp_path: Path, kind: str
) -> None:
    path = write_blocks(tmp_path, zoo_model("gpt_oss"))
    spoil_blocks(path, lambda t: t.pop(f"model.layers.2.mlp.experts.down_proj_{kind}"))
    with pytest.raises(UnsupportedModelError, match=rf"layer 2: tensor '.*_{kind}' is missing"):
        weight_names(read_manifest(path), load_config(path))


def test_a_power_of_two_that_is_no_number_is_refused_in_the_pass_that_uses_it(
    tmp_path: Path,
) -> None:
    path = write_blocks(tmp_path, zoo_model("gpt_oss", num_experts_per_tok=5))
    name = "model.layers.1.mlp.experts.gate_up_proj_scales"
    spoil_blocks(path, lambda t: t[name][3, 7, 1].fill_(255))
    with open_runner(path, load_config(path)) as runner:
        row, message = runner.kv.rows.add(20), "gate_up_proj_scales' has scales that are not finite"
        with pytest.raises(UnsupportedModelError, match=message):
            runner.forward([(row, IDS[:9])])


def test_every_block_of_four_bits_in_a_gguf_file_is_what_gguf_makes_of_it() -> None:
    random = np.random.default_rng(1)
    raw = random.integers(0, 256, (255, 17)).astype(np.uint8)
    raw[:, 0] = np.arange(255)
    out = torch.empty(255 * 32)
    unpack_mxfp4(torch.from_numpy(raw).view(-1), out, Scratch(3 * len(out), out.device))
    kind = gguf.GGMLQuantizationType.MXFP4
    with np.errstate(over="ignore"):
        expected = gguf.quants.dequantize(raw, kind).reshape(-1)
    assert out.numpy().tobytes() == expected.tobytes()


def test_a_published_config_of_gpt_oss_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    model = zoo_model("gpt_oss")
    path = write_blocks(tmp_path, model)
    fields = json.loads((path / "config.json").read_text())
    rope = fields.pop("rope_parameters")
    fields |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    fields |= {"experts_per_token": 2, "initial_context_length": 16}
    del fields["layer_types"], fields["swiglu_alpha"]
    (path / "config.json").write_text(json.dumps(fields))
    with open_forward(path, load_config(path)) as forward:
        found = forward(IDS[:PROMPT])
    assert relative_error(found, reference(model, IDS[:PROMPT], PROMPT)) <= TOLERANCE
