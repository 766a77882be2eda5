"""``python -m layer_streamer probe``: the table, the JSON, the record, exit codes."""

from __future__ import annotations

import gc
import json
import os
import signal
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreters import COMMAND, Fork
from probing import KIB, TINY, refuse, settle_on_a_disk, write_model

from layer_streamer.__main__ import main
from layer_streamer.machine import limits
from layer_streamer.machine.limits import (
    DeviceLimits,
    MachineLimits,
    SizeRate,
    decode,
    load_limits,
)
from layer_streamer.measuring import probe_config, probe_files
from layer_streamer.measuring.probe_table import describe

CPU = ["--device", "cpu", "--quick"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with two large files."""
    return write_model(tmp_path / "model")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache directory, empty; probes at their shortest."""
    settle_on_a_disk(tmp_path, monkeypatch)
    monkeypatch.setattr(probe_config, "quick_config", lambda: TINY)
    monkeypatch.setattr(probe_config, "ProbeConfig", lambda: replace(TINY, quick=False))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_last_line_is_json_with_the_whole_record_which_is_saved(
    model: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", str(model), *CPU]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out.splitlines()[-1])
    found = decode(document["limits"], MachineLimits)
    assert found == load_limits(model)
    assert set(document["limits"]) == {"version", *(f.name for f in fields(MachineLimits))}
    assert set(document["rates"]) == {
        "read_rate", "cached_read_rate", "memcpy_rate", "copy_rates", "copy_together_rate"
    }  # fmt: skip
    assert document["rates"]["read_rate"] == found.read_rate > 0
    assert document["rates"]["copy_together_rate"] is None
    assert {Path(path) for path in document["saved"]} == {p for p in cache.rglob("*.json")}
    assert any("no accelerator" in note for note in document["notes"])


def test_the_table_has_every_rate_and_the_notes_and_progress_is_on_stderr(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", str(model), *CPU]) == 0
    printed = capsys.readouterr()
    table = printed.out.splitlines()[:-1]
    titles = [line for line in table if not line.startswith((" ", "note: "))]
    assert titles[1].startswith(f"disk: {model} (ext4 8:1)")
    assert titles[2].split() == ["direct", "reads", "8", "KiB", "16", "KiB"]
    assert [title.split("  ")[0] for title in titles[3:-1]] == [
        "cold reads", "reads from the page cache", "memcpy, host to host"
    ]  # fmt: skip
    assert sum(line.count("*") for line in table) == 4 + 1
    assert any(line.startswith("note: copies to a device: not measured") for line in table)
    assert "direct reads, 3 threads x 8 KiB" in printed.err
    assert "memcpy" in printed.err


def test_devices_have_their_rows_and_a_sum(model: Path) -> None:
    assert main(["probe", str(model), *CPU]) == 0
    found = load_limits(model)
    assert found is not None
    sizes = (SizeRate(64 * KIB, 8e9), SizeRate(16 << 20, 55.25e9))
    devices = (
        DeviceLimits("cuda:0", True, sizes, 10e9, 50e9),
        DeviceLimits("cuda:1", False, sizes, 10e9, 50e9),
    )
    machine = replace(found.machine, devices=devices, copy_together=111e9)
    lines = describe(MachineLimits(machine, None)).splitlines()
    begin = lines.index("copies to cuda:0 from pinned memory")
    rows = [line.split() for line in lines[begin : begin + 10]]
    assert rows[1:5] == [
        ["64", "KiB", "8.00"], ["16", "MiB", "55.25*"], ["from", "pageable", "memory", "10.00"],
        ["back", "50.00"],
    ]  # fmt: skip
    assert "page-locking was refused" in lines[begin + 5]
    assert lines[begin + 10].split() == ["all", "2", "at", "once", "111.00"]


def test_without_a_path_a_temporary_file_is_probed_in_the_directory_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for options, folder in ([], "here"), (["--dir", str(tmp_path / "there")], "there"):
        assert main(["probe", *CPU, *options]) == 0
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert document["limits"]["disk"]["path"] == str(tmp_path / folder)
        assert list((tmp_path / folder).iterdir()) == []


def test_the_machines_part_is_taken_from_the_record_unless_forced_or_rough(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def probed(*options: str) -> tuple[Any, bool]:
        assert main(["probe", str(model), "--device", "cpu", *options]) == 0
        printed = capsys.readouterr()
        found = load_limits(model)
        assert found is not None
        return found.machine, "memcpy" in printed.err

    quick, measured = probed("--quick")
    assert measured
    assert probed("--quick") == (quick, False)
    thorough, measured = probed()
    assert measured
    assert (quick.quick, thorough.quick) == (True, False)
    assert probed() == probed("--quick") == (thorough, False)
    forced, measured = probed("--force")
    assert measured
    assert forced.memcpy != thorough.memcpy


def test_a_refused_direct_read_is_in_the_table_and_in_the_document(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe_files, "open_direct", refuse(22))
    assert main(["probe", str(model), *CPU]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert any("direct reads are refused (Invalid argument)" in line for line in table)
    assert any("refused" in note for note in json.loads(last)["notes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "nowhere: cannot be read: No such file"),
        ([".", "--dir", "x"], "--dir=x: only for a temporary file"),
        (["--dir", "nowhere"], "nowhere: cannot be used"),
        (["--seconds", "0"], "seconds=0.0: must be above 0"),
        (["--device", "cuda:99"], "device='cuda:99'"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_nothing_is_saved(
    cache: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["probe", "--quick", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    *_, last = printed.err.splitlines()
    assert last.startswith(f"error: {message}")
    assert not cache.exists()


def test_a_record_that_cannot_be_saved_is_a_warning_and_the_figures_are_printed(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limits, "write_atomically", refuse(30))
    assert main(["probe", str(model), *CPU]) == 0
    printed = capsys.readouterr()
    assert "warning: the limits were not saved: [Errno 30] Read-only file system" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["saved"] == []


@pytest.mark.parametrize("number", range(0, 13, 2))
def test_an_interrupt_ends_with_130_and_saves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, number: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "here").mkdir()
    measurements = iter(range(100))

    class Interrupted(probe_config.Journal):
        def measuring(self, name: str) -> None:
            super().measuring(name)
            if next(measurements) == min(number, 9):
                raise KeyboardInterrupt

    monkeypatch.setattr(probe_config, "Journal", Interrupted)
    assert main(["probe", "--dir", str(tmp_path / "here"), *CPU]) == 130
    assert capsys.readouterr().out == ""
    assert list((tmp_path / "here").iterdir()) == []
    assert not cache.exists()


def test_ctrl_c_in_the_terminal_ends_a_real_probe_with_nothing_left(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    file = tmp_path / "model.bin"
    file.write_bytes(os.urandom(4 << 20))
    command = ["probe", file, "--device", "cpu", "--seconds", "60"]
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with Fork(COMMAND, *command, environment=cache) as probing:
        said = b""
        # The bar names it: a measurement of a minute has begun.
        while b"direct reads" not in said and b"cold reads" not in said:
            more = probing.stderr.read1()
            assert more, "it ended by itself"
            said += more
        probing.send_signal(signal.SIGINT)
        done = probing.wait()
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "cache").exists()


@pytest.mark.gpu
def test_a_real_gpu_is_probed_in_seconds_and_its_link_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gc.collect()
    before = torch.cuda.memory_allocated(), torch.cuda.current_device()
    assert main(["probe", "--quick", "--dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    found = load_limits(tmp_path)
    assert found == decode(json.loads(printed.splitlines()[-1])["limits"], MachineLimits)
    assert found is not None
    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    assert [device.device for device in found.machine.devices] == devices
    assert found.machine.identity.gpus[0] == torch.cuda.get_device_name(0)
    for device in found.machine.devices:
        assert device.pinned
        assert [rate.nbytes >> 10 for rate in device.copies] == [64, 1 << 10, 16 << 10, 256 << 10]
        rates = [rate.bytes_per_s for rate in device.copies]
        # No link is that fast: a copy that was not waited for would be.
        assert all(0 < rate < 1e12 for rate in [*rates, device.pageable, device.back])
    assert (found.machine.copy_together is not None) == (len(devices) > 1)
    gc.collect()
    assert (torch.cuda.memory_allocated(), torch.cuda.current_device()) == before
    with capsys.disabled():
        print(printed)
