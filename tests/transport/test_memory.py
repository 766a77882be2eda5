"""Host arenas: exact sizes, advice that is refused, page locks that are given back once."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import warnings_of
from hypothesis import given
from hypothesis import strategies as st
from support import make_device

from layer_streamer.devices.device import CpuDevice
from layer_streamer.planning.layout import PAGE, align_up
from layer_streamer.transport import memory
from layer_streamer.transport.memory import HUGE_PAGE, POPULATE_CHUNK, HostArena, populate_memory


class Locks(CpuDevice):
    """The CPU, which says that it page-locks, and remembers what."""

    def __init__(self, *, allowed: bool = True) -> None:
        super().__init__()
        self.allowed = allowed
        self.locked: list[tuple[int, int]] = []

    def pin(self, memory: torch.Tensor, *, read_only: bool = False) -> bool:
        assert not read_only
        if self.allowed:
            self.locked.append((memory.data_ptr(), memory.nbytes))
        return self.allowed

    def unpin(self, memory: torch.Tensor) -> None:
        self.locked.remove((memory.data_ptr(), memory.nbytes))


@given(sizes=st.lists(st.integers(0, 5 * PAGE), min_size=1, max_size=9))
def test_slots_are_whole_pages_one_after_the_other_and_nothing_more(sizes: list[int]) -> None:
    arena = HostArena(sizes, CpuDevice(), pinned=False, threads=1)
    rounded = [align_up(max(size, 1), PAGE) for size in sizes]
    assert [slot.nbytes for slot in arena.slots] == [len(view) for view in arena.bytes] == rounded
    assert arena.nbytes == sum(rounded) == arena.memory.nbytes
    assert arena.offsets == [sum(rounded[:i]) for i in range(len(sizes))]
    base = arena.memory.data_ptr()
    assert [slot.data_ptr() - base for slot in arena.slots] == arena.offsets
    assert base % PAGE == 0


def test_a_slot_and_its_bytes_are_the_same_memory_and_no_other_slots() -> None:
    arena = HostArena([PAGE, 3, PAGE + 1], CpuDevice(), pinned=False, threads=1)
    for i, view in enumerate(arena.bytes):
        view[:] = bytes([i + 1]) * len(view)
    for i, slot in enumerate(arena.slots):
        assert (slot == i + 1).all()


@pytest.mark.parametrize("nbytes", [HUGE_PAGE - PAGE, HUGE_PAGE, HUGE_PAGE + 3 * PAGE])
def test_memory_is_not_rounded_up_to_a_power_of_two_nor_to_huge_pages(nbytes: int) -> None:
    arena = HostArena([nbytes], CpuDevice(), pinned=False, threads=1)
    if Path("/proc/self/maps").exists():
        address = arena.memory.data_ptr()
        lines = Path("/proc/self/maps").read_text().splitlines()
        spans = [tuple(int(n, 16) for n in line.split()[0].split("-")) for line in lines]
        (span,) = [(start, end) for start, end in spans if start <= address < end]
        # Told apart from its neighbours by its advice, not to be inherited by a fork.
        assert span == (address, address + nbytes)
    assert arena.nbytes == nbytes


class Unadvised(mmap.mmap):
    """A mapping that takes no advice."""

    def madvise(self, *arguments: Any) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def test_advice_that_is_refused_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory.mmap, "mmap", Unadvised)
    with caplog.at_level(logging.DEBUG, "layer_streamer.transport.memory"):
        arena = HostArena([3 * HUGE_PAGE], Locks(), pinned=True, threads=2)
    assert arena.pinned
    assert (arena.memory == 0).all()
    assert "was refused" in caplog.text
    assert not warnings_of(caplog)
    arena.close()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOMEM, errno.ENOSYS])
def test_memory_that_cannot_be_populated_is_locked_all_the_same(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(address: int, nbytes: int, *, write: bool) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(memory, "populate", refuse)
    device = Locks()
    arena = HostArena([PAGE, PAGE], device, pinned=True, threads=2)
    assert arena.pinned
    assert device.locked == [(arena.memory.data_ptr(), 2 * PAGE)]
    arena.close()


def test_every_byte_is_populated_once_in_chunks_that_begin_at_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(memory, "populate", lambda a, n, *, write: calls.append((a, n)))
    nbytes = 2 * POPULATE_CHUNK + 5 * PAGE
    untouched = torch.empty(nbytes, dtype=torch.uint8)
    populate_memory(untouched, 3)
    first = untouched.data_ptr()
    chunks = [(first + i * POPULATE_CHUNK, POPULATE_CHUNK) for i in range(2)]
    assert sorted(calls) == [*chunks, (first + 2 * POPULATE_CHUNK, 5 * PAGE)]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_memory_to_be_locked_is_there_before_it_is_locked() -> None:
    resident: list[int] = []

    class Looks(Locks):
        def pin(self, memory: torch.Tensor, *, read_only: bool = False) -> bool:
            text = Path("/proc/self/smaps").read_text()
            entry = text[text.index(f"{memory.data_ptr():x}-") :].splitlines()
            line = next(line for line in entry if line.startswith("Rss:"))
            resident.append(int(line.split()[1]) << 10)
            return super().pin(memory, read_only=read_only)

    arena = HostArena([HUGE_PAGE, 7 * PAGE], Looks(), pinned=True, threads=2)
    assert resident == [arena.nbytes]
    arena.close()


def test_a_page_lock_is_given_back_once_and_the_memory_outlives_it() -> None:
    device = Locks()
    arena = HostArena([PAGE], device, pinned=True, threads=1)
    slot = arena.slots[0]
    slot.fill_(7)
    assert arena.pinned
    for _ in range(3):
        arena.close()
        assert not arena.pinned
    assert device.locked == []
    del arena
    assert (slot == 7).all()


@pytest.mark.parametrize(("pinned", "allowed"), [(False, True), (True, False)])
def test_what_was_not_locked_is_not_unlocked(pinned: bool, allowed: bool) -> None:
    device = Locks(allowed=allowed)
    arena = HostArena([PAGE], device, pinned=pinned, threads=1)
    assert not arena.pinned
    arena.close()


def test_slots_made_in_inference_mode_can_be_written_outside_of_it() -> None:
    with torch.inference_mode():
        arena = HostArena([PAGE], make_device("fake"), pinned=False, threads=1)
    arena.slots[0].fill_(3)
    assert not arena.slots[0].is_inference()


@pytest.mark.skipif(sys.platform != "linux", reason="the advice is Linux's")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_sees_zeros_and_the_parents_bytes_stay() -> None:
    arena = HostArena([PAGE], CpuDevice(), pinned=False, threads=1)
    view = arena.bytes[0]
    view[:] = bytes([9]) * PAGE
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write_end, view[:8])
        os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        seen = pipe.read()
    os.waitpid(child, 0)
    assert seen == bytes(8)
    assert bytes(view[:8]) == bytes([9]) * 8
