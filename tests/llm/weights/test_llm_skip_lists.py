"""Which modules a quantization_config means, by the rules of those who write it."""

import json

import pytest
import torch
from assets import relative_error
from compressed_tensors.utils.match import is_match
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import write_packed
from packings import PACKINGS, ct_config
from transformers.quantizers.quantizers_utils import should_convert_module
from zoo import reference, zoo_model

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.errors import UnsupportedModelError
from layer_streamer.llm.weights.quantization import read_quantization

MODULES = [
    *(f"model.layers.{i}.mlp.{m}_proj" for i in (0, 1, 10, 11) for m in ("gate", "up", "down")),
    *(f"model.layers.{i}.self_attn.{m}_proj" for i in (1, 10) for m in "qkvo"),
    "model.embed_tokens",
    "lm_head",
]
PARTS = ("model", "layers", "0", "1", "10", "mlp", "gate", "gate_proj", "down_proj", "proj",
         "_proj", "self_attn", "q_proj", "lm_head", ".*", "head", "m", "")  # fmt: skip
ENTRIES = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join)
METHODS = (
    {"quant_method": "fp8"},
    {"quant_method": "awq"},
    {"quant_method": "fbgemm_fp8"},
)


@pytest.mark.parametrize("method", METHODS, ids=str)
@given(listed=st.lists(ENTRIES, max_size=3))
@settings(max_examples=40, deadline=None)
def test_a_skip_list_means_what_it_means_in_transformers(method, listed):
    found = read_quantization(method | {"modules_to_not_convert": listed})
    for module in MODULES:
        assert (found.scheme(module) is not None) == should_convert_module(module, listed), module


@given(ignored=st.lists(st.one_of(ENTRIES, ENTRIES.map("re:{}".format)), max_size=3))
@settings(max_examples=60, deadline=None)
def test_an_ignore_list_means_what_it_means_in_compressed_tensors(ignored):
    shape = {"num_bits": 4, "strategy": "group", "group_size": 32}
    config = ct_config("pack-quantized", **shape) | {"ignore": ignored}
    found, linear = read_quantization(config), torch.nn.Linear(1, 1)
    for module in [name for name in MODULES if "embed" not in name]:
        assert (found.scheme(module) is None) == is_match(module, linear, ignored), module


def test_a_list_by_its_other_name_counts_only_where_the_first_is_not():
    config = {"quant_method": "fp8", "ignored_layers": ["q_proj"]}
    assert read_quantization(config).scheme("model.layers.0.self_attn.q_proj") is None
    config["modules_to_not_convert"] = ["k_proj"]
    assert read_quantization(config).scheme("model.layers.0.self_attn.q_proj") is not None


@pytest.mark.parametrize("listed", ["lm_head", 7, {"lm_head": 1}])
def test_a_skip_list_that_is_none_is_refused_by_name(listed):
    with pytest.raises(UnsupportedModelError, match=r"modules_to_not_convert is .*, not a list"):
        read_quantization({"quant_method": "fp8", "modules_to_not_convert": listed})


def test_an_entry_that_is_no_expression_is_refused_in_one_line():
    with pytest.raises(UnsupportedModelError, match="quantization_config of fp8: ") as caught:
        read_quantization({"quant_method": "fp8", "modules_to_not_convert": ["mlp.("]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "skipped",
    [["lm_head", "model.layers.0.mlp.gate"], ["model.layers.1"], ["gate"], ["down_proj"]],
)
def test_a_model_whose_list_names_parts_of_longer_names_runs(tmp_path, skipped):
    model, packing = (
        zoo_model("llama", num_hidden_layers=11, hidden_size=32, intermediate_size=48),
        PACKINGS["fp8-blocks"],
    )
    config = packing.config | {"modules_to_not_convert": skipped}

    def choose(module):
        return packing if ".layers." in module and should_convert_module(module, skipped) else None

    write_packed(tmp_path, model, choose, config)
    with StreamingEngine(tmp_path, device="cpu", dtype=torch.float32, max_length=32) as engine:
        row = engine._runner.kv.rows.add(32)
        ids = torch.arange(3, 30)
        found = engine._runner.forward([(row, ids)], every_position=True)
    assert relative_error(found, reference(model, ids.tolist(), len(ids))) <= 1e-5


@pytest.mark.parametrize(
    ("config", "offset"),
    [
        ({}, 1),
        ({"format": "gptq_v2"}, 0),
        ({"format": "GPTQ_V2", "checkpoint_format": None}, 0),
        ({"format": "gptq_v2", "checkpoint_format": "gptq"}, 1),
    ],
)
def test_the_version_of_gptq_has_two_names_of_which_the_older_counts(config, offset):
    found = read_quantization({"quant_method": "gptq", "bits": 4} | config)
    assert found.scheme("lm_head").zero_offset == offset


@pytest.mark.parametrize("config", [{"format": "gemv"}, {"backend": "llm-awq"}])
def test_other_layouts_of_awq_are_refused_by_name(config):
    with pytest.raises(UnsupportedModelError, match=r"AWQ .* is not supported"):
        read_quantization({"quant_method": "awq"} | config)


def test_a_nested_module_goes_by_each_of_its_names():
    config = json.loads(json.dumps(PACKINGS["ct4-g32"].config)) | {"ignore": ["b.x", "lm_head"]}
    found = read_quantization(config)
    assert found.scheme("a.x", "b.x") is None and found.scheme("a.x") is not None
