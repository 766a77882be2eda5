"""Logits that are not numbers end their row, in an error that names the pass and the layer."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import edit_weights
from byte_model import byte_model
from small_engine import PROMPTS, make_engine, message

from layer_streamer.llm.errors import NotFiniteError

OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "top_k": 20, "seed": 3}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("tiny"))


def spoiled(path: Path, to: Path, name: str, spoil: Callable[[torch.Tensor], Any]) -> Path:
    """A copy of a model, of which one tensor is changed."""
    shutil.copytree(path, to, dirs_exist_ok=True)
    edit_weights(to, lambda tensors: spoil(tensors[name]))
    return to


PLACES = {
    "model.embed_tokens.weight": "the embedding",
    "model.layers.0.input_layernorm.weight": "layer 0",
    "model.layers.0.self_attn.v_proj.bias": "layer 0",
    "model.layers.1.mlp.up_proj.weight": "layer 1",
    "model.layers.2.self_attn.k_proj.weight": "layer 2",
    "model.norm.weight": "the final norm or the output head",
    "lm_head.weight": "the output head",
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", PLACES)
def test_a_weight_that_is_no_number_ends_in_an_error_that_names_it(
    path: Path, tmp_path: Path, name: str, value: float
) -> None:
    def spoil(tensor: torch.Tensor) -> None:
        tensor.view(-1)[:: 1 if math.isnan(value) else 3] = value

    spoiled(path, tmp_path, name, spoil)
    chosen: list[dict[str, Any]] = [{"temperature": 0}, OPTIONS, {"repetition_penalty": 2.0}]
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for dtype, options in zip(dtypes, chosen, strict=True):
        with make_engine(tmp_path, dtype=dtype) as engine:
            with pytest.raises(NotFiniteError) as caught:
                engine.generate(PROMPTS[2], **options)
            said = message(caught.value)
            assert "pass 1 of the row, over the prompt" in said and PLACES[name] in said
            if "layers" in name or "lm_head" in name:
                kind = "nan" if math.isnan(value) else "infinite"
                assert f"{name!r} has a value that is {kind}" in said
                assert "model.safetensors" in said
            assert len(list(engine._runner.kv.rows)) == 0


def test_what_overflows_without_a_bad_weight_names_the_layer_alone(
    path: Path, tmp_path: Path
) -> None:
    spoiled(path, tmp_path, "model.layers.1.mlp.down_proj.weight", lambda t: t.fill_(3e38))
    with make_engine(tmp_path) as engine, pytest.raises(NotFiniteError) as caught:
        engine.generate(PROMPTS[0])
    assert message(caught.value).endswith("is that of layer 1")


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("budget", [None, "1GiB"])
def test_a_row_that_ceases_to_be_numbers_ends_alone_and_in_its_pass(
    path: Path, tmp_path: Path, device: str, budget: str | None
) -> None:
    """On a GPU with a budget, its passes are captured."""
    options = {"device": device, "dtype": torch.float32, "device_budget": budget}
    greedy: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0, "return_details": True}
    with make_engine(path, **options) as engine:
        alone = [done.ids for done in engine.generate(PROMPTS, **greedy)]
    bad, at = next(
        (row, at)
        for row, at in itertools.product(range(4), range(2, 6))
        if all(alone[row][at] not in (*p, *ids[: at if i == row else 8])
               for i, (p, ids) in enumerate(zip(PROMPTS, alone, strict=True)))
    )  # fmt: skip
    token = alone[bad][at]
    name = "model.embed_tokens.weight"
    spoiled(path, tmp_path, name, lambda tensor: tensor[token].fill_(math.nan))
    with make_engine(tmp_path, **options) as engine:
        for _ in range(2):  # captured, and replayed
            found = engine.generate(PROMPTS, **greedy)
            for row, (done, ids) in enumerate(zip(found, alone, strict=True)):
                assert done.ids == (ids[: at + 1] if row == bad else ids)
            said = message(found[bad].error)
            assert f"pass {at + 2} of the row, after {at + 1} new tokens" in said
            assert "the embedding" in said


def test_a_kept_row_that_is_no_numbers_is_not_kept(path: Path, tmp_path: Path) -> None:
    spoiled(path, tmp_path, "model.embed_tokens.weight", lambda t: t[200].fill_(math.nan))
    options: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0, "reuse_prefix": True}
    with make_engine(path) as whole, make_engine(tmp_path) as engine:
        expected = whole.generate([5, 6, 7, 8], **options)
        assert engine.generate([5, 6, 7, 8], **options) == expected
        with pytest.raises(NotFiniteError):
            engine.generate([5, 6, 200, 7, 8], **options)
        assert engine.generate([5, 6, 7, 8], **options) == expected
        assert len(list(engine._runner.kv.rows)) == 1
