"""Scripts of docs/benchmarks, each run on a tiny model: what they lean on is not public."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from assets import tiny_checkpoint, tiny_model
from paths import ROOT
from zoo import zoo_model


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run to its end."""
    return subprocess.run(
        [sys.executable, ROOT / "docs/benchmarks" / name, *map(str, arguments), "--device", "cpu"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_experts_are_measured_on_a_cpu_too(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, zoo_model("qwen3_moe", max_position_embeddings=1024))
    out = tmp_path / "out.jsonl"
    options = ["--cap", "30MiB", "--all", "60MiB", "--prompt", 200, "--turns", 1]
    found = script("measure_experts.py", path, out, *options)
    assert found.returncode == 0, found.stderr[-2000:]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["way"] for one in records] == ["demand", "all", "whole", "copies"]
    trace = records[0]["of_trace"]
    assert 0 < trace["segmented"] <= trace["belady"] < trace["asked"]
    assert "tokens/s" in found.stdout and "Belady's" in found.stdout


@pytest.mark.slow
def test_serving_is_measured_on_a_cpu_too(tmp_path: Path) -> None:
    path = tiny_checkpoint(
        tmp_path, tiny_model("qwen2", max_position_embeddings=1024, vocab_size=8192)
    )
    out = tmp_path / "out.jsonl"
    options = ["--rows", "1,3", "--row-tokens", 256, "--prompt", 700]
    found = script("measure_serving.py", path, out, *options)
    assert found.returncode == 0, found.stderr[-2000:]
    record = json.loads(out.read_text())
    assert [one["rows"] for one in record["decode"]] == [1, 3]
    assert [sum(one["parts"]) for one in record["arrivals"]] == [700, 700]
    assert "3 rows:" in found.stdout and "error None" in found.stdout


@pytest.mark.slow
def test_steps_of_fine_tuning_are_measured_on_a_cpu_too(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    names = ["7b resident", "7b streamed", "7b trainer", "32b resident", "32b streamed"]
    options = ["--shape", "smollm2-135m", "--layers", 2, "--tokens", 32, "--turns", 1]
    found = script("measure_finetune.py", tmp_path / "made", out, *options, "--only", *names)
    assert found.returncode == 0, found.stderr[-2000:]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["regime"] for one in records] == names
    assert all(one["losses"][-1] <= one["losses"][0] for one in records)
    assert found.stdout.count("s a step") == len(names)


@pytest.mark.slow
def test_layers_in_host_memory_are_measured_on_a_cpu_too(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, tiny_model("qwen2").bfloat16())
    out = tmp_path / "out.jsonl"
    options = ["--numbers", "1", "--tokens", "1,4", "--passes", 1, "--context", 8]
    found = script("measure_host_layers.py", path, out, *options)
    assert found.returncode == 0, found.stderr[-2000:]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(one["kind"], one["tokens"]) for one in records] == [
        ("pass", 1), ("pass", 4), ("engine", 1)
    ]  # fmt: skip
    assert all(one["there"] > 0 and one["streamed"] > 0 for one in records)


@pytest.mark.slow
def test_gpus_are_measured_beside_the_first_of_them_on_a_cpu_too(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, tiny_model("qwen2").bfloat16())
    out = tmp_path / "out.jsonl"
    options = ["--device-budget", "24MiB", "--turns", 1, "--passes", 2, "--context", 8]
    found = script("measure_gpus.py", path, out, *options, "--rows", "1,2")
    assert found.returncode == 0, found.stderr[-2000:]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    cases = [("equal", 1), ("equal", 2), ("each", 1), ("each", 2)]
    assert [(one["case"], one["rows"]) for one in records] == cases
    assert all(one["several"]["resident"] <= one["one"]["resident"] for one in records)
    assert all(one["times"] > 0 for one in records) and "times as fast" in found.stdout
