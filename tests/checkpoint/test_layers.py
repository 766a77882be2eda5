"""Layers found by the numbers in tensors' names; what is said where none are found."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layer_streamer.checkpoint.layers import MAX_LAYERS, group_layers, numbered_prefixes
from layer_streamer.checkpoint.manifest import TensorSpec
from layer_streamer.errors import CheckpointError, ConfigError

HERE = Path("model.safetensors")


def named(*names: str) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, torch.uint8, (1,), HERE, 0, 1) for name in names}


@pytest.mark.parametrize("prefix", ["model.layers.{i}.", "transformer.h.{i}.", "blk.{i}."])
def test_layers_are_found_by_their_usual_prefixes(prefix: str) -> None:
    names = [prefix.format(i=i) + key for i in range(12) for key in ("a", "b.weight")]
    layers, static, _ = group_layers(named(*names, "head"), HERE)
    assert [layer.layer_idx for layer in layers] == list(range(12))
    assert all(list(layer.tensors) == ["a", "b.weight"] for layer in layers)
    assert list(static) == ["head"]


def test_layers_are_ordered_by_number_not_by_name_or_position() -> None:
    layers, _, _ = group_layers(named("blk.10.a", *(f"blk.{i}.a" for i in range(9, -1, -1))), HERE)
    assert [layer.tensors["a"].name for layer in layers] == [f"blk.{i}.a" for i in range(11)]


def test_a_given_pattern_replaces_the_usual_ones() -> None:
    layers, static, _ = group_layers(named("enc[0]x", "enc[1]x", "blk.0.a"), HERE, "enc[{i}]")
    assert len(layers) == 2
    assert list(static) == ["blk.0.a"]


@pytest.mark.parametrize("pattern", ["model.layers.", "a{i}b{i}", ""])
def test_a_pattern_needs_one_place_for_the_index(pattern: str) -> None:
    with pytest.raises(ConfigError, match="layer_pattern="):
        group_layers(named("model.layers.0.a"), HERE, pattern)


def test_a_missing_layer_is_named() -> None:
    with pytest.raises(CheckpointError, match="layer 1 of 3 has no tensors"):
        group_layers(named("blk.0.a", "blk.2.a"), HERE)


def test_no_layers_at_all_names_what_was_tried() -> None:
    with pytest.raises(CheckpointError, match=r"no layers found.*model\.layers.*layer_pattern"):
        group_layers(named("a", "b"), HERE)


def test_an_absurd_layer_number_is_an_error_at_once() -> None:
    with pytest.raises(CheckpointError, match="more than"):
        group_layers(named(f"blk.{MAX_LAYERS}.a"), HERE)


def test_numbers_with_leading_zeros_are_no_layers() -> None:
    _, static, _ = group_layers(named("blk.0.a", "blk.00.a", "blk.01.a"), HERE)
    assert list(static) == ["blk.00.a", "blk.01.a"]


def refusal(names: Iterable[str], pattern: str | None = None) -> str:
    """What is said of names without layers."""
    with pytest.raises(CheckpointError, match=r"^model\.safetensors: no layers found") as caught:
        group_layers(named(*names), HERE, pattern)
    return str(caught.value)


def test_the_prefix_that_found_the_layers_comes_along() -> None:
    assert group_layers(named("blk.0.a"), HERE)[2] == "blk.{i}."
    assert group_layers(named("enc[0]x", "blk.0.a"), HERE, "enc[{i}]")[2] == "enc[{i}]"


T5 = [
    f"{side}.block.{i}.layer.{j}.q.weight"
    for side, count in (("encoder", 3), ("decoder", 5))
    for i in range(count)
    for j in (0, 1)
]


def test_where_no_layers_are_found_the_numbered_prefixes_are_listed_the_largest_first() -> None:
    message = refusal(["shared.weight", *T5, "head.bias"])
    assert "in it: decoder.block.{i}. (5), encoder.block.{i}. (3); name their prefix" in message
    assert message.endswith("layer_pattern=")


def test_a_pattern_that_fits_nothing_gets_the_same_advice() -> None:
    message = refusal(T5, "encoder.blocks.{i}.")
    assert "tried encoder.blocks.{i}." in message
    assert "encoder.block.{i}. (3)" in message


def test_what_the_advice_names_opens_the_file() -> None:
    names = [f"0.auto_model.encoder.layer.{i}.w" for i in range(7)] + [f"fc{i}.w" for i in range(2)]
    prefixes = numbered_prefixes(names)
    assert prefixes["0.auto_model.encoder.layer.{i}."] == 7
    for prefix, count in prefixes.items():
        layers, _, _ = group_layers(named(*names), HERE, prefix)
        assert len(layers) == count


def test_experts_within_layers_are_no_layers() -> None:
    names = [f"net.{i}.experts.{j}.w.{k}.x" for i in range(4) for j in range(64) for k in range(2)]
    assert numbered_prefixes(names) == {"net.{i}.": 4}


@pytest.mark.parametrize(
    "names", [["a", "b"], [], ["h.1.a", "h.2.a"], ["h.0.a", "h.2.a"], ["h.00.a"], ["h.0."], ["0"]]
)
def test_numbers_that_make_no_layers_are_not_advised(names: list[str]) -> None:
    assert "no prefix in it is numbered from 0 on; name" in refusal(names)


def test_only_a_handful_is_listed() -> None:
    message = refusal(f"{letter}.{i}.w" for letter in "abcdefghij" for i in range(2))
    assert message.count("(2)") == 5
    assert "e.{i}. (2), ...; name" in message


@pytest.mark.parametrize("evil", ["\x1b[2J", "\n", "\r", "\x07", "\u202e", "\x9b", "\u2028"])
def test_what_would_move_a_cursor_is_shown_escaped(evil: str) -> None:
    message = refusal([f"a{evil}b.0.w"])
    assert message.isprintable()
    assert f"a{evil!r}".replace("'", "") + "b.{i}. (1)" in message


@given(st.lists(st.text(alphabet="0123.{i}/\x1b\u202e\U000e0001x", max_size=300), max_size=20))
def test_whatever_the_names_the_message_is_one_short_line(names: list[str]) -> None:
    message = refusal([*names, "a" * 5000 + ".0.w", "\U000e0001" * 90 + ".0.w"])
    assert message.isprintable()
    assert len(message) < 900


@pytest.mark.parametrize(
    "name", ["0." * 500 + "{i}", "{i:0>5}." * 100 + "w", "{i}.{i}.{i}.{i}.w", "x{i}." + "y" * 1000]
)
def test_names_that_are_all_different_take_little_memory(name: str) -> None:
    names = [name.format(i=i) for i in range(20_000)]
    tracemalloc.start()
    try:
        numbered_prefixes(names)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000
