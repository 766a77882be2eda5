"""Every architecture against transformers, on tiny random models."""

from dataclasses import replace

import pytest
import torch
from assets import edit_weights, relative_error, tiny_checkpoint
from forward import Forward, open_forward
from zoo import CASES, CLASSES, DENSE, reference, stepwise, zoo_model

from layer_streamer import read_manifest
from layer_streamer.llm.kernels.fused import plain_rms_norm
from layer_streamer.llm.metadata import load_config
from layer_streamer.llm.models import model as model_functions
from layer_streamer.llm.models.config import model_config
from layer_streamer.llm.models.names import weight_names
from layer_streamer.llm.models.rope import rotate
from layer_streamer.llm.models.rope_config import Rope

TOLERANCE = 1e-5
VISIBLE = 100 * TOLERANCE
"""What each mutation must exceed, or the comparison would not see it."""


RARER = (
    "llama-tied", "llama-one-kv-head", "qwen2-tied", "qwen2-window-not-used", "qwen3-tied",
    "qwen3-biases", "mistral-full", "mixtral-full", "olmoe-clipped", "gemma3_text-untied",
)  # fmt: skip
"""Which test_llm_runner.py has, too."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in RARER else []) for n in CASES]
)
def test_prompt_and_teacher_forced_steps_give_the_logits_of_transformers(tmp_path, name):
    model = zoo_model(name)
    path = tiny_checkpoint(tmp_path, model)
    with open_forward(path, load_config(path)) as forward:
        found = stepwise(forward)
    assert relative_error(found, reference(model)) <= TOLERANCE


QUICK = ("llama-llama3", "llama-biases", "qwen2-yarn", "qwen3", "mistral", "gemma3_text")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in DENSE]
)
def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(tmp_path, name):
    path = tiny_checkpoint(tmp_path, zoo_model(name).to(torch.bfloat16))
    load = CLASSES[name.partition("-")[0]][1].from_pretrained  # keeps frequencies in float32
    theirs, exact = (reference(load(path, dtype=d)) for d in (torch.bfloat16, torch.float32))
    with open_forward(path, load_config(path), dtype=torch.bfloat16) as forward:
        ours = stepwise(forward)
    ours, theirs = ((logits - exact).square().mean().sqrt() for logits in (ours, theirs))
    assert ours <= 1.25 * theirs


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_gives_the_logits_of_transformers(tmp_path, name):
    model = zoo_model(name)
    with open_forward(tiny_checkpoint(tmp_path, model), model.config, device="cuda") as forward:
        assert relative_error(stepwise(forward), reference(model)) <= TOLERANCE


def mutated_error(tmp_path, name: str, **changes) -> float:
    """How far an engine is off whose config differs from the model's."""
    model = zoo_model(name)
    config = replace(model_config(model.config), **changes)
    with open_forward(tiny_checkpoint(tmp_path, model), config) as forward:
        return relative_error(stepwise(forward), reference(model))


@pytest.mark.parametrize("kind", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"])
def test_a_bias_left_out_shows(tmp_path, kind):
    model = zoo_model("llama-biases")
    expected = reference(model)
    path = tiny_checkpoint(tmp_path, model)
    edit_weights(path, lambda t: [x.zero_() for n, x in t.items() if n.endswith(f"{kind}.bias")])
    with open_forward(path, model.config) as forward:
        assert relative_error(stepwise(forward), expected) > VISIBLE


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_a_norm_of_heads_after_the_rotation_shows(tmp_path, monkeypatch, name):
    def wrong(x, weights, config, table):
        normed = plain_rms_norm(x, weights.norm("input_layernorm"), config.norm_eps)

        def heads(part: str) -> torch.Tensor:
            y = weights.linear(normed, f"self_attn.{part}_proj")
            return y.view(len(y), -1, config.head_dim).transpose(0, 1)

        def turned(part: str) -> torch.Tensor:
            y = rotate(heads(part), table, interleaved=False)
            return plain_rms_norm(y, weights.norm(f"self_attn.{part}_norm"), config.norm_eps)

        return turned("q"), turned("k"), heads("v")

    monkeypatch.setattr(model_functions, "attention_inputs", wrong)
    assert mutated_error(tmp_path, name) > VISIBLE


@pytest.mark.parametrize(
    "name", ["llama-llama3", "llama-linear", "llama-dynamic", "qwen2-yarn", "gemma3_text"]
)
def test_scaling_left_out_shows(tmp_path, name):
    config = model_config(zoo_model(name).config)
    unscaled = tuple(Rope(rope.theta) for rope in config.ropes)
    assert unscaled != config.ropes
    assert mutated_error(tmp_path, name, ropes=unscaled) > VISIBLE


def test_the_magnitude_of_yarn_left_out_shows(tmp_path):
    rope = model_config(zoo_model("qwen2-yarn").config).rope(0)
    small = Rope(rope.theta, replace(rope.scaling, attention_factor=1.0))
    assert mutated_error(tmp_path, "qwen2-yarn", ropes=(small,) * 3) > VISIBLE


@pytest.mark.parametrize("off", [-1, 1])
@pytest.mark.parametrize("name", ["mistral", "qwen2-window", "gemma3_text"])
def test_a_window_that_is_one_off_shows(tmp_path, name, off):
    windows = model_config(zoo_model(name).config).windows
    wrong = tuple(None if window is None else window + off for window in windows)
    assert mutated_error(tmp_path, name, windows=wrong) > VISIBLE


@pytest.mark.parametrize("field", ["embed_scale", "attention_scale"])
def test_a_scale_left_out_shows(tmp_path, field):
    assert mutated_error(tmp_path, "gemma3_text", **{field: 1.0}) > VISIBLE


def test_norms_that_are_not_zero_centered_show(tmp_path):
    model = zoo_model("gemma3_text")
    path = tiny_checkpoint(tmp_path, model)
    names = weight_names(read_manifest(path), model_config(model.config))
    with open_forward(path, model.config, names=replace(names, norm_offset=0.0)) as forward:
        assert relative_error(stepwise(forward), reference(model)) > VISIBLE


def test_a_mask_that_starts_at_the_first_position_shows(tmp_path, monkeypatch):
    def top_left(self, tokens, positions, device):
        return torch.arange(tokens)[:, None] - torch.arange(positions)

    model = zoo_model("llama")
    expected = reference(model)
    with open_forward(tiny_checkpoint(tmp_path, model), model.config) as forward:
        right = stepwise(forward, prompt=20)
    monkeypatch.setattr(Forward, "distance", top_left)
    with open_forward(tmp_path, model.config) as forward:
        wrong = stepwise(forward, prompt=20)
    assert relative_error(right, expected) <= TOLERANCE
    assert relative_error(wrong, expected) > VISIBLE
