"""Names that a checkpoint gives: where they may lead, and how they are shown."""

from __future__ import annotations

import json
import os
import pickle
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_gguf, write_raw_safetensors, write_safetensors
from gguf_parts import write_part
from hostile import entry, rejection
from hypothesis import given
from hypothesis import strategies as st

from layer_streamer import CheckpointError, LayerStreamer, read_manifest
from layer_streamer.checkpoint.names import file_fault
from layer_streamer.errors import CheckpointChangedError, StreamerError, printable
from layer_streamer.tools.cli import main

EVIL = "\x1b[2J\x1b]0;owned\x07\nmodel is fine\u202e\u2028"


def test_escapes_of_a_terminal_are_shown_and_not_acted_on() -> None:
    assert printable("a\x1b[31m\n\udcff\u2028é") == "a\\x1b[31m\\n\\udcff\\u2028é"


@given(text=st.text(st.characters()))
def test_whatever_is_printable_can_be_encoded_and_is_one_line(text: str) -> None:
    shown = printable(text)
    assert shown.encode().decode() == shown
    assert len(shown.splitlines()) <= 1
    assert all(unicodedata.category(char)[0] != "C" for char in shown)
    assert printable(shown) == shown


@given(text=st.text(st.characters()))
def test_an_error_is_one_line_whatever_names_are_in_it_also_when_it_was_sent(text: str) -> None:
    error = CheckpointChangedError(f"{text}: changed")
    assert str(error) == printable(f"{text}: changed")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert StreamerError().args == ()


def evil_safetensors(folder: Path) -> None:
    tensors = {"model.layers.0.w": torch.zeros(3), EVIL: torch.zeros(2)}
    write_safetensors(folder / "model.safetensors", tensors)


def evil_layer(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", {f"model.layers.0.{EVIL}": torch.zeros(3)})


def evil_overlap(folder: Path) -> None:
    text = f'{{{json.dumps(EVIL)}:{entry()},"b":{entry()}}}'
    write_raw_safetensors(folder / "model.safetensors", text, bytes(8))


def evil_dtype(folder: Path) -> None:
    text = f'{{"model.layers.0.w":{entry(dtype=json.dumps(EVIL))}}}'
    write_raw_safetensors(folder / "model.safetensors", text, bytes(8))


def evil_index(folder: Path) -> None:
    text = json.dumps({"weight_map": {EVIL: EVIL}})
    (folder / "model.safetensors.index.json").write_text(text)


def evil_files(folder: Path) -> None:
    for name in ("a", "b"):
        write_gguf(folder / f"{name}\x1b[2J.gguf", {"blk.0.w": np.zeros(4, np.float32)})


def evil_tensors(folder: Path) -> None:
    write_safetensors(folder / f"{EVIL}.safetensors", {f"{EVIL}.0.w": torch.zeros(3)})


def evil_text(folder: Path) -> None:
    (folder / "model.safetensors").write_text(EVIL)


EVILS: list[Callable[[Path], None]] = [
    evil_safetensors, evil_layer, evil_overlap, evil_dtype, evil_index, evil_files, evil_tensors,
    evil_text,
]  # fmt: skip


@pytest.mark.parametrize("make", EVILS)
@pytest.mark.parametrize(
    "command",
    [["inspect"], ["plan", "--device", "cpu"], ["inspect", "--layer-pattern", f"{EVIL}{{i}}."]],
    ids=["inspect", "plan", "pattern"],
)
def test_no_name_of_a_checkpoint_moves_a_cursor_or_forges_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None],
    command: list[str],
) -> None:  # fmt: skip
    folder = tmp_path / "model \x1b[31m"
    folder.mkdir()
    make(folder)
    main([command[0], str(folder), *command[1:]])
    for text in capsys.readouterr():
        assert all(line.isprintable() for line in text.split("\n"))
        assert not any(line.startswith("model is fine") for line in text.split("\n"))


def test_a_layer_of_an_odd_name_that_fails_is_one_printable_line(tmp_path: Path) -> None:
    evil_layer(tmp_path)
    with LayerStreamer.from_checkpoint(tmp_path, device="cpu") as streamer:
        os.truncate(tmp_path / "model.safetensors", 20)
        with pytest.raises(StreamerError) as caught:
            streamer.run_pass(None, lambda x, w, i: x)
    assert str(caught.value).isprintable()


OUTSIDE = ["../w.safetensors", "a/../../w", "/etc/passwd", "..", ".", "", "a\0b", "a\\b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_tables_that_name_a_file_outside_of_their_folder_are_rejected(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "in").mkdir()
    write_safetensors(tmp_path / "w.safetensors", {"model.layers.0.w": torch.zeros(4)})
    with pytest.raises(CheckpointError, match=r"shard '.*' is (no|not)"):
        LayerStreamer(
            model_dir=tmp_path / "in",
            tensor_info={"model.layers.0.w": (name, 0, [4])},
            shard_offsets={name: 100},
            block_keys=["w"],
            block_sizes={"w": 4},
            dtype=torch.float32,
            num_layers=1,
        )


@given(parts=st.lists(st.sampled_from(["a", "..", ".", "", "b.safetensors", "...", "..a"])))
def test_a_file_name_that_is_allowed_stays_below_the_folder(parts: list[str]) -> None:
    name = "/".join(parts)
    if not file_fault(name):
        assert os.path.normpath(f"/model/{name}").startswith("/model/")


def test_a_first_part_without_tensors_is_opened_beside_a_projector(tmp_path: Path) -> None:
    write_part(tmp_path / "m-00001-of-00002.gguf", None, 0, 2)
    write_part(tmp_path / "m-00002-of-00002.gguf", "blk.0.w", 1, 2)
    write_part(tmp_path / "mmproj-m-f16.gguf", "v.blk.0.w", 0, 0)
    manifest = read_manifest(tmp_path)
    assert [path.name for path in manifest.files] == [
        "m-00001-of-00002.gguf",
        "m-00002-of-00002.gguf",
    ]
    with LayerStreamer.from_checkpoint(manifest, device="cpu") as streamer:
        streamer.run_pass(None, lambda x, w, i: x)


def test_a_projector_alone_is_opened_by_its_own_pattern(tmp_path: Path) -> None:
    write_part(tmp_path / "mmproj.gguf", "v.blk.0.w", 0, 0)
    assert "v.blk.{i}." in rejection(tmp_path)
    assert read_manifest(tmp_path, "v.blk.{i}.").num_layers == 1
