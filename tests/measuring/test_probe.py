"""What a probe reads and copies: the promised bytes, files that go, refusals that are said."""

from __future__ import annotations

import errno
import gc
import os
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fake_device import FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from probing import KIB, TINY, refuse, settle_on_a_disk, write_model

from layer_streamer import ConfigError, ReadError
from layer_streamer.machine.limits import MachineLimits
from layer_streamer.measuring import probe_config, probe_disk, probe_files
from layer_streamer.measuring.probe import Place, choose_devices, is_known, probe
from layer_streamer.measuring.probe_config import Journal, ProbeConfig
from layer_streamer.measuring.probe_files import (
    Chunk,
    ProbeFiles,
    choose_files,
    drop_from_cache,
    is_cached,
    temporary_files,
    temporary_nbytes,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with two large files."""
    return write_model(tmp_path / "model")


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Any:
    """Every test leaves as many descriptors and threads as it found."""
    before = sorted(Path("/proc/self/fd").iterdir())
    yield
    if sorted(Path("/proc/self/fd").iterdir()) != before:
        gc.collect()
    assert sorted(Path("/proc/self/fd").iterdir()) == before
    assert not [t for t in threading.enumerate() if t.name.startswith("layer-streamer")]


@pytest.fixture(autouse=True)
def on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle_on_a_disk(tmp_path, monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty directory."""
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Chunk, str]]:
    """Every read of a probe, in order; its bytes are compared with the file's."""
    seen: list[tuple[Chunk, str]] = []
    read = ProbeFiles.read

    def watched(self: ProbeFiles, chunk: Chunk, view: memoryview, mode: str) -> None:
        read(self, chunk, view, mode)
        assert bytes(view) == os.pread(chunk.file.buffered, chunk.nbytes, chunk.offset)
        seen.append((chunk, mode))

    monkeypatch.setattr(ProbeFiles, "read", watched)
    return seen


def run(path: Path, journal: Journal | None = None, *, temporary: bool = False) -> MachineLimits:
    return probe(Place(path, temporary), [], TINY, journal or Journal())


@settings(deadline=None)
@given(st.data())
def test_chunks_go_round_the_files_and_overlap_only_in_the_next_round(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    files = ProbeFiles([])
    files.files = [
        probe_files.OpenFile(Path(str(i)), n * 4096, -1, None) for i, n in enumerate(sizes)
    ]
    nbytes = data.draw(st.integers(1, max([*sizes, 1]))) * 4096
    num_chunks = files.num_chunks(nbytes)
    if num_chunks:
        counts = data.draw(st.lists(st.integers(0, 5), max_size=5))
        chunks = [chunk for count in counts for chunk in files.take(nbytes, count)]
        assert len(chunks) == sum(counts)
        assert all(c.offset % 4096 == 0 and c.offset + nbytes <= c.file.nbytes for c in chunks)
        rounds = Counter((chunk.file.path, chunk.offset) for chunk in chunks)
        assert max(rounds.values(), default=0) <= -(-len(chunks) // num_chunks)
        assert files.read_again == (sum(counts) * nbytes > files.nbytes)


def test_exactly_the_promised_chunks_are_read_and_none_twice_while_there_are_others(
    model: Path, reads: list[tuple[Chunk, str]]
) -> None:
    limits = run(model)
    assert limits.disk is not None
    modes = Counter(mode for _, mode in reads)
    # A guess of 34 chunks, then (3 samples + 2 rounds) of each number of threads and chunk size.
    assert modes["direct"] == 34 + 5 * (1 + 3) * 2
    assert modes["cold"] == 5 * 2
    # 8 chunks to see if the system lets go, 8 of the region to have it cached, then as above.
    assert modes["cached"] == 8 + 8 + 34 + 5 * (1 + 2)
    first = [chunk for chunk, mode in reads if mode == "direct"][:34]
    assert len({(chunk.file.path, chunk.offset) for chunk in first}) == 34
    assert {chunk.file.path.name for chunk, _ in reads} == {"a.safetensors", "b.safetensors"}


def test_every_point_of_the_grid_has_a_rate(model: Path) -> None:
    limits = run(model)
    assert limits.disk is not None
    points = [(read.mode, read.threads, read.chunk_nbytes) for read in limits.disk.reads]
    direct = [("direct", t, c) for c in TINY.read_chunks for t in TINY.read_threads]
    assert points == [*direct, ("cold", 2, 8 * KIB)]
    assert [rate.threads for rate in limits.disk.cached_reads] == [1, 2]
    assert [rate.threads for rate in limits.machine.memcpy] == [1, 2]
    assert limits.disk.path == str(model)
    assert limits.machine.devices == ()


def test_progress_names_every_measurement_and_ends_at_the_announced_number(model: Path) -> None:
    for path, temporary in ((model, False), (model, True)):
        seen: list[tuple[str, int]] = []
        run(path, Journal(lambda *call: seen.append(call)), temporary=temporary)  # noqa: B023
        assert len({name for name, _ in seen}) == len(seen)
        assert seen[-1][1] == len(seen)


@pytest.mark.parametrize("where", ["open_direct", "read_direct"])
def test_refused_direct_reads_are_said_and_cold_ones_take_their_place(
    model: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(probe_files, where, refuse(errno.EINVAL))
    journal = Journal()
    limits = run(model, journal)
    assert limits.disk is not None
    assert [read.mode for read in limits.disk.reads] == ["cold"] * 4
    assert limits.read_rate is not None
    assert "direct reads are refused (Invalid argument): cold reads" in "\n".join(journal.notes)


def test_a_cache_that_does_not_let_go_is_said_and_no_read_called_cold(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_disk, "is_cached", lambda chunk: True)
    journal = Journal()
    limits = run(model, journal)
    assert limits.disk is not None
    assert {read.mode for read in limits.disk.reads} == {"direct"}
    assert any(note.startswith("cold reads: not measured") for note in journal.notes)
    monkeypatch.setattr(probe_files, "open_direct", refuse(errno.EINVAL))
    limits = run(model, journal)
    assert limits.disk is not None
    assert limits.disk.reads == ()
    assert limits.read_rate is None
    assert "(Invalid argument): nothing instead" in "\n".join(journal.notes)


def test_a_file_in_memory_is_not_taken_for_a_disk(model: Path) -> None:
    (model.parent / "mountinfo").write_text(f"1 0 0:27 / {model} rw - tmpfs tmpfs rw\n")
    journal = Journal()
    limits = run(model, journal)
    assert limits.disk is not None
    assert limits.disk.file_system.type == "tmpfs"
    assert "tmpfs is memory" in journal.notes[0]
    assert all(read.mode == "direct" for read in limits.disk.reads)


def test_what_is_in_the_page_cache_is_known_where_the_system_tells(model: Path) -> None:
    with closing(ProbeFiles([model / "a.safetensors"])) as files:
        (whole,) = files.take(700 * KIB, 1)
        assert is_cached(whole) is not False, "it has just been written"
        os.fsync(whole.file.buffered)
        drop_from_cache([whole])
        if is_cached(whole) is False:
            files.read(whole, memoryview(bytearray(whole.nbytes)), "cached")
            assert is_cached(whole)


def test_a_read_that_fails_names_the_file_and_the_place(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_files, "read_direct", refuse(errno.EIO))
    with pytest.raises(ReadError, match=r"a\.safetensors: reading 4096 bytes at offset 0"):
        run(model)
    monkeypatch.undo()
    monkeypatch.setattr(probe_files, "read_exactly", refuse(errno.EIO))
    with pytest.raises(ReadError, match=r"a\.safetensors: reading 8192 bytes.*Input/output"):
        run(model)


def test_only_large_files_of_a_directory_are_read(model: Path) -> None:
    large = [model / "a.safetensors", model / "b.safetensors"]
    assert choose_files(model, 8 * KIB) == large
    assert choose_files(model / "a.safetensors", 8 * KIB) == [model / "a.safetensors"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("more", "holds no file of at least 8192 bytes"),
        ("config.json", "holds no file of at least 8192 bytes"),
        ("nowhere", "No such file"),
        ("pipe", "neither a file nor a directory"),
    ],
)
def test_a_path_without_a_large_file_is_an_error_that_names_it(
    model: Path, name: str, message: str
) -> None:
    os.mkfifo(model / "pipe")
    with pytest.raises(ConfigError, match=f"{model / name}: .*{message}"):
        run(model / name)


def test_the_temporary_file_is_whole_on_the_disk_and_has_no_name(folder: Path) -> None:
    with temporary_files(folder, 40 * KIB) as files:
        assert list(folder.iterdir()) == []
        (file,) = files.files
        content = os.pread(file.buffered, 64 * KIB, 0)
        assert len(content) == 40 * KIB
        assert len(set(content[i : i + 4 * KIB] for i in range(0, 40 * KIB, 4 * KIB))) == 10


def test_the_temporary_file_goes_when_all_is_measured(folder: Path) -> None:
    run(folder, temporary=True)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ReadError])
def test_the_temporary_file_goes_whatever_happens(folder: Path, error: Any) -> None:
    def run_until(number: int) -> int:
        seen: list[str] = []

        def at(name: str, total: int) -> None:
            seen.append(name)
            if len(seen) == number:
                raise error

        run(folder, Journal(at), temporary=True)
        return len(seen)

    num_measurements = run_until(-1)
    assert num_measurements == 10
    for number in range(1, num_measurements + 1):
        with pytest.raises(error):
            run_until(number)
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("call", ["open", "ftruncate", "pwrite", "fsync"])
def test_a_temporary_file_that_cannot_be_written_is_one_clear_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse(errno.ENOSPC))
        with (
            pytest.raises(ConfigError, match=f"{folder}: a temporary file cannot be written: No"),
            temporary_files(folder, 40 * KIB),
        ):
            pass
    assert list(folder.iterdir()) == []


def test_a_temporary_file_is_bounded_by_what_is_free(folder: Path) -> None:
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    assert temporary_nbytes(folder, 4096, 4096) == 4096
    bounded = temporary_nbytes(folder, 1 << 60, 4096)
    assert bounded % 4096 == 0
    assert bounded < free / 2
    with pytest.raises(ConfigError, match="bytes are free, a temporary file needs at least"):
        temporary_nbytes(folder, 1 << 60, 1 << 60)
    with pytest.raises(ConfigError, match="nowhere: cannot be used: No such file"):
        temporary_nbytes(folder / "nowhere", 4096, 4096)


def test_too_little_host_memory_is_an_error_with_the_bound(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    available = probe_config.HOST_MARGIN + 16 * KIB
    monkeypatch.setattr(probe_config, "available_host_bytes", lambda: available)
    limits = run(model)
    assert limits.disk is not None
    # Three threads' chunks no longer fit.
    assert {read.threads * read.chunk_nbytes for read in limits.disk.reads} == {8 * KIB, 16 * KIB}
    monkeypatch.setattr(probe_config, "available_host_bytes", lambda: available - 1)
    with pytest.raises(ConfigError, match=f"{available - 1} bytes.* at least {available}"):
        run(model)


@pytest.mark.parametrize("seconds", [0, -1, 61, float("nan"), float("inf")])
def test_a_time_out_of_bounds_is_an_error(seconds: float) -> None:
    with pytest.raises(ConfigError, match="seconds="):
        ProbeConfig(seconds=seconds)


def test_a_part_on_record_is_known_if_it_has_the_devices_and_is_no_rougher(model: Path) -> None:
    part = run(model).machine
    thorough = ProbeConfig()
    assert is_known(part, [], TINY)
    assert not is_known(part, [], thorough)
    assert not is_known(part, [FakeDevice(1)], TINY)
    known = probe(Place(model, False), [], TINY, Journal(), part)
    assert known.machine is part


def test_the_cpu_is_no_device_to_copy_to() -> None:
    assert choose_devices(["cpu"]) == []
    with pytest.raises(ConfigError, match="device="):
        choose_devices(["cuda:99"])


def test_files_close_twice_without_harm(model: Path) -> None:
    files = ProbeFiles(choose_files(model, 8 * KIB))
    with closing(files):
        files.close()
    with pytest.raises(ConfigError, match="nothing: cannot be opened"):
        ProbeFiles([model / "a.safetensors", model / "nothing"])
