"""Safetensors files to be written: their names and headers, and each file whole or not at all.

Imports torch where it writes and no sooner, so that what only plans files need not wait for it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import torch

DTYPES = {
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int32": ("I32", 4),
    "int64": ("I64", 8),
    "uint8": ("U8", 1),
    "float8_e4m3fn": ("F8_E4M3", 1),
}
"""All that is written, by torch's name: its name in safetensors and the bytes of an element."""
HEADER_ALIGNMENT = 8
"""As the safetensors package pads, so that reads start where they would in a published file."""
INDEX = "model.safetensors.index.json"
TEMPORARY = ".writing"
"""The end of the name of a file that is not whole yet."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to be written."""

    dtype: str
    """One of DTYPES."""
    shape: tuple[int, ...]
    blocks: Iterable[torch.Tensor] = ()
    """Its values in order, of this dtype, on the host."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Entry:
        return cls(name_of(tensor.dtype), tuple(tensor.shape), [tensor])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]


def name_of(dtype: torch.dtype) -> str:
    """As configs have it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def shard_names(count: int) -> list[str]:
    """Of the files of a model in several."""
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def as_json(content: object) -> bytes:
    """As it is written beside the weights."""
    return (json.dumps(content, indent=2) + "\n").encode()


def header_of(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """All of a file that comes before its first tensor; they lie in the order of ``entries``."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + entry.nbytes
        kind, _ = DTYPES[entry.dtype]
        fields[name] = {"dtype": kind, "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def check_room(out: Path, needed: int) -> None:
    """ValueError if the file system on which OUT is to be made has not so many bytes free."""
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise ValueError(f"{out}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")


def write_shard(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    """A safetensors file, whole or not at all. OSError, ValueError."""
    with whole(path) as file:
        file.write(header_of(entries, metadata))
        for name, entry in entries.items():
            written = sum(_write(file, block) for block in entry.blocks)
            if written != entry.nbytes:
                raise ValueError(f"{name}: {written} bytes made, {entry.nbytes} planned")


def _write(file: BinaryIO, block: torch.Tensor) -> int:
    import torch

    return file.write(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """Context with a file to write, which gets its name only once it is on the disk."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_header(path: Path) -> dict[str, Any]:
    """The header of a file that :func:`write_shard` wrote."""
    return _read(path)[1]


def is_whole(path: Path) -> bool:
    """True if this is a file as :func:`write_shard` leaves it."""
    try:
        size = path.stat().st_size
        begin, header = _read(path)
    except (OSError, ValueError):
        return False
    ends = (fields["data_offsets"][1] for key, fields in header.items() if key != "__metadata__")
    return size == begin + max(ends, default=0)


def _read(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the first tensor begins, and the header."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return 8 + size, json.loads(file.read(size))
