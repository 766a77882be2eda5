"""Mixtures of experts, quantized: whose errors count by what, what stays floats, who reads them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import relative_error
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import is_match
from forward import open_forward
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import hub_parameters, write_packed
from quantizing import load, run, save, tensors, weights
from safetensors.torch import load_file
from zoo import MIXTURES, reference, stepwise, zoo_config, zoo_model

from layer_streamer.llm.metadata import load_config
from layer_streamer.llm.models.config import ModelConfig, model_config
from layer_streamer.llm.models.modules import ROUTER, SHARED_GATE, expert_of, shared_key
from layer_streamer.llm.models.names import weight_shapes
from layer_streamer.llm.quantize.grouping import (
    GROUPS,
    choose_groups,
    kinds_of_floats,
    quantization_config,
)
from layer_streamer.llm.weights.quantization import read_quantization

Written = Callable[[str, int], Path]
NAMES = [name for name in MIXTURES if not name.startswith("gpt")]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Where a model lies ("in") beside what is made of it ("out"), each made once."""

    @functools.cache
    def write(name: str, bits: int) -> Path:
        place = tmp_path_factory.mktemp(name)
        save(place / "in", zoo_model(name))
        assert run(place / "in", place / "out", "--bits", bits, "--dtype", "float32") == 0
        return place

    return write


@pytest.mark.parametrize(("name", "bits"), [*((name, 4) for name in NAMES), ("mixtral", 8)])
def test_the_engine_computes_the_floats_that_a_quantized_mixture_stands_for(
    written: Written, name: str, bits: int
) -> None:
    model, out = zoo_model(name), written(name, bits) / "out"
    floats = weights(out, bits)
    with torch.no_grad():
        for key, parameter in hub_parameters(model):
            parameter.copy_(floats[key])
    with open_forward(out, load_config(out)) as forward:
        assert relative_error(stepwise(forward), reference(model)) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_a_quantized_mixture_with_equal_weights(
    written: Written, name: str
) -> None:
    out = written(name, 4) / "out"
    found, ours = dict(hub_parameters(load(out))), weights(out, 4)
    assert all(torch.equal(found[key], ours[key]) for key in ours)


@pytest.mark.parametrize("name", NAMES)
def test_a_quantized_mixture_has_the_modules_of_its_source(written: Written, name: str) -> None:
    source = load_file(written(name, 4) / "in" / "model.safetensors")
    found = tensors(written(name, 4) / "out")
    assert {key.rpartition(".")[0] for key in found} == {key.rpartition(".")[0] for key in source}


@pytest.mark.parametrize("name", NAMES)
def test_routers_and_gates_of_shared_experts_stay_what_they_are(
    written: Written, name: str
) -> None:
    source = load_file(written(name, 4) / "in" / "model.safetensors")
    found, ends = tensors(written(name, 4) / "out"), ("norm.weight", ".bias", ".gate.weight")
    ends = (*ends, "embed_tokens.weight", "lm_head.weight", "shared_expert_gate.weight")
    plain = {key for key in found if "weight_" not in key}
    assert plain == {key for key in source if key.endswith(ends)}
    assert all(torch.equal(found[key], source[key]) for key in plain)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe-dense"])
def test_the_package_rounds_experts_to_the_same_words(
    written: Written, name: str, bits: int
) -> None:
    """To nearest, with these scales."""
    out = written(name, bits) / "out"
    found, source = tensors(out), load_file(written(name, bits) / "in" / "model.safetensors")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    seen = 0
    for key in found:
        module, _, kind = key.rpartition(".")
        if kind != "weight_packed":
            continue
        state = {
            "weight": source[f"{module}.weight"],
            "weight_scale": found[f"{module}.weight_scale"],
        }
        theirs = PackedQuantizationCompressor.compress(state, scheme_of(config, module))
        assert torch.equal(theirs["weight_packed"], found[key]), key
        assert theirs["weight_shape"].tolist() == found[f"{module}.weight_shape"].tolist()
        seen += ".experts." in key
    assert seen == 3 * (5 * 3 if name == "mixtral" else 8 * 2)


@pytest.mark.parametrize(
    ("name", "packing"), [("mixtral", "awq-g32"), ("qwen2_moe-dense", "gptq4-v2-act-order")]
)
def test_a_mixture_in_another_packed_format_can_be_quantized(
    tmp_path: Path, name: str, packing: str
) -> None:
    model = zoo_model(name)
    write_packed(tmp_path / "in", model, packing)  # puts what the file holds into the model
    assert run(tmp_path / "in", tmp_path / "out", "--bits", 8, "--dtype", "float32") == 0
    found = weights(tmp_path / "out", 8)
    for key, expected in hub_parameters(model):
        assert relative_error(found[key], expected) <= 0.02, key


def scheme_of(config: dict[str, Any], module: str) -> QuantizationScheme | None:
    """What the package finds for a module that is a Linear; None: it is ignored. One at most."""
    read = QuantizationConfig.model_validate(config)
    linear = torch.nn.Linear(1, 1, device="meta")
    found = [
        scheme for scheme in read.config_groups.values()
        if is_match(module, linear, scheme.targets, read.ignore or ())
    ]  # fmt: skip
    assert len(found) <= 1, module
    return found[0] if found else None


WIDTHS = st.integers(1, 24).map(lambda n: 32 * n)


@st.composite
def mixtures(draw: st.DrawFn) -> ModelConfig:
    """Configs with any widths, and any of their layers mixtures where a family has dense ones."""
    name = draw(st.sampled_from(["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]))
    changes: dict[str, Any] = {"hidden_size": draw(WIDTHS), "intermediate_size": draw(WIDTHS)}
    if name.startswith("qwen"):
        changes |= {"moe_intermediate_size": draw(WIDTHS)}
        changes |= {"mlp_only_layers": draw(st.sampled_from([[], [0], [1, 2], [0, 1, 2]]))}
    if name == "qwen2_moe":
        changes |= {"shared_expert_intermediate_size": draw(WIDTHS)}
    return model_config(zoo_config(name, head_dim=32, **changes))


@settings(max_examples=40, deadline=None)
@given(mixtures(), st.sampled_from([None, 32]), st.sampled_from([4, 8]))
def test_every_matrix_of_every_layer_has_one_group_which_both_readers_find(
    config: ModelConfig, asked: int | None, bits: int
) -> None:
    groups = choose_groups(config, asked)
    said = quantization_config(groups, bits, kinds_of_floats(config))
    ours, family = read_quantization(said), config.family
    assert ours is not None
    for layer_idx in range(config.num_layers):
        for module, shape in weight_shapes(config, layer_idx).items():
            if len(shape) < 2 or (expert_of(module) or (0,))[0] > 1:
                continue
            name = f"model.layers.{layer_idx}.{family.hub_name(module)}"
            schemes = ours.scheme(name), scheme_of(said, name)
            if module in (ROUTER, SHARED_GATE):
                assert schemes == (None, None), name
                continue
            group = groups[shared_key(module)]
            assert shape[1] % group == 0 and group in GROUPS
            assert schemes[0] is not None and (schemes[0].group, schemes[0].bits) == (group, bits)
            assert schemes[1] is not None and schemes[1].weights.group_size == group


@settings(max_examples=40, deadline=None)
@given(mixtures())
def test_all_matrices_of_experts_have_the_largest_group_that_divides_their_widths(
    config: ModelConfig,
) -> None:
    groups = choose_groups(config, None)
    found = {group for kind, group in groups.items() if kind.startswith("mlp.experts.")}
    if config.experts is None:
        assert not found
        return
    widths = config.hidden_size, config.experts.width
    assert found == {max(g for g in GROUPS if all(width % g == 0 for width in widths))}
    # vLLM asks by these names whatever a model's own are.
    said = quantization_config(groups, 4)
    for matrix in ("gate_proj", "up_proj", "down_proj"):
        scheme = scheme_of(said, f"model.layers.1.block_sparse_moe.experts.0.{matrix}")
        assert scheme is not None and {scheme.weights.group_size} == found


@pytest.mark.parametrize(
    ("changes", "asked", "message"),
    [
        ({"moe_intermediate_size": 96}, 64,
         "--group 64: does not divide the width of mlp.experts.down_proj, 96; "
         "--group 32 divides all widths"),
        ({"moe_intermediate_size": 40}, None,
         "mlp.experts.down_proj has width 40, which none of 128, 64, 32 divides"),
        ({"shared_expert_intermediate_size": 48}, None, "mlp.shared_expert.down_proj has width 48"),
    ],
)  # fmt: skip
def test_a_width_of_experts_that_no_group_divides_is_refused_by_its_name(
    changes: dict[str, Any], asked: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_groups(model_config(zoo_config("qwen2_moe", **changes)), asked)


def test_gpt_oss_is_refused_in_one_line(tmp_path: Path, capsys: Any) -> None:
    save(tmp_path / "in", zoo_model("gpt_oss"))
    capsys.readouterr()
    assert run(tmp_path / "in", tmp_path / "out", "--bits", 4) == 2
    assert capsys.readouterr().err == (
        "error: a gpt_oss model is not quantized: it is published in four bits (MXFP4), and is run "
        "as it is\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
