"""How reads are cut: page-aligned pieces for direct reads; and such layers, streamed."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from checkpoints import random_tensor, write_safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Witness, make_device, open_checkpoint

from layer_streamer.checkpoint.manifest import TensorSpec
from layer_streamer.planning.layout import PAGE, Layout, Read, Step, align_up, lay_out
from layer_streamer.transport.parts import Cutter, Extent

FILES = [Path("a"), Path("b")]
CHUNKS = [4096, 5000, 8191, 8192, 3 * PAGE, 1 << 20]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Of a step whose tensors lie at any offsets of two files, adjacent or apart."""
    ends = {path: draw(st.integers(0, 9000)) for path in FILES}
    tensors = {}
    for i in range(draw(st.integers(1, 6))):
        path = draw(st.sampled_from(FILES))
        offset = ends[path] + draw(st.sampled_from([0, 0, 1, 4095, 4096, 4097, 50_000]))
        nbytes = draw(st.sampled_from([0, 1, 100, 4095, 4096, 4097, 30_000]))
        tensors[f"t{i}"] = TensorSpec(f"t{i}", torch.uint8, (nbytes,), path, offset, nbytes)
        ends[path] = offset + nbytes
    return lay_out(Step(0, tensors), unified=draw(st.booleans()))


def file_byte(path: Path, offset: int) -> int:
    """A byte that tells its place, to within a few pages."""
    return (offset * 31 + offset // PAGE * 7 + (path == FILES[1])) % 256


def jobs_of(layout: Layout, chunk: int, *, aligned: bool) -> list[list[Extent]]:
    """What threads read of a step that one slot holds."""
    (part,) = Cutter(None, chunk, aligned=aligned).cut(layout)
    assert part.copies is layout.copies
    return [list(part.job(j)) for j in range(part.num_jobs)]


@given(layout=layouts(), chunk=st.sampled_from(CHUNKS))
def test_aligned_pieces_are_whole_pages_of_the_file_and_of_the_slot(
    layout: Layout, chunk: int
) -> None:
    for job in jobs_of(layout, chunk, aligned=True):
        assert job
        assert sum(extent.length for extent in job) <= chunk // PAGE * PAGE
        for extent in job:
            assert (extent.offset | extent.length | extent.start) % PAGE == 0
            assert extent.length == align_up(extent.wanted, PAGE) > 0
            assert extent.start + extent.length <= layout.host_nbytes


@given(layout=layouts(), chunk=st.sampled_from(CHUNKS), aligned=st.booleans())
def test_what_pieces_want_covers_every_read_and_not_a_byte_behind_it(
    layout: Layout, chunk: int, aligned: bool
) -> None:
    slot = memoryview(bytearray(layout.host_nbytes))
    ends = {(read.path, read.offset + read.nbytes) for read in layout.reads}
    for path, offset, start, length, wanted in chain(*jobs_of(layout, chunk, aligned=aligned)):
        # What is wanted is in the file: it ends within a read, or where one does.
        end = offset + wanted
        assert (path, end) in ends or any(
            read.path == path and read.offset < end < read.offset + read.nbytes
            for read in layout.reads
        )
        assert wanted <= length
        slot[start : start + wanted] = bytes(file_byte(path, offset + i) for i in range(wanted))
    for read in layout.reads:
        found = slot[read.slot_offset : read.slot_offset + read.nbytes]
        assert found == bytes(file_byte(read.path, read.offset + i) for i in range(read.nbytes))


@given(layout=layouts(), chunk=st.sampled_from(CHUNKS))
def test_aligned_pieces_never_bring_a_page_of_the_slot_twice(layout: Layout, chunk: int) -> None:
    brought: set[int] = set()
    for extent in chain(*jobs_of(layout, chunk, aligned=True)):
        now = set(range(extent.start, extent.start + extent.length, PAGE))
        assert not now & brought
        brought |= now
    assert brought == {page for read in layout.reads for page in pages_of(read)}


def pages_of(read: Read) -> range:
    return range(read.slot_offset // PAGE * PAGE, read.slot_offset + read.nbytes, PAGE)


@pytest.mark.parametrize("kind", ["cpu", "fake"])
@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(
        st.sampled_from([1, 17, 4095, 4096, 4097, 20_000, 70_001]), min_size=1, max_size=5
    ),
    chunk=st.sampled_from([4096, 5000, 12_288, 1 << 20]),
    padding=st.integers(0, 33),
    gap=st.sampled_from([0, 3, 4095, 5000]),
    pools=st.sampled_from([(4, None), (1, 1), (None, None)]),
    data=st.data(),
)
def test_layers_of_any_size_are_exact_in_direct_reads_of_any_chunk(  # noqa: PLR0917
    tmp_path_factory: pytest.TempPathFactory, kind: str, sizes: list[int], chunk: int,
    padding: int, gap: int, pools: tuple[int | None, int | None], data: st.DataObject,
) -> None:  # fmt: skip
    tensors = {}
    for i, size in enumerate(sizes):
        for j in range(data.draw(st.integers(1, 3))):
            tensors[f"model.layers.{i}.w{j}"] = random_tensor((size,), torch.uint8, seed=9 * i + j)
    path = tmp_path_factory.mktemp("any") / "model.safetensors"
    write_safetensors(path, tensors, padding=padding, gap=gap)
    device = make_device(kind)
    witness = Witness(device, tensors)
    options = {"n_cpu_pinned": pools[0], "n_cpu": pools[1], "read_threads": 3}
    with open_checkpoint(
        device, path, read_mode="direct", read_chunk=chunk, n_gpu=1, **options
    ) as streamer:
        assert streamer.plan.read_mode == "direct"
        for _ in range(2):
            streamer.run_pass(None, witness)
        witness.check()
