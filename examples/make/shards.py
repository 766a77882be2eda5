"""The files of a safetensors checkpoint, planned: which tensor goes where, and the headers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layer_streamer.llm.quantize.shards import DTYPES, Entry, header_of, shard_names

BLOCK_NBYTES = 4096
"""What file systems and deduplicating storage count in."""


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
    entries = {name: Entry(dtype, shape) for name, shape in shapes.items()}
    return plan_entries(entries, shard_nbytes)


def plan_entries(entries: Mapping[str, Entry], shard_nbytes: float) -> list[Shard]:
    """The same of tensors of several dtypes, the widest of which come first in a file, so that all
    are aligned."""
    groups = _groups({name: entry.nbytes for name, entry in entries.items()}, shard_nbytes)
    names = ["model.safetensors"] if len(groups) == 1 else shard_names(len(groups))
    shards: list[Shard] = []
    begin = 0
    for name, group in zip(names, groups, strict=True):
        group.sort(key=lambda key: (-DTYPES[entries[key].dtype][1], key))
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
    header = header_of(entries, {})
    counts = {key: math.prod(entry.shape) for key, entry in entries.items()}
    nbytes = sum(entry.nbytes for entry in entries.values())
    return Shard(name, header, counts, len(header) + nbytes, begin)
