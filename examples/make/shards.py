"""The files of a safetensors checkpoint, planned: which tensor goes where, and the headers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
"""Of each dtype, its name in safetensors and the bytes of an element."""
ITEM_NBYTES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8, "F8_E4M3": 1}
"""By their names in safetensors, everything that is written."""
BLOCK_NBYTES = 4096
"""What file systems and deduplicating storage count in."""
HEADER_ALIGNMENT = 8
"""As the safetensors package pads, so that reads start where they would in a published file."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file."""

    kind: str
    """One of ITEM_NBYTES."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_NBYTES[self.kind]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to be written."""

    name: str
    header: bytes
    """All bytes before the first tensor's."""
    counts: Mapping[str, int]
    """Elements of each tensor, in the order of the file."""
    nbytes: int
    """Of the whole file."""
    begin: int
    """Bytes of the files before it, each rounded up to whole blocks."""
    alignment: int = 1
    """Each tensor begins at a multiple of so many bytes after the header."""


def plan_shards(
    shapes: Mapping[str, tuple[int, ...]], *, dtype: str, shard_nbytes: float
) -> list[Shard]:
    """The files that transformers would make of these tensors, in the order of their names.

    No file has more than ``shard_nbytes`` of data, but for a tensor that is larger by itself.
    """
    kind = DTYPES[dtype][0]
    entries = {name: Entry(kind, shape) for name, shape in shapes.items()}
    return plan_entries(entries, shard_nbytes)


def plan_entries(entries: Mapping[str, Entry], shard_nbytes: float) -> list[Shard]:
    """The same of tensors of several dtypes, the widest of which come first in a file, so that all
    are aligned."""
    groups = _groups({name: entry.nbytes for name, entry in entries.items()}, shard_nbytes)
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = ["model.safetensors"]
    shards: list[Shard] = []
    begin = 0
    for name, group in zip(names, groups, strict=True):
        group.sort(key=lambda key: (-ITEM_NBYTES[entries[key].kind], key))
        shards.append(_shard(name, begin, {key: entries[key] for key in group}))
        begin += math.ceil(shards[-1].nbytes / BLOCK_NBYTES) * BLOCK_NBYTES
    return shards


def shard_index(shards: Sequence[Shard]) -> dict[str, Any]:
    """What model.safetensors.index.json says of several files."""
    counts = {name: count for shard in shards for name, count in shard.counts.items()}
    total_size = sum(shard.nbytes - len(shard.header) for shard in shards)
    return {
        "metadata": {"total_parameters": sum(counts.values()), "total_size": total_size},
        "weight_map": {name: shard.name for shard in shards for name in shard.counts},
    }


def _groups(sizes: Mapping[str, int], limit: float) -> list[list[str]]:
    groups: list[list[str]] = []
    current: list[str] = []
    filled = 0
    for name, nbytes in sizes.items():
        if nbytes > limit:  # alone in a file, and the next tensors go on with the current one
            groups.append([name])
            continue
        if filled + nbytes > limit:
            groups.append(current)
            current, filled = [], 0
        current.append(name)
        filled += nbytes
    return [*groups, current] if current else groups


def _shard(name: str, begin: int, entries: Mapping[str, Entry]) -> Shard:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, entry in entries.items():
        start, end = end, end + entry.nbytes
        fields[key] = {"dtype": entry.kind, "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    counts = {key: math.prod(entry.shape) for key, entry in entries.items()}
    return Shard(name, header, counts, len(header) + end, begin)
