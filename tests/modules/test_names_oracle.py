"""Recipes of transformers models against what from_pretrained loads, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipes import differences, loaded, made, made_all, manifest_of
from tiny_models import (
    REPRESENTATIVE,
    TYPES,
    has,
    tiny_class,
    tiny_config,
    tiny_model,
    tiny_model_on_meta,
)

from layer_streamer.modules.naming.names import Names, name_tensors

# Some modeling files of older releases do that when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

REST = sorted({*TYPES} - {*REPRESENTATIVE})
NOT_SAVED = {"marian": 2, "speech_to_text": 0}
"""How many parameters the class makes itself: tables of sines."""


def names_of(name: str, folder: Path) -> Names:
    if not has(name):
        pytest.skip(f"this transformers has no {name}")
    tiny_model(name).save_pretrained(folder)
    return name_tensors(tiny_model_on_meta(name), manifest_of(folder))


def check(name: str, folder: Path) -> None:
    names = names_of(name, folder)
    assert names.missing == () and names.unused == ()
    assert len(names.made) == NOT_SAVED.get(name, 0)
    reference = loaded(tiny_class(name), folder)
    assert differences(made_all(names), reference, *names.made) == []


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_recipes_give_what_from_pretrained_loads(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_recipes_of_all_other_types_give_what_from_pretrained_loads(
    name: str, tmp_path: Path
) -> None:
    check(name, tmp_path)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "qwen3_next"])
def test_experts_are_stacked_by_placing_their_bytes(name: str, tmp_path: Path) -> None:
    names = names_of(name, tmp_path)
    fused = [r for key, r in names.recipes.items() if key.endswith("experts.gate_up_proj")]
    assert fused
    for recipe in fused:
        # Of four experts, gate and up in turn.
        assert recipe.convert is None and len(recipe.pieces) == 8
        experts = [int(piece.name.split("experts.")[1].split(".")[0]) for piece in recipe.pieces]
        assert experts == [0, 0, 1, 1, 2, 2, 3, 3]


def test_more_than_ten_experts_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    config = tiny_config("mixtral")
    config.num_local_experts = 12
    tiny_class("mixtral").from_config(config).save_pretrained(tmp_path)
    with torch.device("meta"):
        meta = tiny_class("mixtral").from_config(config)
    names = name_tensors(meta, manifest_of(tmp_path))
    assert differences(made_all(names), loaded(tiny_class("mixtral"), tmp_path)) == []


def test_experts_in_a_wrong_order_are_seen_by_the_comparison(tmp_path: Path) -> None:
    names = names_of("mixtral", tmp_path)
    reference = loaded(tiny_class("mixtral"), tmp_path)
    key = "model.layers.1.mlp.experts.gate_up_proj"
    recipe = names.recipes[key]
    for one in range(len(recipe.pieces) - 1):
        pieces = list(recipe.pieces)
        pieces[one], pieces[one + 1] = pieces[one + 1], pieces[one]
        wrong = made_all(names) | {key: made(replace(recipe, pieces=tuple(pieces)))}
        assert differences(wrong, reference) == [key]


def test_a_chunk_of_a_fused_tensor_is_a_part_of_its_bytes(tmp_path: Path) -> None:
    names = names_of("nomic_bert", tmp_path)
    query, key, value = (
        names.recipes[f"layers.1.self_attn.{part}_proj.weight"] for part in "qkv"
    )  # fmt: skip
    for recipe in (query, key, value):
        assert recipe.convert is None and len(recipe.pieces) == 1
    first, second, third = (recipe.pieces[0] for recipe in (query, key, value))
    assert first.name == second.name == third.name
    assert (second.offset, third.offset) == (
        first.offset + first.nbytes,
        first.offset + 2 * first.nbytes,
    )


@pytest.mark.parametrize(
    ("name", "operation"),
    [("ernie4_5_vl_moe", "Transpose"), ("mistral_large4", "PermuteForRope"),
     ("inkling2", "Interleave(dim=1)")],
)  # fmt: skip
def test_what_no_order_of_bytes_gives_is_converted_by_transformers_own_operation(
    name: str, operation: str, tmp_path: Path
) -> None:
    names = names_of(name, tmp_path)
    found = {r.convert.name: r.convert for r in names.recipes.values() if r.convert}
    assert [*found] == [operation]
    if name != "ernie4_5_vl_moe":
        # That one is among the types of the first test.
        assert differences(made_all(names), loaded(tiny_class(name), tmp_path)) == []


def test_a_conversion_may_be_run_again_and_after_one_that_failed(tmp_path: Path) -> None:
    names = names_of("ernie4_5_vl_moe", tmp_path)
    reference = loaded(tiny_class("ernie4_5_vl_moe"), tmp_path).state_dict()
    name, recipe = next((n, r) for n, r in names.recipes.items() if r.convert)
    assert recipe.convert is not None
    with pytest.raises((RuntimeError, IndexError)):
        recipe.convert(torch.zeros(()))
    for _ in range(2):
        assert torch.equal(made(recipe), reference[name])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("t5", torch.float16), ("t5", torch.bfloat16), ("deepseek_v3", torch.bfloat16),
     ("mixtral", torch.float16), ("mistral_large4", torch.bfloat16)],
)  # fmt: skip
def test_another_dtype_is_a_cast_except_where_the_class_keeps_float32(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    if not has(name):
        pytest.skip(f"this transformers has no {name}")
    tiny_model(name).save_pretrained(tmp_path)
    meta = tiny_model_on_meta(name, dtype)
    names = name_tensors(meta, manifest_of(tmp_path))
    reference = loaded(tiny_class(name), tmp_path, dtype=dtype)
    assert differences(made_all(names), reference) == []
    arithmetic = {"PermuteForRope"} if name == "mistral_large4" else set()
    found = {recipe.convert.name for recipe in names.recipes.values() if recipe.convert}
    assert found == {"cast"} | arithmetic
