"""``python -m layer_streamer plan``: the table, the JSON, rates, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from byte_model import byte_model
from checkpoints import tiny_checkpoint
from paths import ROOT

from layer_streamer.__main__ import main

CPU = ["--device", "cpu"]


@pytest.fixture(autouse=True)
def no_record(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been measured of this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_checkpoint(tmp_path, 6, hidden=40)
    return tmp_path


def planned(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, Any]:
    """The table and the document."""
    assert main(["plan", *map(str, arguments)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    return "\n".join(table), json.loads(last)


def test_without_rates_the_table_says_how_to_get_a_prediction(model: Path, capsys: Any) -> None:
    table, document = planned(capsys, model, *CPU)
    assert "6 layers" in table.splitlines()[0]
    assert "layer-streamer probe" in table
    assert document["predicted"] is None
    assert document["devices"] == ["cpu"]
    assert document["tiers"] == ["disk"] * 6


def test_rates_that_are_given_give_a_prediction(model: Path, capsys: Any) -> None:
    table, document = planned(capsys, model, *CPU, "--read-rate", "0.001", "--copy-rate", "50")
    nbytes = document["predicted"]["read_bytes"]
    assert nbytes > 6 * 3 * 40 * 40 * 4
    assert document["predicted"]["seconds"] == nbytes / 1e6
    assert f"predicted: {nbytes / 1e6:.4f} s a pass, bound by read" in table


def test_the_document_says_what_the_table_says(model: Path, capsys: Any) -> None:
    table, document = planned(
        capsys, model, *CPU, "--n-gpu", 0, "--n-cpu-pinned", 1, "--device-budget", "100 KiB"
    )
    tiers = Counter(document["tiers"])
    assert set(tiers) == {"device", "disk"}
    assert sum(document["device_bytes"]) <= 100 << 10
    rows = {line.split("  ")[1].strip(): line for line in table.splitlines()[2:4]}
    counts = {name: int(row.removeprefix(f"  {name}").split()[0]) for name, row in rows.items()}
    assert counts == {"resident on the device": tiers["device"], "on disk": tiers["disk"]}
    assert f"reads: {document['read_mode']}: {document['reason']}" in table


@pytest.mark.parametrize("mode", ["buffered", "direct", "mapped"])
def test_a_read_mode_is_planned_as_asked(model: Path, capsys: Any, mode: str) -> None:
    _, document = planned(capsys, model, *CPU, "--read-mode", mode)
    assert (document["read_mode"], document["reason"]) == (mode, "as asked")


@pytest.mark.parametrize("word", ["none", "None", "0"])
def test_a_pool_is_left_out_by_none_and_by_0(model: Path, capsys: Any, word: str) -> None:
    _, with_pool = planned(capsys, model, *CPU, "--n-gpu", 0, "--n-cpu-pinned", 2)
    _, without = planned(capsys, model, *CPU, "--n-gpu", 0, "--n-cpu-pinned", word)
    assert sum(with_pool["device_bytes"]) == 3 * sum(without["device_bytes"])


def test_a_device_may_be_named_twice(model: Path, capsys: Any) -> None:
    _, document = planned(capsys, model, *CPU, *CPU)
    assert document["devices"] == ["cpu", "cpu"]
    assert len(document["device_bytes"]) == 2


def test_nothing_is_allocated_for_a_plan(model: Path, monkeypatch: Any, capsys: Any) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        pytest.fail("memory was allocated")

    monkeypatch.setattr("layer_streamer.transport.memory.HostArena.__init__", refuse)
    monkeypatch.setattr("layer_streamer.devices.device.CpuDevice.allocate", refuse)
    planned(capsys, model, *CPU)


BAD = [
    (["nowhere", *CPU], "nowhere"),
    ([".", *CPU, "--read-mode", "fast"], "read_mode='fast': must be one of"),
    ([".", *CPU, "--device-budget", "6 Gb"], "device_budget='6 Gb'"),
    ([".", *CPU, "--host-budget", "-1"], "host_budget='-1'"),
    ([".", *CPU, "--reserve-bytes", "auto"], "reserve_bytes='auto'"),
    ([".", *CPU, "--n-gpu", "-1"], "n_gpu=-1: must be from 0"),
    ([".", *CPU, "--n-cpu-pinned", "5000"], "n_cpu_pinned=5000: must be from 0"),
    ([".", *CPU, "--read-threads", "0"], "read_threads=0: must be from 1"),
    ([".", *CPU, "--read-chunk", "4095"], "read_chunk=4095: must be from 4096"),
    ([".", *CPU, "--device-budget", "1"], "device_budget"),
    ([".", "--device", "nonsense"], "device='nonsense'"),
    ([".", "--device", "cpu:x"], "device='cpu:x'"),
    ([".", "--device", "cuda:99"], "device='cuda:99'"),
]
"""Arguments of plan and of bench alike, and what is said of them."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *BAD,
        *[
            ([".", *CPU, "--read-rate", rate], f"--read-rate={float(rate)}: must be above 0")
            for rate in ("0", "-1", "nan", "inf")
        ],
        ([".", *CPU, "--copy-rate", "0"], "--copy-rate=0.0: must be above 0"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_exit_code_2(
    model: Path, monkeypatch: Any, capsys: Any, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(model)
    assert main(["plan", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    "arguments",
    [["plan"], ["plan", ".", "--n-gpu", "two"], ["plan", ".", "--n-cpu", "x"], ["plan", ".", "-q"]],
)
def test_what_the_command_line_cannot_mean_is_refused_with_2(
    capsys: Any, arguments: list[str]
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith("(see layer-streamer plan --help)")


@pytest.mark.slow
def test_it_runs_as_a_module(model: Path) -> None:
    command = [sys.executable, "-m", "layer_streamer", "plan", str(model), *CPU]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout.splitlines()[-1])["devices"] == ["cpu"]


def test_with_a_draft_it_is_the_engines_plan_and_what_tokens_a_pass_come_to(
    tmp_path: Path, capsys: Any
) -> None:
    path = byte_model(tmp_path / "model")
    for draft in ("self", path):
        options = ["--read-rate", "0.001", "--draft", draft, "--n-gpu", "1"]
        table, document = planned(capsys, path, *CPU, *options)
        seconds = document["predicted"]["seconds"]
        assert f"{5 / seconds:.1f} at 5, {10 / seconds:.1f} at 10" in table
        assert document["device_parts"]["draft"] > 0 and "what drafts" in table
    table, _ = planned(capsys, path, *CPU, *options, "--device-budget", "64MiB")
    assert table.endswith("nothing is streamed: nothing is drafted")
    assert main(["plan", str(path), *CPU, "--draft", "self", "--device-budget", "100KiB"]) == 2
    error = capsys.readouterr().err
    assert "draft " in error and error.count("\n") == 1
