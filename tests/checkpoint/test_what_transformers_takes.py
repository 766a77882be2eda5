"""Where files of a checkpoint contradict one another: what transformers would load is read, and
a notice says so."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_index, write_safetensors
from disks import warnings_of
from gguf_parts import write_part
from hostile import rejection
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer.checkpoint.formats import read_manifest
from layer_streamer.errors import CheckpointError

INDEX = "model.safetensors.index.json"
LAYERS = [f"model.layers.{i}.w" for i in range(4)]


def values(path: Path) -> dict[str, float]:
    """The first element of each tensor that is read."""
    found = {}
    manifest = read_manifest(path)
    for spec in [
        *manifest.static.values(),
        *(t for y in manifest.layers for t in y.tensors.values()),
    ]:
        raw = spec.path.read_bytes()[spec.offset : spec.offset + 4]
        found[spec.name] = torch.frombuffer(bytearray(raw), dtype=torch.float32).item()
    return found


def write(directory: Path, name: str, **tensors: float) -> None:
    """A file of one-element tensors; ``_0`` is the tensor of layer 0."""
    named = {LAYERS[int(key[1:])] if key[0] == "_" else key: tensors[key] for key in tensors}
    write_safetensors(directory / name, {key: torch.tensor([named[key]]) for key in named})


def of_transformers(directory: Path) -> dict[str, float] | None:
    """By the code of transformers: the files that it resolves, each loaded whole, in its order.
    None if one of them is missing."""
    from safetensors import safe_open
    from transformers.modeling_utils import _get_resolved_checkpoint_files
    from transformers.utils.hub import DownloadKwargs

    config = directory / "config.json"
    named = json.loads(config.read_text()).get("transformers_weights") if config.is_file() else None
    here = DownloadKwargs(local_files_only=True)
    files, _ = _get_resolved_checkpoint_files(
        str(directory), None, None, None, {}, False, named, here
    )
    assert files
    if not all(Path(file).is_file() for file in files):
        return None
    state = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - no mapping
                state[key] = opened.get_tensor(key)[0].item()
    return state


def make(directory: Path, shape: dict[str, Any]) -> None:
    """Files of a model of one layer, their values all different."""
    if shape["whole"]:
        write(directory, "model.safetensors", _0=1.0, head=2.0)
    if shape["variant"]:
        write(directory, "model.fp16.safetensors", _0=3.0, head=4.0)
    if shape["other"]:
        write(directory, "other.safetensors", _0=5.0, extra=6.0)
    write(directory, "model-00001-of-00002.safetensors", _0=7.0, **shape["first"])
    write(directory, "model-00002-of-00002.safetensors", head=8.0, **shape["second"])
    write_index(directory, {LAYERS[0]: "model-00001-of-00002.safetensors", **shape["index"]})
    if shape["named"]:
        named = {"transformers_weights": shape["named"]}
        (directory / "config.json").write_text(json.dumps(named))


SHARDS = st.sampled_from(["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
SHAPES = st.fixed_dictionaries({
    "whole": st.booleans(),
    "variant": st.booleans(),
    "other": st.booleans(),
    "first": st.dictionaries(st.sampled_from(["head", "x", "y"]), st.just(10.0)),
    "second": st.dictionaries(st.sampled_from(["x", "z"]), st.just(11.0)),
    "index": st.dictionaries(st.sampled_from(["head", "x", "y"]), SHARDS),
    "named": st.sampled_from([None, None, "other.safetensors", INDEX, "model.safetensors"]),
})  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(shape=SHAPES)
def test_any_mixture_of_files_is_read_as_transformers_resolves_it(
    tmp_path_factory: pytest.TempPathFactory, shape: dict[str, Any]
) -> None:
    directory = tmp_path_factory.mktemp("mixture")
    make(directory, shape)
    expected = of_transformers(directory)
    try:
        found = values(directory)
    except CheckpointError as error:
        # transformers warns of what its index lists and no shard has; here that is an error.
        missing = [name for name in shape["index"] if name not in (expected or {})]
        assert expected is None or f"no tensor {missing[0]!r}" in str(error)
    else:
        assert found == expected


@pytest.mark.parametrize("shard", ["model.safetensors", "model-00001-of-00001.safetensors"])
def test_the_single_file_wins_over_an_index_and_is_named_where_they_differ(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, shard: str
) -> None:
    write(tmp_path, shard, _0=1.0)
    write(tmp_path, "model.safetensors", _0=2.0)
    write_index(tmp_path, {LAYERS[0]: shard})
    assert values(tmp_path) == {LAYERS[0]: 2.0}
    said = warnings_of(caplog)
    assert len(said) == (shard != "model.safetensors")
    assert all("model.safetensors is read" in text and shard in text for text in said)


def test_an_index_that_cannot_be_read_beside_the_single_file_is_a_notice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "model.safetensors", _0=2.0)
    (tmp_path / INDEX).write_text("<html>")
    assert values(tmp_path) == {LAYERS[0]: 2.0}
    assert [INDEX in text for text in warnings_of(caplog)] == [True]


def test_shards_of_another_save_beside_what_is_read_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "model-00001-of-00001.safetensors", _0=1.0)
    write(tmp_path, "model-00002-of-00003.safetensors", _0=2.0)
    write_index(tmp_path, {LAYERS[0]: "model-00001-of-00001.safetensors"})
    assert values(tmp_path) == {LAYERS[0]: 1.0}
    (said,) = warnings_of(caplog)
    assert "and not model-00002-of-00003.safetensors beside it" in said


@pytest.mark.parametrize(
    ("first", "second", "index", "expected", "said"),
    [
        ({}, {"x": 3.0}, {}, 3.0, "in a shard, but not in the index"),
        ({"x": 2.0}, {"x": 3.0}, {"x": "a.safetensors"}, 3.0, "in more than one shard"),
        ({}, {"x": 3.0}, {"x": "a.safetensors"}, 3.0, "not in the shard that the index says"),
    ],
    ids=["unlisted", "twice", "elsewhere"],
)
def test_headers_win_over_the_index_and_the_later_shard_over_the_earlier(  # noqa: PLR0917
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: dict[str, float],
    second: dict[str, float], index: dict[str, str], expected: float, said: str,
) -> None:  # fmt: skip
    write(tmp_path, "a.safetensors", _0=1.0, **first)
    write(tmp_path, "b.safetensors", head=1.0, **second)
    write_index(tmp_path, {LAYERS[0]: "a.safetensors", "head": "b.safetensors", **index})
    assert values(tmp_path)["x"] == expected
    (warning,) = warnings_of(caplog)
    assert said in warning
    assert "'x'" in warning


def test_a_checkpoint_without_contradictions_is_read_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write(tmp_path, "a.safetensors", _0=1.0)
    write(tmp_path, "b.safetensors", _1=1.0)
    write_index(tmp_path, {LAYERS[0]: "a.safetensors", LAYERS[1]: "b.safetensors"})
    read_manifest(tmp_path)
    assert caplog.records == []


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a\\b.safetensors"])
def test_a_config_that_names_weights_outside_of_the_folder_is_rejected(
    tmp_path: Path, name: str
) -> None:
    write(tmp_path, "model.safetensors", _0=1.0)
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": name}))
    assert "transformers_weights" in rejection(tmp_path)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("width", [1, 2, 5, 6])
@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
def test_shards_are_counted_from_0_or_1_with_any_padding(
    tmp_path: Path, first: int, width: int, suffix: str
) -> None:

    names = [f"m-{k:0{width}}-of-{11:0{width}}{suffix}" for k in range(first, first + 11)]
    for i, name in enumerate(names):
        tensor = f"model.layers.{i}.w"
        if suffix == ".gguf":
            write_part(tmp_path / name, f"blk.{i}.w", i, 11)
        else:
            write_safetensors(tmp_path / name, {tensor: torch.zeros(1)})
    assert read_manifest(tmp_path).num_layers == 11
    if suffix == ".gguf":
        assert read_manifest(tmp_path / names[7]).num_layers == 11
    (tmp_path / names[9]).unlink()
    assert names[9] in rejection(tmp_path)
