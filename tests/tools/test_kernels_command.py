"""kernels_command.py: what it refuses, and on a GPU what it prints."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from layer_streamer.tools import cli

COMMAND = [sys.executable, "-m", "layer_streamer", "kernels"]


def error_of(capsys, *argv: str) -> str:
    assert cli.main(["kernels", *argv]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    (line,) = found.err.splitlines()
    return line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(capsys):
    assert error_of(capsys) == "error: --device cuda: torch finds no NVIDIA GPU here"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--device", "cpu"), "--device cpu: kernels are for NVIDIA GPUs"),
        (("--device", "no"), "--device no: not a torch device"),
        (("--rows", "0"), "--rows 0: must be at least 1"),
        (("--repeats", "-1"), "--repeats -1: must be at least 1"),
        (("--width", "100"), "--width 100: multiples of 8 and 256"),
        (("--save", "--only", "unpack"), "--save: needs the tables product and pointwise"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(capsys, argv, message):
    assert message in error_of(capsys, *argv)


@pytest.mark.gpu
def test_the_last_line_is_json_of_what_the_tables_say(tmp_path):
    options = ["--rows", "512", "--width", "1024", "--repeats", "3", "--formats", "Q4_K,ct4"]
    result = subprocess.run(
        [*COMMAND, *options, "--save"],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert [row["format"] for row in report["unpack"]] == ["Q4_K", "ct4"]
    assert all(row["gb_s"] > 0 and row["torch_us"] > 0 for row in report["unpack"])
    assert {row["format"] for row in report["product"]} == {"Q4_K", "ct4"}
    assert {row["kernel"] for row in report["pointwise"]} == {"norm", "swiglu"}
    kept = json.loads((tmp_path / "layer-streamer" / "kernels.json").read_text())
    assert kept == {report["gpu"]: report["thresholds"]}


@pytest.mark.gpu
def test_ctrl_c_ends_it_with_130():
    process = subprocess.Popen(COMMAND, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()  # it measures
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode == 130
