"""What a probe copies, over the late fake device: all sizes, errors, nothing left pinned."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from probing import KIB, TINY

from layer_streamer import StreamerError
from layer_streamer.measuring import probe_copy
from layer_streamer.measuring.probe_config import Journal, ProbeConfig
from layer_streamer.measuring.probe_copy import measure_device, measure_memcpy, measure_together


@pytest.mark.parametrize("seed", range(4))
def test_copies_of_every_size_are_measured_and_nothing_stays_pinned(seed: int) -> None:
    device, journal = FakeDevice(seed), Journal()
    limits = measure_device(device, TINY, 256 * KIB, journal)
    assert [rate.nbytes for rate in limits.copies] == [4 * KIB, 64 * KIB]
    assert min(limits.pageable, limits.back, *(rate.bytes_per_s for rate in limits.copies)) > 0
    assert limits.pinned
    assert not journal.notes
    device.drain()
    assert not device.errors
    assert not device._pinned


def test_refused_page_locking_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    device, journal = FakeDevice(1), Journal()
    monkeypatch.setattr(device, "pin", lambda memory, **options: False)
    assert not measure_device(device, TINY, 256 * KIB, journal).pinned
    assert "page-locking was refused" in journal.notes[0]


def test_a_full_device_is_measured_with_what_is_free_there(monkeypatch: Any) -> None:
    device, asked = FakeDevice(1), []
    allocate = device.allocate

    def bounded(nbytes: int) -> torch.Tensor:
        asked.append(nbytes)
        if nbytes > limit:
            raise torch.OutOfMemoryError
        return allocate(nbytes)

    monkeypatch.setattr(device, "allocate", bounded)
    monkeypatch.setattr("layer_streamer.measuring.probe_copy.MIB", 4 * KIB)
    limit = 40 * KIB
    limits = measure_device(device, TINY, 256 * KIB, Journal())
    assert asked == [64 * KIB, 32 * KIB]
    assert [rate.nbytes for rate in limits.copies] == [4 * KIB]
    limit = 0
    with pytest.raises(StreamerError, match="cpu: no memory is free there"):
        measure_device(device, TINY, 256 * KIB, Journal())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_copying_ends_with_nothing_pinned(error: Any, monkeypatch: Any) -> None:
    for number in range(1, 25, 4):
        device = FakeDevice(number)
        copy, copies = device.copy, []

        def failing(dst: torch.Tensor, src: torch.Tensor) -> None:
            copies.append(None)  # noqa: B023
            if len(copies) == number:  # noqa: B023
                raise error
            copy(dst, src)  # noqa: B023

        monkeypatch.setattr(device, "copy", failing)
        with pytest.raises(error):
            measure_device(device, TINY, 256 * KIB, Journal())
        device.drain()
        assert not device.errors
        assert not device._pinned


def test_devices_are_copied_to_at_once_each_by_its_rate() -> None:
    devices = [FakeDevice(seed) for seed in range(3)]
    copied: list[Counter[str]] = [Counter() for _ in devices]
    for device, counter in zip(devices, copied, strict=True):
        copy = device.copy

        def counting(dst: Any, src: Any, copy: Any = copy, counter: Any = counter) -> None:
            counter["bytes"] += src.nbytes
            copy(dst, src)

        device.copy = counting  # type: ignore[method-assign]
    config = ProbeConfig(copy_seconds=1.0, samples=3)
    rates = [16.0 * KIB, 32.0 * KIB, 8.0 * KIB]
    assert measure_together(devices, rates, config, 3 * 8 * KIB) > 0
    # A warm-up and three samples, in copies of a third of the memory.
    assert [counter["bytes"] for counter in copied] == [4 * int(rate) for rate in rates]
    for device in devices:
        assert not device.errors
        assert not device._pinned


def test_a_memcpy_moves_all_of_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    arenas: list[Any] = []

    class Kept(probe_copy.HostArena):
        def close(self) -> None:
            arenas.append([slot.clone() for slot in self.slots])
            super().close()

    monkeypatch.setattr(probe_copy, "HostArena", Kept)
    measure_memcpy(TINY, 64 * KIB, Journal())
    ((source, target),) = arenas
    assert torch.equal(source, target)
    assert source.nbytes == 32 * KIB
