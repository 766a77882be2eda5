"""What is built for transformers' models, used with streamed ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import gguf_to_safetensors
import numpy as np
import pytest
import torch
import transformers
from assets import AGREED, GOLDEN, one_torch_thread, prompt_ids, smollm2
from recipes import loaded, quiet
from tiny_models import tiny_class, tiny_config, tiny_model
from torch import nn

from layer_streamer import stream
from layer_streamer.llm.metadata import load_tokenizer

IDS = torch.tensor([[9, 17, 33, 12]])


def pair(folder: Path, name: str = "llama", seed: int = 0) -> tuple[Any, Any]:
    """A resident model, and the same streamed."""
    with quiet():
        tiny_model(name, seed).save_pretrained(folder)
        return loaded(tiny_class(name), folder).eval(), stream(folder, device="cpu", n_gpu=1)


def tokens(model: Any, **options: Any) -> torch.Tensor:
    with quiet():
        found: torch.Tensor = model.generate(
            IDS, max_new_tokens=7, min_new_tokens=7, do_sample=False, pad_token_id=0, **options
        )
    return found


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"use_cache": False}, {"num_beams": 2, "num_return_sequences": 2}],
)
def test_generate_takes_its_options(tmp_path: Path, options: dict[str, Any]) -> None:
    plain, model = pair(tmp_path)
    assert torch.equal(tokens(model, **options), tokens(plain, **options))
    model.layer_streamer.close()


def test_one_streamed_model_assists_another(tmp_path: Path) -> None:
    plain, model = pair(tmp_path / "a")
    _, assistant = pair(tmp_path / "b", seed=4)
    assert torch.equal(tokens(model, assistant_model=assistant), tokens(plain))
    assert assistant.layer_streamer.last_pass
    for some in (model, assistant):
        some.layer_streamer.close()


def test_hidden_states_and_users_hooks_are_as_ever(tmp_path: Path) -> None:
    plain, model = pair(tmp_path)
    seen: dict[str, list[torch.Tensor]] = {"plain": [], "model": []}
    for name, some in (("plain", plain), ("model", model)):

        def look(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            seen[name].append(output[0] if isinstance(output, tuple) else output)

        some.model.layers[1].register_forward_hook(look)
    with torch.no_grad():
        want = plain(IDS, output_hidden_states=True).hidden_states
        got = model(IDS, output_hidden_states=True).hidden_states
    assert all(torch.equal(*both) for both in zip(got, want, strict=True))
    assert torch.equal(seen["model"][0], seen["plain"][0])
    model.layer_streamer.close()


def test_running_out_of_memory_says_which_numbers_to_change(tmp_path: Path) -> None:
    _, model = pair(tmp_path)

    def fail(module: nn.Module, args: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        model(IDS)
    assert "lower device_budget= or raise reserve_bytes=" in "".join(raised.value.__notes__)
    handle.remove()
    with torch.no_grad():
        model(IDS)
    model.layer_streamer.close()


def classified(model: Any, task: str) -> Any:
    """What a pipeline says of a second of noise, or a picture of it."""
    random, pipeline = np.random.default_rng(0), cast(Any, transformers.pipeline)
    if task == "audio-classification":
        reader: Any = transformers.Wav2Vec2FeatureExtractor()
        classify = pipeline(task, model=model, feature_extractor=reader)
        return classify(random.standard_normal(8000, dtype=np.float32), top_k=5)
    images = pytest.importorskip("PIL.Image")
    pil = pytest.importorskip("transformers.models.vit.image_processing_pil_vit")
    reader = pil.ViTImageProcessorPil(size={"height": 32, "width": 32})
    classify = pipeline(task, model=model, image_processor=reader)
    return classify(images.fromarray(random.integers(0, 256, (40, 50, 3), np.uint8)), top_k=5)


@pytest.mark.parametrize(
    ("task", "name", "cls"),
    [
        ("audio-classification", "wav2vec2", "AutoModelForAudioClassification"),
        ("image-classification", "vit", "AutoModelForImageClassification"),
    ],
)
def test_pipelines_classify_sounds_and_pictures(
    tmp_path: Path, task: str, name: str, cls: str
) -> None:
    config = tiny_config(name)
    config.num_labels = 5
    with quiet():
        torch.manual_seed(3)
        plain = getattr(transformers, cls).from_config(config).eval()
        plain.save_pretrained(tmp_path)
        model: Any = stream(tmp_path, device="cpu", n_gpu=1)
        assert type(model) is type(plain)
        found = classified(model, task)
        assert found == classified(plain, task) and len(found) == 5
    model.layer_streamer.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sequences"),
    [
        ({"read_mode": "mapped"}, ["model.layers"]),
        ({"device_budget": "70MiB"}, ["model.layers", "lm_head"]),
    ],
)
def test_a_real_models_greedy_ids_are_the_golden_ones(
    tmp_path: Path, options: dict[str, Any], sequences: list[str]
) -> None:
    """70 MiB: of which the matrix that embedding and head share is 108 alone."""
    twin = tmp_path / "twin"
    assert gguf_to_safetensors.main([str(smollm2()), str(twin), "--dtype", "float32"]) == 0
    model: Any = stream(twin, device="cpu", **options)
    assert list(model.layer_streamer.plan.sequences) == sequences
    assert type(model) is transformers.LlamaForCausalLM
    tokenizer = load_tokenizer(twin)
    with one_torch_thread(), quiet():
        for key in AGREED:
            golden = GOLDEN[key]
            prompt = torch.tensor([prompt_ids(tokenizer, key)])
            found = model.generate(
                prompt, do_sample=False, max_new_tokens=len(golden["new_ids"]), pad_token_id=2
            )
            assert found[0, prompt.shape[1] :].tolist() == golden["new_ids"]
        answer = transformers.pipeline("text-generation", model=model, tokenizer=str(twin))
        (said,) = answer("The capital of France is", max_new_tokens=1, do_sample=False)
    assert said["generated_text"].endswith(" Paris")
    model.layer_streamer.close()


@pytest.mark.slow
def test_adapters_of_peft_are_added_loaded_and_switched(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plain, model = pair(tmp_path / "model")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with quiet():
        torch.manual_seed(1)
        resident = peft.get_peft_model(plain, config)
        resident.save_pretrained(tmp_path / "one")
        torch.manual_seed(2)
        resident.add_adapter("other", config)
        resident.save_pretrained(tmp_path / "two", selected_adapters=["other"])
        streamed = peft.PeftModel.from_pretrained(model, tmp_path / "one")
        streamed.load_adapter(tmp_path / "two" / "other", "other")
        for adapter, name in (("default", "default"), ("other", "other"), ("default", "default")):
            resident.set_adapter(adapter)
            streamed.set_adapter(name)
            assert torch.equal(tokens(streamed), tokens(resident))
            with torch.no_grad():
                assert torch.equal(streamed(IDS).logits, resident(IDS).logits)
    model.layer_streamer.close()
