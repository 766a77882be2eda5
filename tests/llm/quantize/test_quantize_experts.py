"""What a calibration text says of experts: of those that it reaches, and of all others."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import relative_error
from gguf_models import write_gguf
from packed_models import hub_parameters
from quantizing import CPU, contents, importance_of, interrupt_at, read, run, save, tensors, weights
from tokenizers_made import byte_level
from zoo import IDS, biased, zoo_model

from layer_streamer.llm.host_kernels import products
from layer_streamer.llm.models.modules import expert_module, expert_of
from layer_streamer.llm.quantize.errors import Errors
from layer_streamer.llm.quantize.grouping import choose_groups
from layer_streamer.llm.quantize.job import Job, quantize
from layer_streamer.llm.quantize.layers import Recipe
from layer_streamer.llm.quantize.moments import ALIKE
from layer_streamer.llm.quantize.scales import Rounding

TYPES = ("mixtral", "qwen2_moe-dense", "qwen3_moe-dense", "olmoe")
Inputs = dict[tuple[int, str], torch.Tensor]
"""By layer and module of an expert, what its matrix multiplies: (tokens, width)."""


def inputs_of_experts(model: Any, ids: list[int]) -> Inputs:
    """As transformers computes them, of those that a token reaches."""
    found: Inputs = {}

    def watch(layer_idx: int, module: Any, x_TD: torch.Tensor, ids_TK: torch.Tensor) -> None:
        for expert in ids_TK.unique().tolist():
            own_SD = x_TD[(ids_TK == expert).any(1)]
            gate_SF, up_SF = (own_SD @ module.gate_up_proj[expert].t()).chunk(2, 1)
            found[layer_idx, expert_module(expert, "gate_proj")] = own_SD
            found[layer_idx, expert_module(expert, "up_proj")] = own_SD
            gated_SF = torch.nn.functional.silu(gate_SF) * up_SF
            found[layer_idx, expert_module(expert, "down_proj")] = gated_SF

    for layer_idx, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_pre_hook(
                lambda module, args, i=layer_idx: watch(i, module, *args[:2])
            )
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    return found


def job_of(source: Path, out: Path, calibration: list[int]) -> Job:
    model = read(source)
    recipe = Recipe(Rounding(4, torch.float32), choose_groups(model.config, None))
    return Job(model=model, recipe=recipe, out=out, device=CPU, calibration=calibration)


def done(job: Job) -> dict[str, Errors]:
    return quantize(job, lambda _: None, lambda _: None)


@pytest.mark.parametrize("name", TYPES)
def test_moments_of_an_expert_are_those_of_the_tokens_that_its_router_sends(
    tmp_path: Path, name: str
) -> None:
    model = zoo_model(name)
    expected = inputs_of_experts(model, IDS)
    found = importance_of(read(save(tmp_path / "in", model)), IDS)
    assert expected.keys() == {
        (layer_idx, module) for layer_idx, own in enumerate(found) for module in own
        if expert_of(module)
    }  # fmt: skip
    for (layer_idx, module), x_SK in expected.items():
        squares = x_SK.double().square().mean(0)
        shares = (squares / squares.mean() * len(x_SK) + ALIKE) / (len(x_SK) + ALIKE)
        assert relative_error(found[layer_idx][module].double(), shares) <= 1e-4, module


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_a_few_tokens_do_not_make_experts_worse_for_others_than_no_text(
    tmp_path: Path, name: str
) -> None:
    model = zoo_model(name)
    source = save(tmp_path / "in", model)
    few, others = inputs_of_experts(model, IDS[:3]), inputs_of_experts(model, IDS[3:])
    done(job_of(source, tmp_path / "aware", IDS[:3]))
    done(job_of(source, tmp_path / "blind", []))
    hub_name, original = read(source).config.family.hub_name, dict(hub_parameters(model))
    found = {out: weights(tmp_path / out, 4) for out in ("aware", "blind")}
    squares = dict.fromkeys(found, 0.0)
    for layer_idx, module in few.keys() & others.keys():
        key = f"model.layers.{layer_idx}.{hub_name(module)}.weight"
        for out in found:
            error = others[layer_idx, module] @ (found[out][key] - original[key]).t()
            squares[out] += float(error.double().square().sum() / error.numel())
    assert squares["aware"] < 1.05 * squares["blind"]


@pytest.mark.parametrize("name", TYPES)
def test_experts_that_no_token_reaches_are_counted_and_rounded_as_without_a_text(
    tmp_path: Path, name: str
) -> None:
    model = biased(zoo_model(name), {1: 60.0, 2: -60.0}) if "dense" not in name else zoo_model(name)
    ids, source = IDS[:2], save(tmp_path / "in", model)
    reached = inputs_of_experts(model, ids)
    errors = done(job_of(source, tmp_path / "aware", ids))
    done(job_of(source, tmp_path / "blind", []))
    aware, blind = tensors(tmp_path / "aware"), tensors(tmp_path / "blind")
    config = read(source).config
    total, missed = 0, 0
    for layer_idx in sorted(config.experts.layers):
        for expert in range(config.experts.count):
            module = expert_module(expert, "down_proj")
            own = config.family.hub_name(module)
            key = f"model.layers.{layer_idx}.{own}.weight_scale"
            assert torch.equal(aware[key], blind[key]) == ((layer_idx, module) not in reached)
            missed += (layer_idx, module) not in reached
            total += 1
    assert 0 < missed < total == config.experts.total
    assert {kind: error.unseen for kind, error in errors.items() if error.unseen} == {
        f"mlp.experts.{matrix}": missed for matrix in ("gate_proj", "up_proj", "down_proj")
    }


@pytest.mark.parametrize("name", TYPES)
def test_progress_and_room_are_of_the_matrices_of_each_layer(tmp_path: Path, name: str) -> None:
    job = job_of(save(tmp_path / "in", zoo_model(name)), tmp_path / "out", [])
    steps, started = list[int](), list[Collection[int]]()
    quantize(job, steps.append, started.append)
    assert started == [{0, 1, 2}]
    assert sum(steps) == sum(job.layer_weights(i) for i in range(3))
    found = {key: t for key, t in tensors(job.out).items() if not key.endswith("weight_shape")}
    assert job.nbytes() == sum(t.nbytes for t in found.values() if t.ndim == 2)
    words = sum(t.numel() for key, t in found.items() if key.endswith("weight_packed"))
    assert sum(steps) == 8 * words


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_a_gguf_mixture_and_its_safetensors_twin_give_the_same_tensors(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Compiled products read GGUF's blocks alone, and add up in another order than torch.
    monkeypatch.setattr(products, "library", lambda: None)
    model = zoo_model(name)
    write_gguf(tmp_path / "a.gguf", model, tokenizer=True)
    save(tmp_path / "twin", model)
    for source, out in (("a.gguf", "a"), ("twin", "b")):
        done(job_of(tmp_path / source, tmp_path / out, IDS[:40]))
    found, expected = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


LINE = r"(\d+) of 24 experts were chosen by no token of the calibration text: all weights of a row"


@pytest.mark.parametrize("number", [2, 4])
def test_an_interrupted_run_over_a_mixture_goes_on_and_counts_the_same_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, number: int
) -> None:
    source = save(tmp_path / "in", zoo_model("qwen3_moe"))
    byte_level().save_pretrained(source)
    (tmp_path / "text").write_text("ab")
    arguments = ("--bits", 4, "--calibrate", tmp_path / "text")
    assert run(source, tmp_path / "whole", *arguments) == 0
    expected = re.findall(LINE, capsys.readouterr().err)
    with monkeypatch.context() as patch:
        interrupt_at(patch, number)
        assert run(source, tmp_path / "out", *arguments) == 130
    assert not (tmp_path / "out").exists()
    assert run(source, tmp_path / "out", *arguments) == 0
    assert re.findall(LINE, capsys.readouterr().err) == expected and len(expected) == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_nothing_is_said_of_experts_where_every_one_is_reached(tmp_path: Path, capsys: Any) -> None:
    source = save(tmp_path / "in", zoo_model("olmoe-clipped"))  # a token passes all of them
    byte_level().save_pretrained(source)
    (tmp_path / "text").write_text("a boat")
    assert run(source, tmp_path / "out", "--bits", 8, "--calibrate", tmp_path / "text") == 0
    assert run(source, tmp_path / "blind", "--bits", 8) == 0
    assert "chosen by no token" not in capsys.readouterr().err
