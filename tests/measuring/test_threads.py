"""Cores for torch and for the streamer on a CPU: who leaves one, who says so, and how often."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from disks import warnings_of
from support import make_device, open_checkpoint

from layer_streamer import LayerStreamer
from layer_streamer.machine import threads as threads_module
from layer_streamer.measuring.bench import Bench, run_bench
from layer_streamer.measuring.threads import leave_a_core


@pytest.fixture(autouse=True)
def torch_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of torch's threads, last: 4 on a machine of 4 cores. Nothing has been said yet."""
    counts = [4]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: counts[-1])
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr(threads_module, "_said", [])
    return counts


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_checkpoint(tmp_path, 3)
    return tmp_path


def test_a_core_is_left_and_taken_back(torch_threads: list[int]) -> None:
    with leave_a_core():
        assert torch_threads[-1] == 3
    assert torch_threads == [4, 3, 4]


def test_it_is_taken_back_after_an_error(torch_threads: list[int]) -> None:
    with pytest.raises(ValueError, match="x"), leave_a_core():
        raise ValueError("x")
    assert torch_threads[-1] == 4


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_threads_than_cores_stay_as_they_are(torch_threads: list[int], count: int) -> None:
    torch_threads.append(count)
    with leave_a_core():
        pass
    assert torch_threads == [4, count]


def test_the_users_own_number_is_kept(
    torch_threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with leave_a_core():
        pass
    assert torch_threads == [4]


def test_a_machine_of_one_core_computes_with_one_thread_and_is_told_nothing(
    torch_threads: list[int], monkeypatch: pytest.MonkeyPatch, model: Path, caplog: Any
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5}, raising=False)
    with leave_a_core():
        assert torch_threads[-1] == 1
    torch_threads.append(1)
    LayerStreamer.from_checkpoint(model, device="cpu").close()
    assert warnings_of(caplog) == []


def test_on_a_cpu_it_is_said_once_a_process_and_nothing_is_set(
    torch_threads: list[int], model: Path, caplog: Any
) -> None:
    for _ in range(3):
        LayerStreamer.from_checkpoint(model, device="cpu").close()
    (warning,) = warnings_of(caplog)
    assert "4 threads on 4 cores" in warning
    assert "torch.set_num_threads(3)" in warning
    assert torch_threads == [4]


def test_whoever_follows_the_advice_is_not_given_it_again(
    torch_threads: list[int], model: Path, caplog: Any
) -> None:
    torch_threads.append(3)
    LayerStreamer.from_checkpoint(model, device="cpu").close()
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    ("device", "options"), [("fake", {"n_cpu_pinned": 1}), ("cpu", {"device_budget": "1GiB"})]
)
def test_nothing_is_said_where_no_thread_reads_beside_torchs(
    model: Path, caplog: Any, device: str, options: dict[str, Any]
) -> None:
    with open_checkpoint(make_device(device), model, **options):
        assert warnings_of(caplog) == []


def test_a_bench_measures_with_a_core_left_and_needs_no_advice(
    torch_threads: list[int], model: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layer_streamer.measuring.rawspeed.READ_GRID", ((1, 8192),))
    seen = []

    def open_streamer() -> LayerStreamer:
        seen.append(torch_threads[-1])
        return LayerStreamer.from_checkpoint(model, device="cpu")

    run_bench(open_streamer, Bench(passes=1))
    assert seen == [3]
    assert torch_threads[-1] == 4
    assert warnings_of(caplog) == []
