"""Names of diffusers' models: what their classes say of exceptions, and the real ones."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from recipes import differences, loaded, made, made_all, manifest_of, write
from tiny_diffusers import DIFFUSERS, tiny_diffuser, tiny_diffuser_on_meta
from torch import nn

from layer_streamer.modules.naming.names import name_tensors

installed = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed"
)


class Exceptional(nn.Module):
    """Says what diffusers' classes say."""

    _keep_in_fp32_modules: ClassVar[list[str]] = ["norm"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = ["norm_added_q"]

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.normal = nn.LayerNorm(4), nn.Linear(4, 4)

    def _fix_state_dict_keys_on_load(self, state_dict: dict[str, Any]) -> None:
        if "query.weight" in state_dict:
            state_dict["normal.weight"] = state_dict.pop("query.weight")


def named(tensors: dict[str, torch.Tensor], folder: Path) -> Any:
    with torch.device("meta"):
        model = Exceptional().to(torch.bfloat16)
    return name_tensors(model, write(folder, tensors))


def test_modules_that_their_class_keeps_in_float32_stay_so(tmp_path: Path) -> None:
    names = named(Exceptional().state_dict(), tmp_path)
    dtypes = {name: made(recipe).dtype for name, recipe in names.recipes.items()}
    assert dtypes == {
        "norm.weight": torch.float32, "norm.bias": torch.float32,
        "normal.weight": torch.bfloat16, "normal.bias": torch.bfloat16,
    }  # fmt: skip


def test_what_their_class_ignores_is_not_unused(tmp_path: Path) -> None:
    tensors = {**Exceptional().state_dict(), "a.norm_added_q.weight": torch.ones(1)}
    assert named({**tensors, "b": torch.ones(1)}, tmp_path).unused == ("b",)


def test_old_names_that_their_class_mends_are_found(tmp_path: Path) -> None:
    tensors = Exceptional().state_dict()
    tensors["query.weight"] = tensors.pop("normal.weight")
    names = named(tensors, tmp_path)
    assert names.recipes["normal.weight"].pieces[0].name == "query.weight"
    assert (names.missing, names.unused) == ((), ())


@installed
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DIFFUSERS)
def test_recipes_give_what_from_pretrained_loads(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tiny_diffuser(name).save_pretrained(tmp_path)  # type: ignore[operator]
    names = name_tensors(tiny_diffuser_on_meta(name, dtype), manifest_of(tmp_path))
    reference = loaded(type(tiny_diffuser(name)), tmp_path, torch_dtype=dtype)
    assert (names.missing, names.unused) == ((), ())
    assert differences(made_all(names), reference) == []


@installed
@pytest.mark.slow
def test_an_autoencoder_with_names_of_old_attention_blocks_is_loaded(tmp_path: Path) -> None:
    tiny_diffuser("AutoencoderKL").save_pretrained(tmp_path)  # type: ignore[operator]
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in loaded(type(tiny_diffuser("AutoencoderKL")), tmp_path).state_dict().items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        tensors[name] = tensor
    manifest = write(tmp_path / "old", tensors)
    assert any(".proj_attn." in name for name in manifest.static)
    names = name_tensors(tiny_diffuser_on_meta("AutoencoderKL"), manifest)
    assert (names.missing, names.unused) == ((), ())
    assert (
        differences(made_all(names), loaded(type(tiny_diffuser("AutoencoderKL")), tmp_path)) == []
    )
