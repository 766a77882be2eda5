"""Layers that stay on the CPU are used where they lie: in the pages of their file."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_tensor, write_safetensors
from support import Witness, open_checkpoint

from layer_streamer import LayerStreamer, ReadError
from layer_streamer.machine import libc
from layer_streamer.machine.libc import in_memory
from layer_streamer.transport import mapped


def checkpoint(path: Path, rows: int = 64) -> dict[str, torch.Tensor]:
    """Layers of tensors that lie aligned for their dtype."""
    tensors = {
        f"model.layers.{i}.{name}.weight": random_tensor((rows, 64), torch.float32, 2 * i + k)
        for i in range(3)
        for k, name in enumerate("ab")
    }
    write_safetensors(path / "model.safetensors", tensors)
    return tensors


CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs mincore, and /proc")


def files_of(tensor: torch.Tensor) -> str:
    """The file in whose pages a tensor lies; "" for other memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        places, *_, name = line.split(maxsplit=5)
        first, end = (int(place, 16) for place in places.split("-"))
        if first <= tensor.data_ptr() < end:
            return name if name.startswith("/") else ""
    return ""


def where(streamer: LayerStreamer) -> set[bool]:
    """Whether tensors lie in the checkpoint's pages."""
    own = {str(path) for path in streamer.manifest.files}
    return {files_of(t) in own for _, weights in streamer.sweep() for t in weights.values()}


@pytest.mark.parametrize(
    ("options", "in_pages"),
    [
        ({"device_budget": "1GiB"}, True),
        ({"device_budget": "1GiB", "read_mode": "buffered"}, False),
        ({"device_budget": "1GiB", "read_mode": "direct"}, False),
        ({"device_budget": "1GiB", "dtype": torch.bfloat16}, False),
        ({}, False),
    ],
)
def test_what_stays_is_in_the_files_pages_where_it_is_used_as_it_is_stored(
    tmp_path: Path, options: dict[str, Any], in_pages: bool
) -> None:
    tensors = checkpoint(tmp_path)
    witness = Witness(CPU, tensors)
    with open_checkpoint(None, tmp_path, **options) as streamer:
        assert where(streamer) == {in_pages}
        assert streamer.memory.host_bytes >= streamer.plan.placement.device_bytes[0]
        if "dtype" not in options:
            streamer.run_pass(None, witness)
            witness.check()


def test_pages_that_were_taken_away_come_back(tmp_path: Path) -> None:
    tensors = checkpoint(tmp_path, 4000)
    witness = Witness(CPU, tensors)
    with open_checkpoint(None, tmp_path, device_budget="1GiB") as streamer:
        for _ in range(2):
            for path in streamer.manifest.files:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            streamer.run_pass(None, witness)
        witness.check()


def test_pages_that_are_gone_and_cannot_be_read_are_an_error_and_the_next_pass_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness = Witness(CPU, checkpoint(tmp_path))

    def refuse(address: int, nbytes: int, *, write: bool) -> None:
        raise OSError(5, os.strerror(5))

    with open_checkpoint(None, tmp_path, device_budget="1GiB") as streamer:
        with monkeypatch.context() as patch:
            patch.setattr(mapped, "in_memory", lambda address, nbytes: False)
            patch.setattr(mapped, "populate", refuse)
            with pytest.raises(ReadError, match="cannot be read"):
                streamer.run_pass(None, witness)
        streamer.run_pass(None, witness)
        witness.check()


def test_a_kernel_that_cannot_populate_has_what_stays_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness = Witness(CPU, checkpoint(tmp_path))

    def refuse(address: int, nbytes: int, *, write: bool) -> None:
        raise OSError("refused")

    monkeypatch.setattr(mapped, "populate", refuse)
    with open_checkpoint(None, tmp_path, device_budget="1GiB") as streamer:
        assert where(streamer) == {False}
        streamer.run_pass(None, witness)
        witness.check()


def test_pages_of_a_mapping_are_said_to_be_there_only_if_they_are(tmp_path: Path) -> None:
    path, pages = tmp_path / "file", 8
    path.write_bytes(bytes(pages * mmap.PAGESIZE))
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
        mapping = mmap.mmap(file.fileno(), 0)
        memory = torch.frombuffer(mapping, dtype=torch.uint8)
        assert in_memory(memory.data_ptr(), memory.nbytes)
        os.truncate(path, mmap.PAGESIZE)
        assert in_memory(memory.data_ptr(), mmap.PAGESIZE)
        assert not in_memory(memory.data_ptr(), memory.nbytes)
    assert not in_memory(0, mmap.PAGESIZE)


def test_a_system_without_the_call_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libc, "_libc", lambda: None)
    assert not in_memory(0, 4096)
