"""``python -m layer_streamer inspect``: the table, the JSON, the errors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from assets import smollm2
from checkpoints import tiny_checkpoint, tiny_tensors, write_safetensors
from interpreters import COMMAND, run_script

from layer_streamer.__main__ import main


def test_the_last_line_is_json_with_every_tensors_extent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = tiny_checkpoint(tmp_path, 3, num_shards=2)
    assert main(["inspect", str(tmp_path)]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["num_layers"] == 3
    assert document["nbytes"] == sum(tensor.nbytes for tensor in tensors.values())
    for i, layer in enumerate(document["layers"]):
        for key, entry in layer.items():
            tensor = tensors[f"model.layers.{i}.{key}"]
            assert (entry["shape"], entry["type"]) == (list(tensor.shape), "float32")
            with open(entry["file"], "rb") as file:
                file.seek(entry["offset"])
                assert file.read(entry["nbytes"]) == tensor.numpy().tobytes()
    assert set(document["static"]) == {n for n in tensors if not n.startswith("model.layers.")}


def test_equal_layers_share_a_row_and_a_different_one_has_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = tiny_tensors(5)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    path = write_safetensors(tmp_path / "model.safetensors", tensors)
    assert main(["inspect", str(path)]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:5]]
    assert rows == ["0-1", "2", "3-4"]


def test_a_packed_gguf_tensor_is_shown_by_its_ggml_type(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["inspect", str(smollm2())]) == 0
    table = capsys.readouterr().out
    assert "gguf, 30 layers, 0.097 GB in 1 file" in table
    assert "7 Q4_1" in table
    assert "Q8_0 49152x612  token_embd.weight" in table


def test_a_name_that_would_move_the_cursor_is_shown_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = tiny_tensors(2) | {"\x1b[2J\nfine": torch.zeros(1)}
    path = write_safetensors(tmp_path / "model.safetensors", tensors)
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert r"\x1b[2J\nfine" in printed
    assert "\x1b" not in printed


@pytest.mark.parametrize("arguments", [["nowhere"], [".", "--layer-pattern", "h."]])
def test_an_error_is_one_line_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str],
) -> None:  # fmt: skip
    tiny_checkpoint(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1


def test_it_runs_as_a_module_and_survives_a_reader_that_goes_away(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as gone:
        done = run_script(COMMAND, "inspect", tmp_path, stdout=gone)
    assert (done.returncode, done.stderr) == (0, "")
