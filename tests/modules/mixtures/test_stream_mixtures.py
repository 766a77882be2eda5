"""Mixtures of transformers with experts on demand answer as resident ones do."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from recipes import loaded, quiet
from tiny_models import TYPES, has, run, tiny_class, tiny_model
from tiny_types import DECODER, EXPERTS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layer_streamer import CheckpointError, ConfigError, stream
from layer_streamer.passes.expert_report import ExpertReport

COUNT, TOP_K, LAYERS = 4, 2, 3
SLOTS = {"one": 1, "top k": TOP_K, "half": COUNT * LAYERS // 2, "all": COUNT * LAYERS}
FEW = ("mixtral", "gpt_oss", "deepseek_v3")
REST = (
    "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "afmoe", "deepseek_v2", "dots1", "ernie4_5_moe",
    "flex_olmo", "glm4_moe_lite", "granitemoe", "granitemoehybrid", "granitemoeshared",
    "hunyuan_v1_moe", "jamba", "lfm2_moe", "minimax", "minimax_m2", "mistral_large4", "nemotron_h",
    "phimoe", "qwen3_5_moe_text", "qwen3_next", "qwen3_vl_moe",
)  # fmt: skip
ALIKE = (
    "aria_text", "cohere2_moe", "deepseek_v4", "exaone_moe", "flint", "granitemoe_swa", "hy_v3",
    "hy_v4", "kolibri1", "laguna", "mellum", "mimo_v2_flash", "solar_open",
)  # fmt: skip
"""Types that the same small configuration makes."""
BY_ADDRESS = {"jamba": 1e-6}
"""Types of which a CPU's kernels differ with the addresses of what is no expert's."""
OTHERWISE = {
    "inkling2": (ConfigError, r"gate_up_proj is made of .* by arithmetic \(Interleave\(dim=1\)\)"),
    "ernie4_5_vl_moe": (ConfigError, r"layers\.1 has experts in 2 places \(mlp\.text_moe\.experts"),
    "llama4_text": (ConfigError, "Llama4ForCausalLM has no experts that go through"),
    "jetmoe": (ConfigError, "JetMoeForCausalLM has no experts that go through"),
    "llama": (ConfigError, "LlamaForCausalLM has no experts that go through"),
}


def need(name: str) -> None:
    if not has(name):
        pytest.skip("this transformers does not have it")


def saved(name: str, folder: Path, how: str = "eager") -> Any:
    """A tiny model as a folder; the resident one."""
    with quiet():
        tiny_model(name).save_pretrained(folder)
        return resident(tiny_class(name), folder, how)


def resident(auto: Any, folder: Path, how: str = "eager") -> Any:
    """With weights where an allocator puts them: where a file has them, rows may lie askew, and
    some kernels of a CPU compute otherwise then."""
    model = loaded(auto, folder, experts_implementation=how).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def streamed(name: str, folder: Path, slots: int, **options: Any) -> Any:
    given = {"device": "cpu", "n_gpu": 1, "experts": "demand", "expert_slots": slots, **options}
    with quiet():
        return stream(folder, cls=tiny_class(name), **given)  # type: ignore[arg-type]


def batch(model: Any) -> torch.Tensor:
    """Logits of three prompts at once; types that look at images are not asked."""
    ids = torch.arange(30, 30 + 3 * 11).view(3, 11)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad(), quiet():
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits


def six(model: Any) -> torch.Tensor:
    """Tokens after a prompt, drawn greedily."""
    ids = torch.arange(8, 20)[None]
    with torch.no_grad(), quiet():
        tokens: torch.Tensor = model.generate(
            ids, do_sample=False, max_new_tokens=6, min_new_tokens=6, pad_token_id=0
        )
    return tokens


def answers(name: str, model: Any) -> dict[str, torch.Tensor]:
    """A prompt, six tokens after it, and a batch."""
    with quiet():
        found = run(name, model)
    return found | ({"batch": batch(model)} if TYPES[name].kind == "text" else {})


def check_type(name: str, folder: Path, slots: int) -> None:
    need(name)
    want = answers(name, saved(name, folder))
    model = streamed(name, folder, slots)
    near = BY_ADDRESS.get(name, 0.0)
    for _ in range(2):
        got = answers(name, model)
        assert got.keys() == want.keys()
        for key, tensor in want.items():
            assert torch.allclose(got[key], tensor, rtol=0, atol=near), key
    (report,) = model.layer_streamer.last_experts.values()
    assert report.asked
    model.layer_streamer.close()


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("slots", [1, TOP_K])
def test_experts_on_demand_give_the_resident_models_bits(
    tmp_path: Path, name: str, slots: int
) -> None:
    check_type(name, tmp_path, slots)


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
def test_experts_of_every_other_type_do_so_too(tmp_path: Path, name: str, slots: int) -> None:
    check_type(name, tmp_path, slots)


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("slots", [SLOTS["half"], SLOTS["all"]])
def test_so_do_those_with_more_slots(tmp_path: Path, name: str, slots: int) -> None:
    check_type(name, tmp_path, slots)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("slots", [1, TOP_K, 100])
def test_types_beside_those_do_so_too(tmp_path: Path, name: str, slots: int) -> None:
    if name not in CONFIG_MAPPING:
        pytest.skip("this transformers does not have it")
    auto = transformers.AutoModelForCausalLM
    config: Any = CONFIG_MAPPING[name](**DECODER, **EXPERTS)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto.from_config(config).save_pretrained(tmp_path)
        plain = resident(auto, tmp_path)
        options: dict[str, Any] = {"experts": "demand", "expert_slots": slots}
        model = stream(tmp_path, cls=auto, device="cpu", n_gpu=1, **options)
    want, near = batch(plain), BY_ADDRESS.get(name, 0.0)
    for _ in range(2):
        assert torch.allclose(batch(model), want, rtol=0, atol=near)
    assert torch.equal(six(model), six(plain))
    model.layer_streamer.close()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_transformers_faster_implementations_differ_by_the_order_of_sums(
    tmp_path: Path, name: str
) -> None:
    want = answers(name, saved(name, tmp_path, "grouped_mm"))
    model = streamed(name, tmp_path, 3)
    got = answers(name, model)
    for key, tensor in want.items():
        assert torch.allclose(got[key], tensor, rtol=0, atol=1e-6), key
    model.layer_streamer.close()


def test_what_was_asked_before_changes_no_bit(tmp_path: Path) -> None:
    saved("olmoe", tmp_path)
    ids = torch.arange(8, 38).view(6, 5)
    found = []
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [4, 4, 5, 2, 0, 1, 3]):
        model = streamed("olmoe", tmp_path, 5)
        with torch.no_grad(), quiet():
            logits = {i: model(ids[i : i + 1]).logits for i in order}
        found.append(torch.cat([logits[i] for i in range(6)]))
        model.layer_streamer.close()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_type_whose_experts_cannot_come_on_demand_is_told_why(tmp_path: Path, name: str) -> None:
    need(name)
    error, words = OTHERWISE[name]
    with quiet():
        tiny_model(name).save_pretrained(tmp_path)
    with pytest.raises(error, match=words) as caught:
        streamed(name, tmp_path, 4)
    assert "\n" not in str(caught.value)


def test_the_plan_names_slots_and_the_handle_what_was_asked_for(tmp_path: Path) -> None:
    saved("deepseek_v3", tmp_path)  # of three layers, the first is dense
    model = streamed("deepseek_v3", tmp_path, 3)
    expert = 3 * 64 * 24 * 4
    (slots,) = model.layer_streamer.plan.experts.values()
    assert (slots.count, slots.experts, slots.layers) == (3, 8, 2)
    line = "model.layers: experts on demand: 3 slots for 8 of 2 layers"
    assert line in str(model.layer_streamer.plan).splitlines()
    assert model.layer_streamer.last_experts == {"model.layers": ExpertReport()}
    with torch.no_grad(), quiet():
        model(torch.tensor([[9]]))
    report = ExpertReport(2 * TOP_K, 0, 2 * TOP_K * expert)
    (found,) = model.layer_streamer.last_experts.values()
    assert replace(found, needed=()) == report
    assert [(layer, len(experts)) for layer, experts in found.needed] == [(1, TOP_K), (2, TOP_K)]
    model.layer_streamer.close()
    assert line in str(model.layer_streamer.plan)


def test_one_budget_holds_the_slots_of_experts_too(tmp_path: Path) -> None:
    want = answers("mixtral", saved("mixtral", tmp_path))
    few: dict[str, Any] = {"n_gpu": 0, "n_cpu_pinned": 0, "embeddings": "device", "head": "device"}
    model = streamed("mixtral", tmp_path, 5, **few)
    plan = model.layer_streamer.plan
    (dense,) = plan.sequences.values()
    least = sum(dense.placement.device_bytes) + dense.expert_bytes + plan.outside_nbytes
    layer = max(size.device_nbytes for size in dense.sizes)
    model.layer_streamer.close()
    for extra, resident in ((0, 0), (layer, 1)):
        model = streamed("mixtral", tmp_path, 5, device_budget=least + extra, **few)
        (dense,) = model.layer_streamer.plan.sequences.values()
        assert dense.tiers.count("device") == resident
        taken = sum(dense.placement.device_bytes) + dense.expert_bytes + plan.outside_nbytes
        assert taken <= least + extra
        assert torch.equal(answers("mixtral", model)["logits"], want["logits"])
        model.layer_streamer.close()
    with pytest.raises(ConfigError, match=r"device_budget=.*needs at least"):
        streamed("mixtral", tmp_path, 5, device_budget=least - 1, **few)


def test_without_a_number_slots_are_what_the_budget_leaves(tmp_path: Path) -> None:
    want = answers("mixtral", saved("mixtral", tmp_path))
    model = streamed("mixtral", tmp_path, 3)
    (dense,) = model.layer_streamer.plan.sequences.values()
    one, resident = dense.expert_bytes // 3, sum(size.device_nbytes for size in dense.sizes)
    budget = resident + model.layer_streamer.plan.outside_nbytes + 7 * one
    model.layer_streamer.close()
    given: dict[str, Any] = {"expert_slots": None, "embeddings": "device", "head": "device"}
    model = streamed("mixtral", tmp_path, 0, device_budget=budget, **given)
    (slots,) = model.layer_streamer.plan.experts.values()
    assert slots.count == 7
    assert torch.equal(answers("mixtral", model)["logits"], want["logits"])
    model.layer_streamer.close()
    with pytest.raises(ConfigError, match="expert_slots= or device_budget= has to say how many"):
        streamed("mixtral", tmp_path, 0, **given)


def test_a_head_that_streams_and_rows_from_host_memory_go_with_it(tmp_path: Path) -> None:
    want = answers("qwen3_moe", saved("qwen3_moe", tmp_path))
    model = streamed("qwen3_moe", tmp_path, 4, head="stream", embeddings="host", strict=True)
    assert model.layer_streamer.plan.head and model.layer_streamer.plan.tables
    got = answers("qwen3_moe", model)
    for key, tensor in want.items():
        assert torch.allclose(got[key], tensor, rtol=0, atol=1e-6), key
    model.layer_streamer.close()


def test_experts_in_many_files_are_found(tmp_path: Path) -> None:
    want = answers("mixtral", saved("mixtral", tmp_path))
    with quiet():
        tiny_model("mixtral").save_pretrained(tmp_path / "cut", max_shard_size="30KB")
    assert len([*(tmp_path / "cut").glob("*.safetensors")]) > 8
    model = streamed("mixtral", tmp_path / "cut", 2)
    assert torch.equal(answers("mixtral", model)["tokens"], want["tokens"])
    assert torch.equal(answers("mixtral", model)["logits"], want["logits"])
    model.layer_streamer.close()


@pytest.mark.parametrize("name", FEW)
def test_in_half_precision_slots_change_no_bit(tmp_path: Path, name: str) -> None:
    """Sums are in float32, as transformers' default has them."""
    with quiet():
        tiny_model(name).to(torch.bfloat16).save_pretrained(tmp_path)
        plain = resident(tiny_class(name), tmp_path, "grouped_mm")
    want, found = batch(plain), []
    for slots in (1, 3, COUNT * LAYERS):
        model = streamed(name, tmp_path, slots)
        found.append(batch(model))
        model.layer_streamer.close()
    assert found[0].dtype == torch.bfloat16
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.allclose(found[0], want, rtol=0, atol=0.004)


def test_an_expert_that_is_cut_off_amid_a_forward_is_named_with_its_block(tmp_path: Path) -> None:
    saved("mixtral", tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    model = streamed("mixtral", tmp_path, 2)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad(), quiet():
        before = model(ids).logits
        experts = model.model.layers[1].mlp.experts
        hook = experts.register_forward_pre_hook(lambda *_: os.truncate(path, 4096))
        with pytest.raises(CheckpointError, match=r"^model\.layers\.1: layer 1, expert \d: "):
            model(ids)
        hook.remove()
        with pytest.raises(CheckpointError, match="changed"):
            model(ids)
    model.layer_streamer.close()
    path.write_bytes(whole)
    again = streamed("mixtral", tmp_path, 2)
    with torch.no_grad(), quiet():
        assert torch.equal(again(ids).logits, before)
    again.layer_streamer.close()
