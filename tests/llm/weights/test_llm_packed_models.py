"""Models with packed matrices through the engine, against the floats that their oracles find."""

import copy
import json
from typing import Any

import pytest
import torch
from assets import relative_error
from forward import open_forward
from packed_models import write_packed
from packings import PACKINGS, ct_config
from transformers import AutoModelForCausalLM
from zoo import CLASSES, reference, stepwise, zoo_model

from layer_streamer import read_manifest
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.metadata import load_config
from layer_streamer.llm.models.names import weight_names

TOLERANCE = 1e-5
IDS = list(range(3, 300, 7))
BY_ROW = [name for name in PACKINGS if not name.startswith(("awq", "gptq")) and "act" not in name]


def quick(*names: str) -> list[Any]:
    """Every packing by rows; all but these are slow."""
    slow = pytest.mark.slow
    return [pytest.param(n, marks=[] if n in names else slow) for n in BY_ROW]


def engine_logits(path, **options: Any) -> torch.Tensor:
    """Of every token of IDS, by the engine's own pass."""
    options = {"device": "cpu", "dtype": torch.float32, "max_length": 64} | options
    with StreamingEngine(path, **options) as engine:
        runner = engine._runner
        row = runner.kv.rows.add(64)
        return runner.forward([(row, torch.tensor(IDS))], every_position=True)


@pytest.mark.parametrize("name", PACKINGS)
def test_a_packed_model_gives_the_logits_of_the_floats_in_it(tmp_path, name):
    model = zoo_model("llama-biases")
    write_packed(tmp_path, model, name)
    expected = reference(model, IDS, len(IDS))
    assert relative_error(engine_logits(tmp_path), expected) <= TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("name", PACKINGS)
def test_a_gpu_gives_the_logits_of_the_floats_in_it(tmp_path, name):
    model = zoo_model("llama-biases")
    write_packed(tmp_path, model, name)
    expected = reference(model, IDS, len(IDS))
    assert relative_error(engine_logits(tmp_path, device="cuda").cpu(), expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral", "gemma3_text"])
def test_every_architecture_may_be_packed(tmp_path, name):
    model = zoo_model(name)
    write_packed(tmp_path, model, "ct4-g32")
    with open_forward(tmp_path, load_config(tmp_path)) as forward:
        assert relative_error(stepwise(forward), reference(model)) <= TOLERANCE


@pytest.mark.parametrize(
    "name", quick("ct4-asym-g16", "ct8-channel", "int8-asym-g32", "fp8-blocks")
)
def test_a_packed_embedding_and_head_are_taken_too(tmp_path, name):
    packing, model = PACKINGS[name], zoo_model("llama")
    config = copy.deepcopy(packing.config) | {"ignore": []}
    for group in config.get("config_groups", {}).values():
        group["targets"] = ["Linear", "Embedding"]
    write_packed(tmp_path, model, lambda _: packing, config)
    expected = reference(model, IDS, len(IDS))
    assert relative_error(engine_logits(tmp_path), expected) <= TOLERANCE


@pytest.mark.parametrize("name", quick("ct4-asym-g16", "fp8-blocks"))
def test_a_packed_embedding_may_be_the_head(tmp_path, name):
    packing, model = PACKINGS[name], zoo_model("llama-tied")
    config = copy.deepcopy(packing.config)
    for group in config.get("config_groups", {}).values():
        group["targets"] = ["re:.*embed_tokens$"]
    write_packed(tmp_path, model, lambda m: packing if "embed" in m else None, config)
    expected = reference(model, IDS, len(IDS))
    assert relative_error(engine_logits(tmp_path), expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["awq-g32", "gptq4-g32"])
@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_a_head_that_is_packed_across_rows_is_refused_by_name(tmp_path, name, module):
    model = zoo_model("llama")
    write_packed(tmp_path, model, lambda m: PACKINGS[name] if m == module else None)
    (tmp_path / "config.json").write_text(
        json.dumps(model.config.to_dict() | {"quantization_config": PACKINGS[name].config})
    )
    with pytest.raises(ValueError, match=f"'{module}.qweight' is packed as .* in layers only"):
        weight_names(read_manifest(tmp_path), load_config(tmp_path))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ct4-g32", "awq-g32"])
def test_what_is_not_packed_may_have_another_dtype_than_the_engine(tmp_path, name, stored):
    model = zoo_model("qwen2")
    write_packed(tmp_path, model, name, dtype=stored)
    expected = reference(model, IDS, len(IDS))
    assert relative_error(engine_logits(tmp_path), expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["ct4-g32", "ct8-channel", "awq-g32", "fp8-blocks"])
def test_bfloat16_of_packed_weights_is_as_near_to_float32_as_that_of_transformers(tmp_path, name):
    model = zoo_model("llama-biases")
    write_packed(tmp_path, model, name)
    exact = reference(model, IDS, len(IDS))
    model.save_pretrained(tmp_path / "twin")
    load = CLASSES["llama"][1].from_pretrained
    theirs = reference(load(tmp_path / "twin", dtype=torch.bfloat16), IDS, len(IDS))
    ours = engine_logits(tmp_path, dtype=torch.bfloat16)
    ours, theirs = ((logits - exact).square().mean().sqrt() for logits in (ours, theirs))
    assert ours <= 1.25 * theirs


def test_scales_are_not_rounded_to_the_dtype_of_the_engine(tmp_path):
    model = zoo_model("llama")
    write_packed(tmp_path, model, "ct8-channel")
    names = weight_names(read_manifest(tmp_path), load_config(tmp_path))
    assert names.as_stored
    with StreamingEngine(tmp_path, device="cpu", dtype=torch.bfloat16, max_length=64) as engine:
        seen: list[set[torch.dtype]] = []
        engine.streamer.run_pass(
            torch.zeros(1), lambda x, t, i: seen.append({v.dtype for v in t.values()}) or x
        )
    assert torch.float16 in seen[0]


def test_groups_of_a_config_apply_to_the_modules_that_they_name(tmp_path):
    model = zoo_model("llama")
    wide, narrow = PACKINGS["ct8-g32"], PACKINGS["ct4-asym-g16"]
    one, two = (p.config["config_groups"]["group_0"] for p in (wide, narrow))
    config = ct_config("pack-quantized") | {
        "ignore": ["lm_head", "re:.*o_proj$", "model.layers.0.mlp.up_proj"],
        "config_groups": {
            "low": two | {"targets": ["Linear"]},
            "high": one | {"targets": ["re:.*layers[.]1[.]", "model.layers.2.mlp.gate_proj"]},
        },
    }

    def choose(module):
        if ".layers." not in module or "o_proj" in module or module.endswith("0.mlp.up_proj"):
            return None
        return wide if ".layers.1." in module or module.endswith("2.mlp.gate_proj") else narrow

    write_packed(tmp_path, model, choose, config)
    expected = reference(model, IDS, len(IDS))
    assert relative_error(engine_logits(tmp_path), expected) <= TOLERANCE


def test_overrides_of_a_gptq_config_apply_to_the_modules_that_they_name(tmp_path):
    model = zoo_model("llama")
    narrow, wide = PACKINGS["gptq4-g32"], PACKINGS["gptq8-act-order"]
    config = narrow.config | {
        "dynamic": {
            r"-:.*o_proj": {},
            r"+:.*layers\.1\.": {"bits": 8, "desc_act": True},
        }
    }

    def choose(module):
        if ".layers." not in module or "o_proj" in module:
            return None
        return wide if ".layers.1." in module else narrow

    write_packed(tmp_path, model, choose, config)
    expected = reference(model, IDS, len(IDS))
    assert relative_error(engine_logits(tmp_path), expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["ct4-g32", "ct8-g32", "ct8-channel"])
def test_transformers_reads_the_same_weights_from_a_checkpoint(tmp_path, name):
    model = zoo_model("llama")
    write_packed(tmp_path, model, name)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = reference(theirs, IDS, len(IDS))
    assert relative_error(expected, reference(model, IDS, len(IDS))) <= TOLERANCE
    assert relative_error(engine_logits(tmp_path), expected) <= TOLERANCE


def test_memory_for_unpacking_is_part_of_the_plan(tmp_path):
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    write_packed(packed, zoo_model("llama"), "ct4-g32")
    zoo_model("llama").save_pretrained(plain)
    engines = [StreamingEngine(path, device="cpu", max_length=64) for path in (packed, plain)]
    first, second = (engine.plan.device["scratch"] for engine in engines)
    taken = engines[0]._runner.sides[0].unpacker.nbytes
    for engine in engines:
        engine.close()
    assert first - second == taken > 4 << 20


def test_matrices_that_are_plain_are_taken_so_whatever_the_config_says(tmp_path):
    model = zoo_model("llama")
    write_packed(tmp_path, model, lambda _: None, PACKINGS["awq-g32"].config)
    assert not weight_names(read_manifest(tmp_path), load_config(tmp_path)).as_stored
    expected = reference(model, IDS, len(IDS))
    assert relative_error(engine_logits(tmp_path), expected) <= TOLERANCE
