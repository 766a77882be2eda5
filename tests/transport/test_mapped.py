"""Mapped files: ranges, views, what becomes of a file that shrinks, and refusals of the kernel."""

from __future__ import annotations

import errno
import gc
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_tensor, tiny_checkpoint, write_safetensors
from disks import stamp, warnings_of
from hypothesis import given
from hypothesis import strategies as st
from interpreters import run_script
from support import Witness, make_device, open_checkpoint, raw

from layer_streamer import CheckpointChangedError, ReadError
from layer_streamer.checkpoint.manifest import LayerSpec, TensorSpec
from layer_streamer.planning.layout import PAGE, Read
from layer_streamer.transport import mapped
from layer_streamer.transport.files import OpenFiles
from layer_streamer.transport.mapped import MERGE_GAP, MappedFiles, merge_ranges

FILES = [Path("a"), Path("b")]
MAPS = Path("/proc/self/maps")
linux = pytest.mark.skipif(not MAPS.exists(), reason="needs Linux's /proc")


@st.composite
def reads(draw: st.DrawFn) -> list[Read]:
    """In any order; they may share bytes, and lie near, at and beyond the gap that is merged."""
    found = []
    for _ in range(draw(st.integers(1, 8))):
        offset = draw(st.integers(0, 20_000)) + draw(st.sampled_from([0, 1, 2])) * (
            MERGE_GAP + draw(st.integers(-9000, 9000))
        )
        path, nbytes = draw(st.sampled_from(FILES)), draw(st.integers(1, 20_000))
        found.append(Read(path, offset, 0, nbytes))
    return found


@given(reads=reads())
def test_ranges_cover_every_read_from_a_page_on_in_order_and_apart(reads: list[Read]) -> None:
    ranges = merge_ranges(reads)
    for read in reads:
        holding = [r for r in ranges if r[0] == read.path and r[1] <= read.offset < r[2]]
        assert len(holding) == 1
        assert read.offset + read.nbytes <= holding[0][2]
    assert all(start % PAGE == 0 and start < end for _, start, end in ranges)
    for (path, _, end), (other, start, _) in pairwise(ranges):
        assert path < other or (path == other and end + MERGE_GAP < start)


@given(reads=reads())
def test_ranges_hold_no_more_than_the_reads_the_pages_they_begin_in_and_small_gaps(
    reads: list[Read],
) -> None:
    for path, start, end in merge_ranges(reads):
        inside = sorted(
            (read.offset, read.offset + read.nbytes)
            for read in reads
            if read.path == path and start <= read.offset < end
        )
        assert start == inside[0][0] // PAGE * PAGE
        assert end == max(read_end for _, read_end in inside)
        covered = start
        for read_start, read_end in inside:
            assert read_start // PAGE * PAGE - covered <= MERGE_GAP
            covered = max(covered, read_end)


class Mapped:
    """A file of three tensors, of which the second is in a region of its own, mapped."""

    def __init__(self, folder: Path, *, handed_out: bool = False) -> None:
        self.path = folder / "data"
        self.content = os.urandom(40_000)
        with self.path.open("wb") as file:
            file.write(self.content)
            file.seek(2 * MERGE_GAP)
            file.write(self.content)
        self.files = OpenFiles({self.path: stamp(self.path)})
        self.specs = [
            TensorSpec("a", torch.float32, (100, 2), self.path, 4, 800),
            TensorSpec("b", torch.uint8, (40_000,), self.path, 2 * MERGE_GAP, 40_000),
            TensorSpec("c", torch.int16, (3,), self.path, 10_000, 6),
        ]
        reads = [Read(spec.path, spec.offset, 0, spec.nbytes) for spec in self.specs]
        self.mapped = MappedFiles(self.files, reads, handed_out=handed_out)

    def expected(self, spec: TensorSpec) -> bytes:
        start = spec.offset % (2 * MERGE_GAP)
        return self.content[start : start + spec.nbytes]


@pytest.fixture
def some(tmp_path: Path) -> Any:
    made = Mapped(tmp_path)
    yield made
    made.mapped.close()
    made.files.close()


def test_views_hold_the_files_bytes(some: Mapped) -> None:
    assert len(some.mapped.regions) == 2
    empty = TensorSpec("e", torch.float16, (0, 3), some.path, 1, 0)
    weights, _ = some.mapped.view(LayerSpec(0, {spec.name: spec for spec in (*some.specs, empty)}))
    for spec in some.specs:
        view = weights[spec.name]
        assert (view.dtype, tuple(view.shape)) == (spec.dtype, spec.shape)
        assert raw(view).numpy().tobytes() == some.expected(spec)
    assert weights["e"].shape == (0, 3)


@linux
@pytest.mark.parametrize(("handed_out", "access"), [(False, "r--s"), (True, "rw-p")])
def test_pages_that_devices_copy_from_are_the_files_and_those_handed_out_copied_on_a_write(
    tmp_path: Path, handed_out: bool, access: str
) -> None:
    some = Mapped(tmp_path, handed_out=handed_out)
    lines = [line.split() for line in MAPS.read_text().splitlines() if str(some.path) in line]
    assert [fields[1] for fields in lines] == [access, access]
    some.files.close()


def test_what_is_written_to_private_pages_reaches_no_file_and_is_dropped_again(
    tmp_path: Path,
) -> None:
    some = Mapped(tmp_path, handed_out=True)
    weights, watch = some.mapped.view(LayerSpec(0, {spec.name: spec for spec in some.specs}))
    before = some.path.read_bytes()
    for tensor in weights.values():
        tensor.zero_()
    assert watch.written()
    assert some.path.read_bytes() == before
    some.mapped.restore([Read(s.path, s.offset, 0, s.nbytes) for s in some.specs])
    for spec in some.specs:
        assert raw(weights[spec.name]).numpy().tobytes() == some.expected(spec)
    some.files.close()


@linux
def test_the_mapping_lives_as_long_as_a_view_of_it_and_no_longer(tmp_path: Path) -> None:
    some = Mapped(tmp_path)
    view = some.mapped.view(LayerSpec(0, {"a": some.specs[0]}))[0]["a"][3:]
    some.mapped.close()
    some.files.close()
    some.mapped.regions.clear()
    expected = some.expected(some.specs[0])
    gc.collect()
    assert MAPS.read_text().count(str(tmp_path / "data")) == 1
    assert raw(view).numpy().tobytes() == expected[24:]
    del view
    gc.collect()
    assert str(tmp_path / "data") not in MAPS.read_text()


@linux
def test_populating_pages_that_are_gone_says_that_the_file_changed(some: Mapped) -> None:
    os.truncate(some.path, 100)
    with pytest.raises(CheckpointChangedError, match=r"data: .*expected"):
        some.mapped.populate_all(2, lambda nbytes: None)
    region = some.mapped.regions[1]
    read = Read(some.path, region.offset + 10, 0, 5000)
    with pytest.raises(CheckpointChangedError, match=r"data: .*expected"):
        some.mapped.fault_in(read)


@pytest.mark.parametrize("number", [errno.EFAULT, errno.EIO])
def test_pages_of_an_unchanged_file_that_cannot_be_read_are_a_read_error(
    some: Mapped, monkeypatch: Any, number: int
) -> None:
    # The kernel says EFAULT wherever a touch would kill, on a failing disk too.
    def refuse(address: int, nbytes: int, *, write: bool) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(mapped, "populate", refuse)
    monkeypatch.setattr(mapped, "in_memory", lambda address, nbytes: False)
    region = some.mapped.regions[1]
    read = Read(some.path, region.offset + 10, 0, 5000)
    with pytest.raises(ReadError, match=rf"data: .*offset {region.offset}.* cannot be read"):
        some.mapped.fault_in(read)


def test_a_file_that_shrank_before_it_is_mapped_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(9 * PAGE))
    files = OpenFiles({path: stamp(path)})
    os.truncate(path, PAGE)
    with pytest.raises(CheckpointChangedError, match="data: "):
        MappedFiles(files, [Read(path, 3 * PAGE, 0, PAGE)])
    files.close()


@pytest.mark.parametrize("kind", ["cpu", "fake"])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_a_mapped_checkpoint_is_streamed_byte_for_byte(
    tmp_path: Path, kind: str, padding: int
) -> None:
    tensors = tiny_checkpoint(tmp_path, 5, hidden=40, num_shards=2, padding=padding)
    device = make_device(kind)
    witness = Witness(device, tensors)
    with open_checkpoint(device, tmp_path, read_mode="mapped") as streamer:
        assert streamer.plan.read_mode == "mapped"
        for _ in range(3):
            streamer.run_pass(None, witness)
        witness.check()


WHEN = ["between passes", 0, 3, 7]
SHRINK = """
import os, sys
from layer_streamer import CheckpointChangedError, LayerStreamer

def shrink(path, when):
    def layer_fn(x, weights, i):
        total = sum(float(weight.double().sum()) for weight in weights.values())
        if when == i:
            os.truncate(path, 4096)
        return x + total

    with LayerStreamer.from_checkpoint(path, device=DEVICE, **OPTIONS) as streamer:
        for number in range(3):
            streamer.run_pass(0.0, layer_fn)
            if when == "between passes":
                os.truncate(path, 4096)

for path, when in zip(sys.argv[1:], WHEN, strict=True):
    print(when, end=": ", flush=True)
    try:
        shrink(path, when)
    except CheckpointChangedError as error:
        print(error, flush=True)
"""


@linux
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("stays", [False, True])
def test_a_mapped_file_that_shrinks_ends_the_pass_and_does_not_kill(
    tmp_path: Path, device: str, stays: bool
) -> None:
    if stays and device != "cpu":
        pytest.skip("what stays on a GPU has left its file")
    # Eight layers, of which prefetch has some ready, or all but the one in use (CPU). Not so small
    # that a GPU's driver has them copied by the processor.
    tensors = {f"model.layers.{i}.w": random_tensor((100_000,), torch.int8, i) for i in range(8)}
    paths = [write_safetensors(tmp_path / f"{n}.safetensors", tensors) for n in range(len(WHEN))]
    options = {"device_budget": "1GiB"} if stays else {"read_mode": "mapped"}
    given = f"WHEN, DEVICE, OPTIONS = {WHEN}, {device!r}, {options}\n"
    child = run_script(given + SHRINK, *paths)
    assert (child.returncode, child.stderr) == (0, ""), child.stdout
    for line, when, path in zip(child.stdout.splitlines(), WHEN, paths, strict=True):
        assert line.startswith(f"{when}: ")
        assert str(path) in line


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, None])
def test_a_kernel_that_cannot_populate_has_the_cpu_read_buffered(
    tmp_path: Path, monkeypatch: Any, caplog: Any, number: int | None
) -> None:
    def refuse(address: int, nbytes: int, *, write: bool) -> None:
        raise OSError(number, "refused") if number else OSError("refused")

    tensors = tiny_checkpoint(tmp_path, 3, hidden=40)
    monkeypatch.setattr(mapped, "populate", refuse)
    witness = Witness(torch.device("cpu"), tensors)
    with open_checkpoint(None, tmp_path, read_mode="mapped") as streamer:
        assert streamer.plan.read_mode == "buffered"
        assert "populat" in streamer.plan.reason
        for _ in range(3):
            streamer.run_pass(None, witness)
        witness.check()
    (warning,) = warnings_of(caplog)
    assert "refused" in warning


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_a_kernel_that_cannot_populate_leaves_that_to_the_page_locking_of_a_device(
    tmp_path: Path, monkeypatch: Any, number: int
) -> None:
    def refuse(address: int, nbytes: int, *, write: bool) -> None:
        raise OSError(number, os.strerror(number))

    tensors = tiny_checkpoint(tmp_path, 3, hidden=40)
    monkeypatch.setattr(mapped, "populate", refuse)
    device = make_device("fake")
    witness = Witness(device, tensors)
    with open_checkpoint(device, tmp_path, read_mode="mapped") as streamer:
        assert streamer.plan.read_mode == "mapped"
        for _ in range(3):
            streamer.run_pass(None, witness)
        witness.check()


def test_a_file_system_that_cannot_map_has_the_cpu_read_buffered(
    tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    class Unmapped:
        MAP_SHARED = MAP_PRIVATE = MAP_NORESERVE = PROT_READ = PROT_WRITE = 1

        @staticmethod
        def mmap(*arguments: Any, **options: Any) -> None:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    tensors = tiny_checkpoint(tmp_path, 3, hidden=40)
    monkeypatch.setattr(mapped, "mmap", Unmapped)
    for kind in ("cpu", "fake"):
        device = make_device(kind)
        witness = Witness(device, tensors)
        with open_checkpoint(device, tmp_path, read_mode="mapped") as streamer:
            assert streamer.plan.read_mode == "buffered"
            streamer.run_pass(None, witness)
            witness.check()
    assert all("No such device" in warning for warning in warnings_of(caplog))
