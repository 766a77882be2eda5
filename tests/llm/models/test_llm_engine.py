"""The engine against transformers on tiny random models."""

import pytest
import torch
from assets import (
    TINY,
    open_engine,
    reference_logits,
    relative_error,
    tiny_checkpoint,
    tiny_model,
)
from gguf_models import MIXED, write_gguf
from one_sequence import generate, mean_nll
from safetensors.torch import load_file, save_file
from zoo import LLAMA3

from layer_streamer.llm.models.config import UnsupportedModelError, model_config
from layer_streamer.llm.models.rope import rope_frequencies
from layer_streamer.llm.models.rope_config import Rope

DEFAULT = {"rope_type": "default"}
IDS = [1, 17, 300, 44, 511, 9, 9, 120, 63, 2, 250, 31]
MODELS = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-wide-heads": {"head_dim": 24},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-llama3-rope": {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8}},
    "qwen2": {},
    "qwen2-tied": {"tie_word_embeddings": True},
}


def tiny(name: str):
    return tiny_model(name.partition("-")[0], **MODELS[name])


@pytest.mark.parametrize("name", MODELS)
def test_prompt_and_teacher_forced_steps_give_the_logits_of_transformers(tmp_path, name):
    model = tiny(name)
    expected = reference_logits(model, IDS)
    with open_engine(tiny_checkpoint(tmp_path, model), model.config) as engine:
        found = [engine.forward(IDS[:6], every_position=True)]
        found += [engine.forward([token]) for token in IDS[6:]]
    assert relative_error(torch.cat(found), expected) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "llama-wide-heads", "llama-tied", "qwen2"])
def test_a_gguf_file_gives_the_logits_of_its_dequantized_twin(tmp_path, name):
    model, path = tiny(name), tmp_path / "tiny.gguf"
    write_gguf(path, model)
    with open_engine(path, model.config) as engine:
        found = [engine.forward(IDS[:6], every_position=True)]
        found += [engine.forward([token]) for token in IDS[6:]]
    assert relative_error(torch.cat(found), reference_logits(model, IDS)) <= 1e-5


def test_rope_factors_of_a_gguf_file_are_the_scaling_of_its_safetensors_twin(tmp_path):
    model, path = tiny("llama-llama3-rope"), tmp_path / "tiny.gguf"
    scaled = model_config(model.config)
    theta = scaled.rope(0).theta
    factors = rope_frequencies(Rope(theta), 16) / rope_frequencies(scaled.rope(0), 16)
    write_gguf(path, model, rope_factors=factors)
    plain = model_config(
        tiny_model("llama", rope_parameters=DEFAULT | {"rope_theta": theta}).config
    )
    with open_engine(path, plain) as engine:
        found = engine.forward(IDS, every_position=True)
    assert relative_error(found, reference_logits(model, IDS)) <= 1e-5


def test_a_prompt_in_chunks_gives_the_logits_of_the_whole(tmp_path):
    model = tiny("llama")
    with open_engine(tiny_checkpoint(tmp_path, model), model.config) as engine:
        chunks = [engine.forward(part, every_position=True) for part in (IDS[:5], IDS[5:])]
    assert relative_error(torch.cat(chunks), reference_logits(model, IDS)) <= 1e-5


def test_greedy_text_is_that_of_transformers(tmp_path):
    model = tiny("qwen2")
    expected = model.generate(
        torch.tensor([IDS]), attention_mask=torch.ones(1, len(IDS)), max_new_tokens=20,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with open_engine(tiny_checkpoint(tmp_path, model), model.config) as engine:
        found = list(generate(engine, IDS, max_new_tokens=20))
    assert found == expected[0, len(IDS) :].tolist()


def test_generation_ends_with_the_first_stop_id_and_yields_it(tmp_path):
    model = tiny("llama")
    path = tiny_checkpoint(tmp_path, model)
    with open_engine(path, model.config) as engine:
        text = list(generate(engine, IDS, max_new_tokens=10))
    stop = text[4]
    with open_engine(path, model.config) as engine:
        cut = list(generate(engine, IDS, max_new_tokens=10, stop_ids={stop}))
    assert cut == text[: text.index(stop) + 1]


def test_mean_nll_is_the_loss_of_transformers(tmp_path):
    model = tiny("llama")
    with open_engine(tiny_checkpoint(tmp_path, model), model.config) as engine:
        found = mean_nll(engine, IDS)
    ids = torch.tensor([IDS])
    with torch.no_grad():
        assert found == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-6)


def test_a_pass_that_fails_leaves_the_sequence_as_it_was(tmp_path):
    model = tiny("llama")

    def fail(layer_idx: int) -> None:
        if layer_idx == 2:
            raise RuntimeError("stop here")

    with open_engine(tiny_checkpoint(tmp_path, model), model.config) as engine:
        engine.forward(IDS[:-1])
        with pytest.raises(RuntimeError, match="stop here"):
            engine.forward([5], on_layer=fail)
        found = engine.forward(IDS[-1:])
    assert relative_error(found, reference_logits(model, IDS)[-1:]) <= 1e-5


@pytest.mark.parametrize("ids", [[], [1] * 65])
def test_no_tokens_and_too_many_tokens_are_errors(tmp_path, ids):
    model = tiny("llama")
    path = tiny_checkpoint(tmp_path, model)
    with (
        open_engine(path, model.config) as engine,
        pytest.raises(ValueError, match="room is for 64"),
    ):
        engine.forward(ids)


def test_bfloat16_stays_near_float32(tmp_path):
    model = tiny("llama")
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model)
    with open_engine(path, model.config, dtype=torch.bfloat16) as engine:
        found = engine.forward(IDS, every_position=True)
    assert relative_error(found, reference_logits(model, IDS)) <= 0.1


def edit_weights(directory, edit) -> None:
    """Rewrite a checkpoint's tensors after ``edit(tensors)`` has changed them."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def refuse(path, config, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message), open_engine(path, config):
        pass


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "layer 1: tensor 'mlp.up_proj"),
        (lambda t: t.pop("model.layers.0.self_attn.k_proj.bias"), "k_proj.bias' is missing"),
        (lambda t: t.pop("lm_head.weight"), "'lm_head.weight' is missing"),
        (
            lambda t: t.update({"model.layers.2.self_attn.q_norm.weight": torch.ones(16)}),
            "layer 2: tensor 'self_attn.q_norm.weight' is no part of a qwen2 model",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(63)}),
            r"'model.norm.weight' has shape \[63\], the config says \[64\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
            "dtype torch.int8, not a plain float",
        ),
    ],
)
def test_weights_that_contradict_the_config_are_named_before_a_byte_is_streamed(
    tmp_path, edit, message
):
    model = tiny("qwen2")
    edit_weights(tiny_checkpoint(tmp_path, model), edit)
    refuse(tmp_path, model.config, message)


def test_a_layer_count_that_contradicts_the_config_is_named(tmp_path):
    model = tiny("llama")
    config = type(model.config)(**(TINY | {"num_hidden_layers": 4}))
    refuse(tiny_checkpoint(tmp_path, model), config, "3 layers, the config says 4")


def test_a_packed_type_that_the_engine_cannot_unpack_is_named(tmp_path, monkeypatch):
    model, path = tiny_model("llama", hidden_size=256), tmp_path / "tiny.gguf"
    monkeypatch.setitem(MIXED, "mlp.up_proj", "TQ2_0")
    write_gguf(path, model)
    refuse(path, model.config, r"ffn_up.weight' is TQ2_0, .* Q4_1, Q5_0, Q5_1, Q8_0")


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_gives_the_logits_of_transformers(tmp_path, name):
    model = tiny(name)
    with open_engine(tiny_checkpoint(tmp_path, model), model.config, device="cuda") as engine:
        found = [engine.forward(IDS[:6], every_position=True)]
        found += [engine.forward([token]) for token in IDS[6:]]
    assert relative_error(torch.cat(found).cpu(), reference_logits(model, IDS)) <= 1e-5
