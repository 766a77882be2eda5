"""The record of measured limits: round trip, what is ignored, what belongs to whom."""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from damage import damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layer_streamer.machine import identity as machine_module
from layer_streamer.machine import limits as limits_module
from layer_streamer.machine.identity import FileSystem, MachineIdentity, file_system, this_machine
from layer_streamer.machine.limits import (
    DeviceLimits,
    DiskPart,
    MachineLimits,
    MachinePart,
    ReadRate,
    SizeRate,
    ThreadRate,
    decode,
    encode,
    load_limits,
    save_limits,
)
from layer_streamer.planning.settings import Settings

rates = st.floats(min_value=1e-3, max_value=1e15)
counts = st.integers(1, 1 << 30)
few = st.integers(1, 256)
modes = st.sampled_from(["direct", "cold"])
texts = st.text(max_size=8)
parts = st.builds(
    MachinePart,
    identity=st.builds(
        MachineIdentity, texts, counts, st.tuples(texts) | st.just(()), st.none() | texts, texts
    ),
    measured_at=texts,
    quick=st.booleans(),
    memcpy=st.lists(st.builds(ThreadRate, few, rates), max_size=3).map(tuple),
    devices=st.lists(
        st.builds(
            DeviceLimits,
            texts,
            st.booleans(),
            st.lists(st.builds(SizeRate, counts, rates), min_size=1, max_size=3).map(tuple),
            rates,
            rates,
        ),
        max_size=2,
    ).map(tuple),
    copy_together=st.none() | rates,
)
disks = st.builds(
    DiskPart,
    file_system=st.builds(FileSystem, counts, texts),
    path=texts,
    measured_at=texts,
    quick=st.booleans(),
    reads=st.lists(st.builds(ReadRate, modes, few, counts, rates), max_size=3).map(tuple),
    cached_reads=st.lists(st.builds(ThreadRate, few, rates), max_size=3).map(tuple),
)


def sample(path: Path, *, read: float = 3e9, memcpy: float = 9e9) -> MachineLimits:
    """Limits of this machine and of the file system of ``path``."""
    device = DeviceLimits(
        "cuda:0", True, (SizeRate(1 << 20, 31e9), SizeRate(1 << 24, 52e9)), 1e10, 5e10
    )
    copies = (ThreadRate(1, memcpy),)
    machine = MachinePart(this_machine(), "2026-01-01", False, copies, (device,), None)
    reads = (ReadRate("direct", 4, 1 << 20, read), ReadRate("cold", 4, 1 << 20, 2 * read))
    disk = DiskPart(file_system(path), str(path), "", False, reads, (ThreadRate(8, 2e10),))
    return MachineLimits(machine, disk)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache directory, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@given(st.builds(MachineLimits, parts, st.none() | disks))
def test_a_record_comes_back_from_json_as_it_was(limits: MachineLimits) -> None:
    assert decode(json.loads(json.dumps(encode(limits))), MachineLimits) == limits


def test_what_is_saved_is_loaded_for_a_path_on_the_same_file_system(
    tmp_path: Path, cache: Path
) -> None:
    limits = sample(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.gguf").touch()
    files = save_limits(limits)
    assert {path for path in cache.rglob("*") if path.is_file()} == set(files)
    assert len(files) == 2
    for path in (tmp_path, tmp_path / "model", tmp_path / "model" / "a.gguf"):
        assert load_limits(path) == limits


def test_without_a_path_only_the_machine_is_loaded(tmp_path: Path) -> None:
    limits = sample(tmp_path)
    save_limits(limits)
    assert load_limits() == MachineLimits(limits.machine, None)


def test_without_a_record_there_are_no_limits_and_no_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert load_limits() is None
    assert load_limits(tmp_path) is None
    assert load_limits(tmp_path / "not there") is None
    assert not caplog.records


@pytest.mark.parametrize("value", ["", "relative/cache"])
def test_a_cache_directory_that_is_not_absolute_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for path in save_limits(sample(tmp_path)):
        assert path.is_relative_to(tmp_path / "home" / ".cache" / "layer-streamer" / "limits")


def with_entry(name: str, value: Any) -> Any:
    def change(document: dict[str, Any]) -> str:
        return json.dumps({**document, name: value})

    return change


def without_entry(name: str) -> Any:
    return lambda document: json.dumps({k: v for k, v in document.items() if k != name})


DAMAGE = {
    "empty": lambda document: "",
    "cut short": lambda document: json.dumps(document)[:-9],
    "not an object": lambda document: "[1, 2]",
    "not text": lambda document: "\udcff",
    "nested too deep": lambda document: "[" * 100_000,
    "older": with_entry("version", 0),
    "newer": with_entry("version", limits_module.VERSION + 1),
    "of no version": without_entry("version"),
    "with a field too many": with_entry("surprise", 1),
    "with a field too few": without_entry("measured_at"),
    "with text for a list": with_entry("memcpy", "fast"),
    "with a rate that is text": with_entry("memcpy", [{"threads": 1, "bytes_per_s": "9e9"}]),
    "with no rate": with_entry("memcpy", [{"threads": 1}]),
    "with a rate of nan": with_entry("memcpy", [{"threads": 1, "bytes_per_s": float("nan")}]),
    "with a rate of 0": with_entry("memcpy", [{"threads": 1, "bytes_per_s": 0}]),
    "with a rate below 0": with_entry("memcpy", [{"threads": 1, "bytes_per_s": -1.0}]),
    "with a count that is a bool": with_entry("memcpy", [{"threads": True, "bytes_per_s": 1.0}]),
    "with a flag that is a number": with_entry("quick", 1),
    "with null": with_entry("identity", None),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_machine_record_that_is_not_exactly_one_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    path, _ = save_limits(sample(tmp_path))
    text = damage(json.loads(path.read_text()))
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    assert load_limits(tmp_path) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(path) in caplog.text


def test_a_broken_record_of_a_disk_leaves_the_machines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = sample(tmp_path)
    _, path = save_limits(limits)
    path.write_text("{}")
    assert load_limits(tmp_path) == MachineLimits(limits.machine, None)
    assert str(path) in caplog.text


def test_two_file_systems_have_a_record_each(tmp_path: Path) -> None:
    here, there = sample(tmp_path), sample(Path("/proc"), read=1e9)
    assert here.disk is not None
    assert there.disk is not None
    assert here.disk.file_system != there.disk.file_system
    save_limits(here)
    save_limits(there)
    assert load_limits(tmp_path) == here
    assert load_limits(Path("/proc")) == there


def test_a_record_of_the_machine_alone_leaves_the_disks(tmp_path: Path) -> None:
    first, second = sample(tmp_path), sample(tmp_path, memcpy=1e9)
    save_limits(first)
    save_limits(MachineLimits(second.machine, None))
    assert load_limits(tmp_path) == MachineLimits(second.machine, first.disk)


@pytest.mark.parametrize("change", [{"driver": "1.2.3"}, {"torch": "0.1"}])
def test_limits_under_another_driver_or_torch_are_not_this_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    limits = sample(tmp_path)
    save_limits(limits)
    other = replace(this_machine(), **change)
    monkeypatch.setattr(limits_module, "this_machine", lambda **_: other)
    assert load_limits(tmp_path) is None
    # The disk's part outlives the change.
    save_limits(MachineLimits(replace(limits.machine, identity=other), None))
    found = load_limits(tmp_path)
    assert found is not None
    assert found.disk == limits.disk


def test_machines_that_share_a_home_directory_do_not_share_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = sample(tmp_path)
    save_limits(mine)
    other = replace(this_machine(), gpus=("another GPU",))
    theirs = replace(mine, machine=replace(mine.machine, identity=other))
    save_limits(theirs)
    assert load_limits(tmp_path) == mine
    monkeypatch.setattr(limits_module, "this_machine", lambda **_: other)
    assert load_limits(tmp_path) == theirs


def test_a_save_that_fails_leaves_the_record_before_it(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = sample(tmp_path)
    save_limits(limits)
    before = sorted(cache.rglob("*"))

    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refuse)
        with pytest.raises(OSError, match="No space"):
            save_limits(sample(tmp_path, memcpy=1e9))
    assert load_limits(tmp_path) == limits
    assert sorted(cache.rglob("*")) == before


def test_a_direct_read_counts_before_a_faster_cold_one(tmp_path: Path) -> None:
    limits = sample(tmp_path, read=3e9)
    assert limits.read_rate == 3e9
    assert limits.disk is not None
    cold = replace(limits.disk, reads=limits.disk.reads[1:])
    assert replace(limits, disk=cold).read_rate == 6e9
    assert replace(limits, disk=replace(cold, reads=())).read_rate is None


def test_rates_are_the_best_of_their_kind_or_none(tmp_path: Path) -> None:
    limits = sample(tmp_path)
    assert (limits.cached_read_rate, limits.memcpy_rate) == (2e10, 9e9)
    assert limits.copy_rate("cuda:0") == 52e9
    assert limits.copy_rate("cuda:1") is None
    empty = MachineLimits(replace(limits.machine, memcpy=(), devices=()), None)
    assert empty.read_rate is empty.cached_read_rate is empty.memcpy_rate is None
    assert empty.copy_together_rate is None


def test_one_device_alone_is_all_devices_together(tmp_path: Path) -> None:
    limits = sample(tmp_path)
    assert limits.copy_together_rate == 52e9
    both = replace(limits.machine, devices=limits.machine.devices * 2, copy_together=9e10)
    assert MachineLimits(both, None).copy_together_rate == 9e10


def test_the_file_system_is_that_of_the_innermost_mount_on_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "my models" / "deep"
    inner.mkdir(parents=True)
    escaped = str(tmp_path / "my models").replace(" ", "\\040")
    table = [
        "1 0 8:1 / / rw shared:1 - ext4 /dev/sda1 rw",
        f"2 1 0:40 / {escaped} rw - overlay overlay rw",
        f"3 1 259:3 / {escaped} rw - xfs /dev/nvme0n1 rw",
        f"4 1 0:41 / {tmp_path}/my rw - tmpfs tmpfs rw",
    ]
    (tmp_path / "mountinfo").write_text("\n".join(table) + "\n")
    monkeypatch.setattr(machine_module, "MOUNTS", tmp_path / "mountinfo")
    assert file_system(inner) == FileSystem(os.makedev(259, 3), "xfs")
    assert file_system(tmp_path) == FileSystem(os.makedev(8, 1), "ext4")
    assert str(file_system(inner)) == "xfs 259:3"


def test_without_a_table_of_mounts_the_number_is_the_files_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_module, "MOUNTS", tmp_path / "nothing")
    assert file_system(tmp_path) == FileSystem(tmp_path.stat().st_dev, "unknown")
    with pytest.raises(FileNotFoundError):
        file_system(tmp_path / "nothing")


def test_the_drivers_version_is_read_out_of_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Release Build\nGCC 12.3.0\n"
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(machine_module, "NVIDIA_DRIVER", tmp_path / "version")
    assert this_machine().driver == "580.159.04"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_whatever_a_record_holds_there_are_limits_that_can_be_used_or_none(
    tmp_path: Path, data: st.DataObject
) -> None:
    paths = save_limits(sample(tmp_path))
    path = data.draw(st.sampled_from(paths))
    path.write_bytes(data.draw(damaged(json.loads(path.read_bytes()))))
    limits = load_limits(tmp_path)
    if limits is None:
        return
    rates = [limits.read_rate, limits.cached_read_rate, limits.memcpy_rate]
    rates += [limits.copy_rate("cuda:0"), limits.pageable_rate("cuda:0")]
    assert all(rate is None or 0 < rate < math.inf for rate in rates)
    best = limits.best_read
    assert best is None or Settings(read_threads=best.threads)
    assert str(limits.disk)


@pytest.mark.parametrize("kind", ["fifo", "folder", "huge", "device"])
def test_a_record_that_is_no_small_file_is_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    path, _ = save_limits(sample(tmp_path))
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    assert load_limits(tmp_path) is None
    assert str(path) in caplog.text


ODD = ["\x85", "\u2028", "\x0c", "\x1c", "\r", "\udcff", "\\", "\t", " - "]


@pytest.mark.parametrize("odd", ODD)
def test_a_mounts_name_may_be_of_any_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    place = tmp_path / f"a{odd}b"
    place.mkdir()
    escaped = str(place).replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011")
    table = f"1 0 8:1 / / rw - ext4 /dev/sda1 rw\n2 1 0:9 / {escaped} rw - fuse x rw\n3 odd:1 / -\n"
    (tmp_path / "mountinfo").write_bytes(os.fsencode(table))
    monkeypatch.setattr(machine_module, "MOUNTS", tmp_path / "mountinfo")
    assert file_system(place) == FileSystem(os.makedev(0, 9), "fuse")
    assert file_system(tmp_path) == FileSystem(os.makedev(8, 1), "ext4")


def test_a_full_disk_names_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = sample(tmp_path)
    (folder,) = {path.parent for path in save_limits(limits)}
    full = open("/dev/full", "w")  # noqa: SIM115 - closed by what it is handed to
    monkeypatch.setattr(os, "fdopen", lambda *_, **__: full)
    with pytest.raises(OSError, match=str(folder / "machine.json")):
        save_limits(limits)
