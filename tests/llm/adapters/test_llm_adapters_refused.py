"""What is no adapter of a model: one line, with the folder, before anything is opened."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_made import CONFIG, WEIGHTS, adapted, edit_adapter, edit_config
from assets import tiny_checkpoint
from zoo import zoo_model

from layer_streamer.llm.adapters.reading import AdapterError, read_adapter
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.opening import Model

KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"), zoo_model("llama"))


@pytest.fixture(scope="module")
def model(base: Path) -> Model:
    return Model.read(base, print)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapted(zoo_model("llama"), folder)
    return folder


@pytest.fixture
def made(whole: Path, tmp_path: Path) -> Path:
    """An adapter to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "made"))


def renamed(new: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.update({new: tensors.pop(KEY)})


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda at: (at / CONFIG).unlink(), "no adapter: has no adapter_config.json"),
    "another kind": (lambda at: edit_config(at, peft_type="IA3"), "peft_type is 'IA3'"),
    "DoRA": (lambda at: edit_config(at, use_dora=True), "use_dora=True: not added here"),
    "a kind to come": (lambda at: edit_config(at, use_later=1), "use_later=1: not added here"),
    "biases": (lambda at: edit_config(at, bias="all"), "bias='all': not added here"),
    "whole modules": (
        lambda at: edit_config(at, modules_to_save=["lm_head"]), "modules_to_save=['lm_head']",
    ),
    "experts by parameter": (
        lambda at: edit_config(at, target_parameters=["mlp.experts.down_proj"]),
        "target_parameters=",
    ),
    "no weights": (lambda at: (at / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "pickled": (
        lambda at: (at / WEIGHTS).rename(at / "adapter_model.bin"), "adapter_model.bin, which",
    ),
    "cut off": (
        lambda at: (at / WEIGHTS).write_bytes((at / WEIGHTS).read_bytes()[:500]),
        "adapter_model.safetensors cannot be read",
    ),
    "the head": (
        lambda at: edit_adapter(at, renamed("base_model.model.lm_head.lora_A.weight")),
        "'lm_head' is in no layer",
    ),
    "another tower": (
        lambda at: edit_adapter(
            at, renamed("base_model.model.vision_tower.layers.1.q_proj.lora_A.weight")
        ),
        "'vision_tower.layers.1.q_proj' is in no layer",
    ),
    "an expert": (
        lambda at: edit_adapter(at, renamed(KEY.replace("self_attn.q_proj", "mlp.experts.0.w1"))),
        "is of experts",
    ),
    "an unknown module": (
        lambda at: edit_adapter(at, renamed(KEY.replace("q_proj", "qkv_proj"))),
        "layer 1 has no such matrix",
    ),
    "more layers": (
        lambda at: edit_adapter(at, renamed(KEY.replace(".1.", ".40."))), "the model has 3 layers",
    ),
    "another tensor": (
        lambda at: edit_adapter(at, renamed(KEY.replace("lora_A.weight", "lora_magnitude_vector"))),
        "is none of LoRA's two matrices",
    ),
    "one of two": (
        lambda at: edit_adapter(at, lambda t: t.pop(KEY)), "one of its two matrices is missing",
    ),
    "another width": (
        lambda at: edit_adapter(at, lambda t: t.update({KEY: torch.zeros(3, 8)})),
        "layers.1.self_attn.q_proj: (3, 8) and (96, 3) do not stand beside a matrix of (96, 64)",
    ),
    "codes": (
        lambda at: edit_adapter(at, lambda t: t.update({KEY: torch.zeros(3, 64).char()})),
        "is no matrix of floats",
    ),
    "an odd alpha": (lambda at: edit_config(at, lora_alpha="much"), "lora_alpha='much'"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_no_adapter_of_the_model_is_refused_in_one_line(
    made: Path, model: Model, name: str
) -> None:
    read_adapter(made, model.names, model.config)
    damage, message = CASES[name]
    damage(made)
    with pytest.raises(AdapterError) as caught:
        read_adapter(made, model.names, model.config)
    said = str(caught.value)
    assert said.startswith(f"{made}: ") and message in said and "\n" not in said


def test_which_model_an_adapter_says_that_it_is_of_is_told_where_it_is_another(
    made: Path, base: Path
) -> None:
    for name, told in (("some/other", True), (f"some/{base.name}", False)):
        edit_config(made, base_model_name_or_path=name)
        heard: list[str] = []
        StreamingEngine(base, device="cpu", adapter=made, notify=heard.append).close()
        assert any("an adapter of some/other" in line for line in heard) == told
