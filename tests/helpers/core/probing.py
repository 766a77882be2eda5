"""A probe's smallest settings, for the tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from layer_streamer.machine.identity import this_machine
from layer_streamer.machine.limits import (
    DeviceLimits,
    MachineLimits,
    MachinePart,
    ProductRate,
    SizeRate,
)
from layer_streamer.measuring import probe_disk, probe_files
from layer_streamer.measuring.probe_config import ProbeConfig
from layer_streamer.transport.files import open_direct

KIB = 1 << 10
TINY = ProbeConfig(
    quick=True,
    seconds=1e-9,
    copy_seconds=1e-9,
    samples=3,
    most_seconds=60,
    read_threads=(1, 3),
    read_chunks=(8 * KIB, 16 * KIB),
    cold_threads=(2,),
    cached_threads=(1, 2),
    buffered_chunk=8 * KIB,
    cached_chunk=8 * KIB,
    memcpy_threads=(1, 2),
    copy_sizes=(4 * KIB, 64 * KIB),
    buffer_nbytes=1024 * KIB,
    cached_nbytes=64 * KIB,
    file_nbytes=1536 * KIB,
)
"""Every measurement at its shortest."""


def settle_on_a_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``folder`` a disk's that lets go of its cache, wherever the tests run."""
    (folder / "mountinfo").write_text("1 0 8:1 / / rw - ext4 /dev/sda1 rw\n")
    monkeypatch.setattr("layer_streamer.machine.identity.MOUNTS", folder / "mountinfo")
    monkeypatch.setattr(probe_disk, "is_cached", lambda chunk: False)
    try:
        os.close(open_direct(folder / "mountinfo"))
    except OSError:
        monkeypatch.setattr(probe_files, "open_direct", lambda path: os.open(path, os.O_RDONLY))


def write_model(folder: Path) -> Path:
    """Two large files of odd sizes, a small one, and a directory."""
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(os.urandom(700 * KIB + 5))
    (folder / "b.safetensors").write_bytes(os.urandom(900 * KIB + 4097))
    (folder / "config.json").write_text("{}")
    (folder / "more").mkdir()
    return folder


def refuse(number: int) -> Any:
    """A system call that fails with ``number``, of errno."""

    def refused(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return refused


def limits_with(products: tuple[ProductRate, ...], copy: float = 50e9) -> MachineLimits:
    """A record of one device, which calls itself a CPU."""
    copies = (SizeRate(1 << 20, copy),)
    device = DeviceLimits("cpu", True, copies, 8e9, 50e9, products)
    return MachineLimits(MachinePart(this_machine(), "", False, (), (device,), None), None)
