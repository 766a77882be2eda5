"""Models with other parts, whose text part runs; and what is no language model at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import edit_weights, relative_error, tiny_checkpoint
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
)
from zoo import CASES, GEMMA, TINY, randomise, reference, zoo_model

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.errors import UnsupportedModelError
from layer_streamer.llm.opening import Model

IDS = list(range(3, 60, 2))
EYES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 28,
        "num_attention_heads": 2, "patch_size": 14}  # fmt: skip
TEXT_GEMMA = TINY | GEMMA | {"model_type": "gemma3_text"}
TEXT_QWEN = TINY | {"model_type": "qwen2"}
TEXT_MISTRAL = TINY | CASES["mistral"] | {"model_type": "mistral"}


def whole_model(name: str) -> Any:
    """A tiny model with eyes; every parameter is random."""
    torch.manual_seed(0)
    eyes = EYES | {"model_type": "clip_vision_model" if name == "llava" else "siglip_vision_model"}
    if name == "gemma3":
        config = Gemma3Config(text_config=TEXT_GEMMA, vision_config=eyes, mm_tokens_per_image=4)
        model = Gemma3ForConditionalGeneration(config)
    elif name == "llava":
        config = LlavaConfig(text_config=TEXT_QWEN, vision_config=eyes)
        model = LlavaForConditionalGeneration(config)
    else:
        eyes |= {"model_type": "pixtral", "head_dim": 16}
        config = Mistral3Config(text_config=TEXT_MISTRAL, vision_config=eyes)
        model = Mistral3ForConditionalGeneration(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            randomise(key, parameter, zero_centered=name == "gemma3")
    return model.eval()


def logits(path: Path) -> tuple[torch.Tensor, list[str]]:
    """The engine's, and its notes."""
    notes: list[str] = []
    options = {"device": "cpu", "dtype": torch.float32, "max_length": 64}
    with StreamingEngine(path, notify=notes.append, **options) as engine:
        runner = engine._runner
        row = runner.kv.rows.add(64)
        return runner.forward([(row, torch.tensor(IDS))], every_position=True), notes


def expected(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS]), use_cache=False).logits[0]


@pytest.mark.parametrize("name", ["gemma3", "llava", "mistral3"])
def test_the_text_part_of_a_model_with_images_gives_the_text_of_the_whole(tmp_path, name):
    model = whole_model(name)
    model.save_pretrained(tmp_path)
    found, notes = logits(tmp_path)
    assert relative_error(found, expected(model)) <= 1e-5
    assert len(notes) == 1 and f"the text part of a {name} model" in notes[0]
    assert "vision_tower" in notes[0] and "multi_modal_projector" in notes[0]


def rename(path: Path, stem: str, head: str) -> None:
    """Give the text part of a plain checkpoint other names."""
    tensors = load_file(path / "model.safetensors")
    named = {
        head if name == "lm_head.weight" else name.replace("model.", stem, 1): tensor
        for name, tensor in tensors.items()
    }
    save_file(named, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("stem", "head"),
    [
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
        ("model.language_model.model.", "lm_head.weight"),
        ("model.text_model.", "lm_head.weight"),
        ("thinker.model.", "thinker.lm_head.weight"),
        ("", "lm_head.weight"),
    ],
)
def test_the_names_of_a_text_part_are_found(tmp_path, stem, head):
    model = zoo_model("llama")
    path = tiny_checkpoint(tmp_path, model)
    rename(path, stem, head)
    found, notes = logits(path)
    assert relative_error(found, reference(model, IDS, len(IDS))) <= 1e-5 and notes == []


def test_a_prefix_that_is_named_is_that_of_embedding_and_norm_too(tmp_path):
    model = zoo_model("llama")
    path = tiny_checkpoint(tmp_path, model)
    rename(path, "deep.inside.model.", "deep.inside.lm_head.weight")
    with pytest.raises(ValueError, match=r"deep.inside.model.layers.\{i\}. \(3\)"):
        Model.read(path, pytest.fail)
    read = Model.read(path, pytest.fail, "deep.inside.model.layers.{i}.")
    assert read.names.head == "deep.inside.lm_head.weight"
    assert read.names.norm == "deep.inside.model.norm.weight"


def test_a_tensor_of_the_text_part_that_nothing_uses_is_refused(tmp_path):
    whole_model("gemma3").save_pretrained(tmp_path)
    stem = "language_model.model."
    if not any(name.startswith(stem) for name in load_file(tmp_path / "model.safetensors")):
        stem = "model.language_model."
    for name in (f"{stem}extra.weight", "language_model.lm_head.bias"):
        edit_weights(tmp_path, lambda t, name=name: t.update({name: torch.ones(3)}))
        with pytest.raises(UnsupportedModelError, match=f"'{name}' is no part"):
            Model.read(tmp_path, pytest.fail)
        edit_weights(tmp_path, lambda t, name=name: t.pop(name))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "bert"}, "'bert' is not supported: an encoder, which generates no text"),
        ({"model_type": "xlm-roberta"}, "an encoder, which generates no text"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "'t5' .*: an encoder-decoder"),
        (
            {"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3_vl_text"}},
            "'qwen3_vl_text' is not supported, the text part of a qwen3_vl model",
        ),
        ({"_class_name": "UNet2DConditionModel"}, "a part of a diffusers pipeline .UNet2DCond"),
        ({"model_type": "llama", "is_causal": False}, "is_causal=False is not supported"),
    ],
)
def test_what_is_no_decoder_is_named_for_what_it_is(tmp_path, fields, message):
    tensors = {f"encoder.layer.{i}.attention.self.query.weight": torch.ones(2, 2) for i in range(2)}
    if fields.get("model_type") == "llama":
        tensors = {"model.layers.0.x": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        Model.read(tmp_path, pytest.fail)
    assert "\n" not in str(caught.value) and "config.json" in str(caught.value)


def test_transformers_loads_what_the_text_part_quantizes_to(tmp_path):
    from quantizing import run, tensors, weights

    model = whole_model("gemma3")
    model.save_pretrained(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out", "--bits", 8, "--dtype", "float32") == 0
    written = weights(tmp_path / "out", 8)
    assert all(name.startswith("model.") for name in tensors(tmp_path / "out"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(theirs).__name__ == "Gemma3ForCausalLM"
    found, notes = logits(tmp_path / "out")
    assert relative_error(found, reference(theirs, IDS, len(IDS))) <= 1e-5 and notes == []
    table = model.model.language_model.embed_tokens.weight
    assert torch.equal(written["model.embed_tokens.weight"], table)
