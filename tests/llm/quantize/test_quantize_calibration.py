"""What a text adds: moments of inputs, weighted errors, and how well a model predicts it."""

import math
from collections import defaultdict
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from assets import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizing import importance_of, read, save, weights
from zoo import zoo_model

from layer_streamer.llm.models.config import model_config
from layer_streamer.llm.quantize.grouping import choose_groups
from layer_streamer.llm.quantize.job import Job, quantize
from layer_streamer.llm.quantize.layers import Recipe
from layer_streamer.llm.quantize.moments import LEAST_SHARE, Watched
from layer_streamer.llm.quantize.perplexity import perplexity
from layer_streamer.llm.quantize.scales import Rounding
from layer_streamer.llm.quantize.texts import WINDOW, open_streamer, windows

CPU = torch.device("cpu")
IDS = torch.randint(3, 512, (300,), generator=torch.Generator().manual_seed(5)).tolist()
"""More than the context of the tiny models, which is 256."""
NAMES = ("llama-biases", "qwen2-window", "qwen3-tied", "mistral", "gemma3_text", "llama-dynamic")


def parts(model):
    """The ids in windows of the model's context, as far as its scaling extends it.

    Whole ones, where the rotation goes by the length: transformers' model then rotates a window for
    the longest that was before it.
    """
    size = model_config(model.config).max_positions
    dynamic = model.config.rope_parameters.get("rope_type") == "dynamic"
    end = len(IDS) // size * size if dynamic else len(IDS)
    return [IDS[at : at + size] for at in range(0, end, size)]


@pytest.mark.parametrize("name", NAMES)
def test_moments_are_those_of_the_inputs_that_transformers_modules_get(tmp_path, name):
    model = zoo_model(name)
    seen = defaultdict(list)
    for key, module in model.named_modules():
        if key.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, x, key=key: seen[key].append(x[0][0]))
    with torch.no_grad():
        for ids in parts(model):
            model(torch.tensor([ids]), use_cache=False)
    found = importance_of(read(save(tmp_path / "in", model)), [*chain.from_iterable(parts(model))])
    assert len(seen) == 7 * len(found)
    for key, inputs in seen.items():
        squares = torch.cat(inputs).double().square().mean(0)
        shares = (squares / squares.mean()).clamp_min(LEAST_SHARE)
        _, _, layer_idx, module = key.split(".", 3)
        ours = found[int(layer_idx)][module].double()
        assert relative_error(ours, shares) <= 1e-4, key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("logit_tokens", [256, 7])
def test_perplexity_is_that_of_transformers(tmp_path, monkeypatch, name, logit_tokens):
    monkeypatch.setattr("layer_streamer.llm.quantize.perplexity.LOGIT_TOKENS", logit_tokens)
    model = zoo_model(name)
    total, count = 0.0, 0
    for ids in parts(model):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        total += float(F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum"))
        count += len(ids) - 1
    layers = []
    ids = [*chain.from_iterable(parts(model))]
    found = perplexity(read(save(tmp_path / "in", model)), ids, CPU, layers.append)
    assert found == pytest.approx(math.exp(total / count), rel=1e-4)
    assert layers == list(range(model.config.num_hidden_layers))


@pytest.mark.parametrize("head", [False, True])
def test_two_layers_are_in_memory_however_many_there_are(tmp_path, head):
    source = read(save(tmp_path / "in", zoo_model("llama", num_hidden_layers=9)))
    with open_streamer(source, CPU, head=head) as streamer:
        assert streamer.plan.placement.device_slots[0].count == 2
        assert streamer.plan.placement.host_bytes == 0


@given(st.integers(0, 5000), st.integers(1, 3000))
def test_windows_cover_a_text_once_and_are_no_longer_than_the_context(tokens, most):
    found = windows(tokens, most)
    assert [i for window in found for i in range(window.start, window.stop)] == list(range(tokens))
    assert all(window.stop - window.start <= min(WINDOW, most) for window in found)


def skewed_model(seed: int):
    """A model in which a few channels of every input are much larger than the others."""
    model = zoo_model("llama", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                loud = torch.rand(parameter.shape, generator=generator) < 0.1
                parameter.copy_(torch.where(loud, 10.0, 0.3))
    return model


def errors_of(tmp_path, model, calibration, name: str) -> dict[str, float]:
    """Relative errors, by module, of what the quantized matrices make of the inputs of IDS."""
    source = read(tmp_path / "in")
    recipe = Recipe(Rounding(4, torch.float32), choose_groups(source.config, 32))
    job = Job(model=source, recipe=recipe, out=tmp_path / name, device=CPU, calibration=calibration)
    quantize(job, lambda _: None, lambda _: None)
    changed = weights(job.out, 4)
    found = {}

    def watch(key, module, inputs):
        x = inputs[0][0].double()
        difference = changed[f"{key}.weight"].double() - module.weight.double()
        found[key] = float((x @ difference.t()).norm() / (x @ module.weight.double().t()).norm())

    hooks = [
        module.register_forward_pre_hook(lambda m, x, key=key: watch(key, m, x))
        for key, module in model.named_modules()
        if key.endswith("_proj")
    ]
    with torch.no_grad():
        model(torch.tensor([IDS[:256]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("seed", range(4))
def test_calibration_lowers_the_errors_of_outputs_where_inputs_are_skewed(tmp_path, seed):
    model = skewed_model(seed)
    save(tmp_path / "in", model)
    other = torch.randint(3, 512, (256,), generator=torch.Generator().manual_seed(99)).tolist()
    blind = errors_of(tmp_path, model, (), "blind")
    aware = errors_of(tmp_path, model, other, "aware")
    skewed = [key for key in blind if "o_proj" not in key and "down_proj" not in key]
    for key in skewed:
        assert aware[key] < 0.9 * blind[key], key
    assert sum(aware.values()) < 0.9 * sum(blind.values())


class Fed(Watched):
    """Watched over one matrix that is only looked at."""

    def __init__(self) -> None:
        self._sums, self.layer_idx = {}, 3

    def see(self, squares: torch.Tensor) -> None:
        self._sums["m"] = squares


@settings(max_examples=50)
@given(st.lists(st.floats(0, 2.0**90, width=32), min_size=1, max_size=40))
def test_every_channel_counts_something(squares):
    watched = Fed()
    watched.see(torch.tensor(squares))
    found = watched.importance()["m"]
    assert found.isfinite().all() and (found >= LEAST_SHARE * 0.999).all()


def test_inputs_that_are_not_finite_are_an_error_with_layer_and_matrix():
    watched = Fed()
    watched.see(torch.tensor([1.0, torch.inf]))
    with pytest.raises(ValueError, match="layer 3: the calibration text makes inputs of m"):
        watched.importance()
