"""The files of a quantized model: written one by one, each whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

KINDS = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int64: "I64",
}
HEADER_ALIGNMENT = 8
TEMPORARY = ".writing"
"""The end of the name of a file that is not whole yet."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Iterable[torch.Tensor]
    """Its values in order, of this dtype, on the host."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Entry:
        return cls(tensor.dtype, tuple(tensor.shape), [tensor])

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


def write_shard(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    """A safetensors file, under its name only once it is on the disk. OSError, ValueError."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            file.write(_header(entries, metadata))
            for name, entry in entries.items():
                written = sum(_write(file, block) for block in entry.blocks)
                if written != entry.nbytes:
                    raise ValueError(f"{name}: {written} bytes made, {entry.nbytes} planned")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write(file: Any, block: torch.Tensor) -> int:
    nbytes: int = file.write(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return nbytes


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + entry.nbytes
        fields[name] = {
            "dtype": KINDS[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> dict[str, Any]:
    """The header of a file that :func:`write_shard` wrote."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        found: dict[str, Any] = json.loads(file.read(size))
    return found


def is_whole(path: Path) -> bool:
    """True if this is a file as :func:`write_shard` leaves it."""
    try:
        size = path.stat().st_size
        header = read_header(path)
    except (OSError, ValueError):
        return False
    ends = (fields["data_offsets"][1] for key, fields in header.items() if key != "__metadata__")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    return size == 8 + length + max(ends, default=0)
