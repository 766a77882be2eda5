"""Open files: which of them are read direct, who refuses, and the descriptors behind them."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from checkpoints import random_tensor, write_safetensors
from disks import Disk, open_descriptors, pages, refuse, stamp, warnings_of
from support import Witness, make_device, open_checkpoint

from layer_streamer import CheckpointChangedError, LayerStreamer, ReadError
from layer_streamer.planning.layout import PAGE
from layer_streamer.transport import files
from layer_streamer.transport.files import OpenFiles, open_direct

SHM = Path("/dev/shm")
TENSORS = {f"model.layers.{i}.w": random_tensor((9001,), seed=i) for i in range(4)}
NAMES = ("model-0.safetensors", "model-1.safetensors")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two files, at odd offsets, of two layers each."""
    for part, name in enumerate(NAMES):
        some = {n: TENSORS[n] for n in list(TENSORS)[2 * part : 2 * part + 2]}
        write_safetensors(tmp_path / name, some, padding=part)
    return tmp_path


def modes(streamer: LayerStreamer) -> list[str]:
    return [streamer.read_modes[path] for path in sorted(streamer.read_modes)]


def run_exact(streamer: LayerStreamer) -> None:
    device = streamer._devices[0]
    witness = Witness(device, TENSORS)
    for _ in range(3):
        streamer.run_pass(None, witness)
    assert witness.layers == 3 * list(range(4))
    witness.check()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM])
def test_a_file_that_refuses_a_direct_open_is_read_buffered_and_others_direct(
    checkpoint: Path, disk: Disk, monkeypatch: Any, caplog: Any, number: int
) -> None:
    opened = disk._open
    monkeypatch.setattr(
        files, "open_direct", lambda p: refuse(number) if p.name == NAMES[0] else opened(p)
    )
    with open_checkpoint(None, checkpoint, read_mode="direct") as streamer:
        assert modes(streamer) == ["buffered", "direct"]
        run_exact(streamer)
    (warning,) = warnings_of(caplog)
    assert NAMES[0] in warning
    assert os.strerror(number) in warning


@pytest.mark.skipif(sys.platform != "linux", reason="O_DIRECT is Linux's")
def test_the_refusal_of_the_system_call_itself_is_a_refusal_of_that_file_alone(
    checkpoint: Path, monkeypatch: Any
) -> None:
    real = os.open

    def open_file(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            return refuse() if str(path).endswith(NAMES[1]) else real(path, flags & ~os.O_DIRECT)
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", open_file)
    with open_checkpoint(None, checkpoint, read_mode="direct") as streamer:
        assert modes(streamer) == ["direct", "buffered"]
        run_exact(streamer)


@pytest.mark.parametrize("kind", ["cpu", "fake"])
@pytest.mark.parametrize("allowed", [0, 1, 7])
def test_a_file_that_refuses_a_direct_read_is_read_buffered_from_then_on(
    checkpoint: Path, disk: Disk, caplog: Any, kind: str, allowed: int
) -> None:
    times = iter(range(10_000))

    def read(path: Path, view: Any, offset: int) -> None:
        if path.name == NAMES[1] and next(times) >= allowed:
            refuse()

    disk.read = read
    options = {"read_mode": "direct", "read_chunk": 4096, "n_cpu_pinned": 1}
    with open_checkpoint(make_device(kind), checkpoint, **options) as streamer:
        assert modes(streamer) == ["direct", "direct"]
        run_exact(streamer)
        assert modes(streamer) == ["direct", "buffered"]
        calls = next(times)
        run_exact(streamer)
        assert next(times) == calls + 1
    (warning,) = warnings_of(caplog)
    assert NAMES[1] in warning
    assert "Invalid argument" in warning


def test_threads_that_are_refused_at_once_all_read_buffered_and_it_is_said_once(
    checkpoint: Path, disk: Disk, caplog: Any
) -> None:
    threads = 4
    barrier = threading.Barrier(threads, timeout=300)

    def read(path: Path, view: Any, offset: int) -> None:
        barrier.wait()
        refuse()

    disk.read = read
    path = checkpoint / NAMES[0]
    opened = OpenFiles({path: stamp(path)})
    opened.use_direct()
    views = [pages(8 * PAGE) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda view: opened.read_into(path, view, PAGE), views))
    assert all(bytes(v) == path.read_bytes()[PAGE : 9 * PAGE] for v in views)
    assert len(warnings_of(caplog)) == 1
    opened.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENXIO])
def test_any_other_error_of_a_direct_read_names_file_and_offset_and_the_file_stays_direct(
    checkpoint: Path, disk: Disk, number: int
) -> None:
    disk.read = lambda path, view, offset: refuse(number)
    path = checkpoint / NAMES[0]
    opened = OpenFiles({path: stamp(path)})
    opened.use_direct()
    with pytest.raises(ReadError, match=rf"{NAMES[0]}.* offset 8192 .*{os.strerror(number)}"):
        opened.read_into(path, pages(PAGE), 2 * PAGE)
    assert opened.read_modes == {path: "direct"}
    opened.close()


@pytest.mark.skipif(sys.platform != "linux", reason="statx is Linux's")
@pytest.mark.parametrize(
    ("alignment", "mode"),
    [(None, "direct"), (0, "buffered"), (512, "direct"), (PAGE, "direct"), (2 * PAGE, "buffered")],
)
def test_a_file_is_read_direct_unless_its_file_system_needs_more_than_pages(
    checkpoint: Path, monkeypatch: Any, caplog: Any, alignment: int | None, mode: str
) -> None:
    real = os.open
    monkeypatch.setattr(
        "layer_streamer.transport.files.direct_alignment", lambda descriptor: alignment
    )
    monkeypatch.setattr(os, "open", lambda path, flags: real(path, flags & ~os.O_DIRECT))
    before = open_descriptors()
    with open_checkpoint(None, checkpoint, read_mode="direct") as streamer:
        assert modes(streamer) == [mode, mode]
        assert open_descriptors() - before == (4 if mode == "direct" else 2)
        run_exact(streamer)
    assert len(warnings_of(caplog)) == (0 if mode == "direct" else 2)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_every_descriptor_is_closed_also_those_that_were_refused_in_between(
    checkpoint: Path, disk: Disk
) -> None:
    before = open_descriptors()
    disk.read = lambda path, view, offset: refuse() if path.name == NAMES[0] else None
    streamer = open_checkpoint(None, checkpoint, read_mode="direct")
    run_exact(streamer)
    assert modes(streamer) == ["buffered", "direct"]
    streamer.close()
    assert open_descriptors() == before


def test_a_second_thread_that_closes_in_the_middle_closes_nothing_twice(
    checkpoint: Path, disk: Disk, monkeypatch: Any
) -> None:
    def close_in_the_middle(opened: OpenFiles, number: int) -> bool:
        lines = iter(range(number + 1))

        def trace(frame: FrameType, event: str, arg: Any) -> Any:
            if frame.f_code is OpenFiles.close.__code__ and next(lines, None) == number:
                sys.settrace(None)
                opened.close()
            return trace

        sys.settrace(trace)
        try:
            opened.close()
            return sys.gettrace() is None
        finally:
            sys.settrace(None)

    number, reached, before = 0, True, open_descriptors()
    while reached:
        opened = OpenFiles({checkpoint / name: stamp(checkpoint / name) for name in NAMES})
        opened.use_direct()
        opened._refuse_direct(checkpoint / NAMES[0], OSError())
        # In place of what is closed twice, this one would be closed the second time.
        assert open_descriptors() == before + 4
        reached = close_in_the_middle(opened, number)
        assert open_descriptors() == before
        number += 1
    assert number > 4


def test_a_name_that_has_come_to_mean_another_file_is_not_read_direct(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(os.urandom(3 * PAGE))
    link = tmp_path / "link"
    link.symlink_to("a")
    before = open_descriptors()
    opened = OpenFiles({link: stamp(link)})
    link.unlink()
    link.symlink_to("b")
    with pytest.raises(CheckpointChangedError, match=r"link: .*another file's"):
        opened.use_direct()
    opened.close()
    assert open_descriptors() == before


def test_real_direct_reads_on_this_disk_bring_the_files_bytes(checkpoint: Path) -> None:
    try:
        descriptor = open_direct(checkpoint / NAMES[0])
    except OSError as error:
        pytest.skip(f"the file system of {checkpoint} refuses direct reads: {error}")
    assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
    os.close(descriptor)
    with open_checkpoint(None, checkpoint, read_mode="direct", read_chunk=8192) as streamer:
        run_exact(streamer)
        assert modes(streamer) == ["direct", "direct"]


def allowed(path: Path) -> str:
    """How a file can be read."""
    try:
        os.close(open_direct(path))
    except OSError:
        return "buffered"
    return "direct"


def test_a_checkpoint_over_two_file_systems_is_read_from_each_as_it_allows(
    checkpoint: Path,
) -> None:
    if not SHM.is_dir() or SHM.stat().st_dev == checkpoint.stat().st_dev:
        pytest.skip("there is no second file system at /dev/shm")
    with tempfile.TemporaryDirectory(dir=SHM) as other:
        moved = Path(other, NAMES[1])
        moved.write_bytes((checkpoint / NAMES[1]).read_bytes())
        (checkpoint / NAMES[1]).unlink()
        (checkpoint / NAMES[1]).symlink_to(moved)
        for kind in ("cpu", "fake"):
            device = make_device(kind)
            with open_checkpoint(device, checkpoint, read_mode="direct") as streamer:
                run_exact(streamer)
                assert modes(streamer) == [allowed(checkpoint / name) for name in NAMES]


def test_which_part_is_cached_is_sampled_and_unknown_counts_as_not(
    checkpoint: Path, monkeypatch: Any
) -> None:
    path = checkpoint / NAMES[0]
    nbytes = len(path.read_bytes())  # has it cached
    opened = OpenFiles({path: stamp(path)})
    assert 0.0 <= opened.cached_share([(path, 0, nbytes)]) <= 1.0
    assert opened.cached_share([(path, 5, 0)]) == 1.0
    real = os.preadv

    def half(descriptor: int, views: Any, offset: int, flags: int) -> int:
        assert flags == os.RWF_NOWAIT
        return real(descriptor, views, offset) if offset < nbytes // 2 else refuse(errno.EAGAIN)

    monkeypatch.setattr(os, "preadv", half)
    assert opened.cached_share([(path, 0, nbytes)]) == pytest.approx(0.5, abs=0.05)
    monkeypatch.delattr(os, "preadv")
    assert opened.cached_share([(path, 0, nbytes)]) == 0.0
    opened.close()
