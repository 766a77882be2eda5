"""How tensors lie in slots: arithmetic, against what alignment and merging promise."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer.checkpoint.manifest import TensorSpec
from layer_streamer.planning.layout import (
    COPY_ALIGNMENT,
    MAX_TAIL_STEPS,
    PAGE,
    TENSOR_ALIGNMENT,
    Layout,
    Step,
    lay_out,
    split_rows,
)
from layer_streamer.transport.parts import Cutter

DTYPES = [torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
FILES = [Path("a"), Path("b")]


def spec(name: str, path: Path, offset: int, dtype: torch.dtype, count: int) -> TensorSpec:
    return TensorSpec(name, dtype, (count,), path, offset, count * dtype.itemsize)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Tensors that do not overlap, at any offsets of two files, adjacent or apart."""
    ends = {path: draw(st.integers(0, 5000)) for path in FILES}
    tensors = {}
    for i in range(draw(st.integers(1, 8))):
        path, dtype = draw(st.sampled_from(FILES)), draw(st.sampled_from(DTYPES))
        gap = draw(st.sampled_from([0, 0, 0, 1, 7, 32, 4096, 4097, 100_000]))
        count = draw(st.sampled_from([0, 1, 3, 16, 1000, 5000]))
        tensors[f"t{i}"] = spec(f"t{i}", path, ends[path] + gap, dtype, count)
        ends[path] += gap + tensors[f"t{i}"].nbytes
    return Step(0, tensors)


def file_byte(step: Step, layout: Layout, unified: bool, view: Any, index: int) -> tuple[Path, int]:
    """Which byte of which file ends up at byte ``index`` of a view, followed through the moves."""
    at = view.offset + index
    for copy in layout.copies:
        if copy.dst <= at < copy.dst + copy.nbytes:
            at = copy.src + at - copy.dst
            break
    else:
        assert unified, "a byte of a device slot that no copy writes"
    hits = [r for r in layout.reads if r.slot_offset <= at < r.slot_offset + r.nbytes]
    assert len(hits) == 1
    return hits[0].path, hits[0].offset + at - hits[0].slot_offset


@given(step=steps(), unified=st.booleans())
def test_every_tensors_bytes_come_from_its_place_in_the_file(step: Step, unified: bool) -> None:
    layout = lay_out(step, unified=unified)
    assert [view.key for view in layout.views] == list(step.tensors)
    for view in layout.views:
        source = step.tensors[view.key]
        for index in {0, view.nbytes // 2, view.nbytes - 1} if view.nbytes else set():
            found = file_byte(step, layout, unified, view, index)
            assert found == (source.path, source.offset + index)


@given(step=steps(), unified=st.booleans())
def test_tensors_are_aligned_and_inside_the_slot(step: Step, unified: bool) -> None:
    layout = lay_out(step, unified=unified)
    for view in layout.views:
        alignment = view.dtype.itemsize if unified else TENSOR_ALIGNMENT
        assert view.offset % alignment == 0
        assert view.offset + view.nbytes <= layout.device_nbytes or unified
    for copy in layout.copies:
        assert copy.src + copy.nbytes <= layout.host_nbytes
        assert unified or copy.dst % COPY_ALIGNMENT == 0


@given(step=steps())
def test_reads_keep_the_files_phase_and_whole_pages_of_a_slot_never_meet(step: Step) -> None:
    layout = lay_out(step, unified=False)
    end = 0
    for read in layout.reads:
        assert (read.slot_offset - read.offset) % PAGE == 0
        assert read.slot_offset // PAGE * PAGE >= end
        end = -(-(read.slot_offset + read.nbytes) // PAGE) * PAGE
    assert layout.host_nbytes == end


@given(step=steps())
def test_copies_to_the_device_never_overlap(step: Step) -> None:
    copies = sorted(lay_out(step, unified=False).copies, key=lambda copy: copy.dst)
    for left, right in pairwise(copies):
        assert left.dst + left.nbytes <= right.dst


def test_adjacent_tensors_are_one_read_and_one_copy() -> None:
    tensors = {str(i): spec(str(i), FILES[0], 64 * i, torch.float32, 16) for i in range(9)}
    layout = lay_out(Step(0, tensors), unified=False)
    assert (len(layout.reads), len(layout.copies)) == (1, 1)


def test_the_padding_between_gguf_tensors_is_read_along() -> None:
    tensors = {str(i): spec(str(i), FILES[0], 96 * i, torch.uint8, 68) for i in range(9)}
    layout = lay_out(Step(0, tensors), unified=False)
    assert (len(layout.reads), len(layout.copies)) == (1, 1)


def test_a_tensor_off_the_alignment_starts_a_copy_that_its_congruent_followers_join() -> None:
    first = spec("a", FILES[0], 0, torch.uint8, 17)
    later = [spec(str(i), FILES[0], 17 + 16 * i, torch.uint8, 16) for i in range(3)]
    step = Step(0, {s.name: s for s in [first, *later]})
    layout = lay_out(step, unified=False)
    assert (len(layout.reads), len(layout.copies)) == (1, 2)


def test_on_the_cpu_an_aligned_layer_is_used_where_it_was_read() -> None:
    tensors = {str(i): spec(str(i), FILES[0], 64 * i, torch.float32, 16) for i in range(9)}
    layout = lay_out(Step(0, tensors), unified=True)
    assert layout.copies == ()
    assert layout.host_nbytes == PAGE


@given(rows=st.integers(1, 40), row=st.integers(1, 9), limit=st.integers(1, 500))
def test_rows_are_split_whole_in_order_and_within_the_limit(
    rows: int, row: int, limit: int
) -> None:
    whole = TensorSpec("t", torch.uint8, (rows, row), FILES[0], 100, rows * row)
    parts = list(split_rows(whole, limit))
    assert sum(part.shape[0] for part in parts) == rows
    end = whole.offset
    for part in parts:
        assert part.offset == end
        assert part.nbytes == part.shape[0] * row
        assert part.nbytes <= limit or part.shape[0] == 1
        end += part.nbytes


@given(step=steps(), chunk=st.sampled_from([4096, 5000, 1 << 20]))
def test_jobs_cover_every_read_once_in_pieces_of_at_most_a_chunk(step: Step, chunk: int) -> None:
    layout = lay_out(step, unified=False)
    slot = memoryview(bytearray(layout.host_nbytes))
    (part,) = Cutter(None, chunk, aligned=False).cut(layout)
    for j in range(part.num_jobs):
        assert 0 < sum(extent.length for extent in part.job(j)) <= chunk
        for extent in part.job(j):
            for i in range(extent.start, extent.start + extent.length):
                slot[i] += 1
    assert max(slot, default=0) <= 1
    assert sum(slot) == sum(read.nbytes for read in layout.reads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cast_tensors_take_scratch_and_others_none(dtype: torch.dtype) -> None:
    tensors = {
        "f": spec("f", FILES[0], 0, torch.bfloat16, 10),
        "same": spec("same", FILES[0], 20, dtype, 10),
        "i": spec("i", FILES[0], 100, torch.uint8, 10),
    }
    layout = lay_out(Step(0, tensors), unified=False, dtype=dtype)
    assert [(cast.key, cast.dtype) for cast in layout.casts] == [("f", dtype)]
    assert layout.scratch_nbytes == COPY_ALIGNMENT
    assert lay_out(Step(0, tensors), unified=False).scratch_nbytes == 0


@given(num_rows=st.integers(1, 1 << 40), row=st.integers(1, 1 << 12), limit=st.integers(0, 1 << 14))
@settings(max_examples=30, deadline=None)
def test_a_table_beside_tiny_layers_is_split_into_a_bounded_number_of_steps(
    num_rows: int, row: int, limit: int
) -> None:
    whole = TensorSpec("t", torch.uint8, (num_rows, row), FILES[0], 7, num_rows * row)
    parts = list(split_rows(whole, limit))
    assert len(parts) <= MAX_TAIL_STEPS
    assert sum(part.shape[0] for part in parts) == num_rows
    most = max(limit, row, -(-num_rows // MAX_TAIL_STEPS) * row)
    assert all(part.nbytes <= most for part in parts)
