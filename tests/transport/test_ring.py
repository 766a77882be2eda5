"""Steps cut into parts for a ring: what each part reads and copies, and what its copies take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_checkpoint
from fake_device import FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Witness, open_checkpoint
from test_pieces import file_byte, layouts

from layer_streamer.devices.device import CpuDevice
from layer_streamer.planning.layout import PAGE, Layout, align_up
from layer_streamer.transport.memory import HostArena
from layer_streamer.transport.parts import Cutter, Part, Parts
from layer_streamer.transport.pool import HostPool
from layer_streamer.transport.schedule import Orders, SlotUse
from layer_streamer.transport.stage import AHEAD
from layer_streamer.transport.stats import Span

SLOTS = [PAGE, 2 * PAGE, 5 * PAGE, 1 << 20]


def fill(part: Part, slot: bytearray) -> None:
    """Do a part's reads; a direct read brings what lies beyond the payload, too."""
    for j in range(part.num_jobs):
        for path, offset, start, length, _ in part.job(j):
            for i in range(length):
                slot[start + i] = file_byte(path, offset + i)


def copied(copies: Any, source: bytearray, target: bytearray) -> None:
    for copy in copies:
        target[copy.dst : copy.dst + copy.nbytes] = source[copy.src : copy.src + copy.nbytes]


@settings(deadline=None)
@given(layout=layouts(), nbytes=st.sampled_from(SLOTS), aligned=st.booleans())
def test_parts_bring_what_one_slot_for_all_of_it_would_have_brought(
    layout: Layout, nbytes: int, aligned: bool
) -> None:
    whole = bytearray(layout.host_nbytes)
    for read in layout.reads:
        for i in range(read.nbytes):
            whole[read.slot_offset + i] = file_byte(read.path, read.offset + i)
    expected = bytearray(max(layout.device_nbytes, layout.host_nbytes) + PAGE)
    copied(layout.copies, whole, expected)
    found, slot = bytearray(len(expected)), bytearray(nbytes)
    for part in Cutter(nbytes, nbytes, aligned=aligned).cut(layout):
        slot[:] = b"\xdb" * nbytes  # nothing that an earlier part left is of any use
        fill(part, slot)
        copied(part.copies, slot, found)
    assert found == expected


@settings(deadline=None)
@given(layout=layouts(), nbytes=st.sampled_from(SLOTS), aligned=st.booleans())
def test_what_a_part_reads_lies_in_its_slot_at_the_files_phase_and_nothing_overlaps(
    layout: Layout, nbytes: int, aligned: bool
) -> None:
    for part in Cutter(nbytes, nbytes, aligned=aligned).cut(layout):
        assert part.extents
        assert part.copy_nbytes == sum(copy.nbytes for copy in part.copies)
        end = 0
        for extent in part.extents:
            assert end <= extent.start and extent.start % PAGE == extent.offset % PAGE
            end = extent.start + extent.length
            assert 0 < extent.wanted <= extent.length and end <= nbytes
            if aligned:
                assert extent.offset % PAGE == 0 and extent.length == align_up(extent.wanted, PAGE)


@settings(deadline=None)
@given(layout=layouts(), aligned=st.booleans())
def test_a_part_is_as_full_as_its_slot_allows(layout: Layout, aligned: bool) -> None:
    parts = Cutter(2 * PAGE, 2 * PAGE, aligned=aligned).cut(layout)
    for part in parts[:-1]:
        last = part.extents[-1]
        left = 2 * PAGE - align_up(last.start + last.length, PAGE)
        assert left < PAGE


@given(
    steps=st.lists(layouts(), min_size=1, max_size=4),
    wanted=st.sets(st.integers(0, 3)),
    passes=st.integers(1, 3),
)
@settings(deadline=None)
def test_parts_are_numbered_in_the_order_of_the_pass_and_found_by_their_number(
    steps: list[Layout], wanted: set[int], passes: int
) -> None:
    indices = sorted(index for index in wanted if index < len(steps))
    cutter = Cutter(PAGE, PAGE, aligned=True)
    parts = Parts(steps, indices, cutter)
    expected = [part for index in indices for part in cutter.cut(steps[index])] * passes
    orders = Orders(steps, AHEAD, SlotUse(indices, 1, in_place=False), parts.counts)
    assert orders.read.count * passes == len(expected)
    found = [parts.find(orders, k, orders.read.number(k))[1] for k in range(len(expected))]
    assert found == expected


class Clock:
    """Remembers what it is told of copies."""

    def __init__(self) -> None:
        self.added: list[tuple[int, int]] = []

    def add_copy(self, index: int, nbytes: int, seconds: float) -> None:
        assert seconds >= 0
        self.added.append((index, nbytes))


def test_a_ring_tells_each_copy_to_the_clock_of_its_pass_once() -> None:
    device, clock = FakeDevice(0), Clock()
    ring = HostPool("ring", HostArena([PAGE, PAGE], CpuDevice(), pinned=False, threads=1), device)
    stream = device.new_stream()
    for slot, nbytes in ((0, 100), (1, 200), (0, 300)):
        ring.wait_reusable(slot)
        ring.copy_begins(slot, nbytes, 7, clock, stream)  # type: ignore[arg-type]
        ring.copy_enqueued(slot, stream)
    assert clock.added == [(7, 100)]
    for slot in (0, 1, 0, 1):
        ring.wait_reusable(slot)
    assert clock.added == [(7, 100), (7, 300), (7, 200)]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Any:
    return tmp_path, tiny_checkpoint(tmp_path, 5, hidden=48)


@pytest.mark.parametrize("read_mode", ["direct", "buffered"])
@pytest.mark.parametrize("read_threads", [1, 2, 9])
def test_layers_that_pass_through_a_ring_are_exact_over_several_passes(
    checkpoint: Any, read_mode: str, read_threads: int
) -> None:
    path, tensors = checkpoint
    device = FakeDevice(3)
    options = {"read_mode": read_mode, "read_threads": read_threads, "read_chunk": PAGE}
    with open_checkpoint(device, path, n_gpu=1, n_cpu_pinned=0, n_cpu=0, **options) as streamer:
        (lane,) = streamer._parts.pipeline.lanes
        assert [pool.name for pool in lane.memory.host_pools] == ["ring"]
        assert sum(lane.memory.parts.counts.values()) > 5 * 2
        for _ in range(3):
            witness = Witness(device, tensors)
            streamer.run_pass(None, witness)
            device.drain()
            witness.check()
        assert streamer.memory.host_bytes == 2 * read_threads * PAGE
        assert streamer.plan.placement.host_bytes == streamer.memory.host_bytes


def test_a_report_of_layers_in_parts_has_all_their_bytes_and_no_copy_longer_than_its_span(
    checkpoint: Any,
) -> None:
    path, _ = checkpoint
    options = {"n_cpu_pinned": 0, "read_threads": 1, "read_chunk": PAGE}
    with open_checkpoint(FakeDevice(1), path, **options) as streamer:
        for _ in range(2):
            streamer.run_pass(None, lambda x, w, i: x)
        report = streamer.last_pass
        clock = streamer._parts.pipeline.schedule._clocks[1]
    layers = sum(layer.nbytes for layer in streamer.manifest.layers)
    assert report is not None and report.steps["copy"].bytes == layers
    assert any(clock._part_nbytes)
    assert "ring" in report.peak_slots


def test_parts_whose_copies_are_not_timed_yet_are_taken_to_be_as_fast_as_the_others(
    checkpoint: Any,
) -> None:
    with open_checkpoint(FakeDevice(1), checkpoint[0], n_cpu_pinned=0) as streamer:
        streamer.run_pass(None, lambda x, w, i: x)
        clock = streamer._parts.pipeline.schedule._clocks[0]
        clock._part_seconds[2], clock._part_nbytes[2] = 1.0, 250
        span = Span(2, begin=5.0, end=25.0)
        assert clock._condense(2, span, 1000).begin == 21.0
        assert clock._condense(2, replace(span, begin=24.0), 1000).begin == 24.0
        clock._part_nbytes[2] = 0
        assert clock._condense(2, span, 1000) == span


def test_where_a_ring_cannot_be_page_locked_layers_are_exact_all_the_same(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tensors = checkpoint
    device = FakeDevice(5)
    monkeypatch.setattr(device, "pin", lambda memory, read_only=False: False)
    with open_checkpoint(device, path, n_cpu_pinned=0, read_chunk=PAGE) as streamer:
        witness = Witness(device, tensors)
        streamer.run_pass(None, witness)
        device.drain()
        witness.check()
        assert streamer.memory.pinned_bytes == 0
        assert streamer._parts.pipeline.lanes[0].memory.host_pools[0].name == "ring"


def test_an_error_in_one_part_is_its_layers_and_the_next_pass_is_exact(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tensors = checkpoint
    device = FakeDevice(5)
    with open_checkpoint(device, path, n_cpu_pinned=0, read_chunk=PAGE) as streamer:
        streamer.run_pass(None, lambda x, w, i: x)
        copier = streamer._parts.pipeline.lanes[0].copier
        copy_part, seen = copier._copy_part, []

        def refuse(run: Any, n: int, number: int, k: int) -> None:
            if number % streamer.num_steps == 2 and not seen:
                seen.append(k)
                raise RuntimeError("the device refuses a copy")
            copy_part(run, n, number, k)

        monkeypatch.setattr(copier, "_copy_part", refuse)
        with pytest.raises(RuntimeError, match="refuses a copy"):
            for _ in range(3):
                streamer.run_pass(None, lambda x, w, i: x)
        witness = Witness(device, tensors)
        streamer.run_pass(None, witness)
        device.drain()
        witness.check()
