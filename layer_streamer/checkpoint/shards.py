"""Which files make up a sharded safetensors checkpoint: its index, or its files' numbered names.

An index is a JSON file whose ``weight_map`` maps each tensor's name to the file that holds it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError
from .header import (
    MAX_FILES,
    MAX_HEADER_BYTES,
    MAX_RECORD_BYTES,
    MAX_TENSORS,
    open_header,
    shown,
)
from .json_members import JsonMembers

INDEX_NAME = "model.safetensors.index.json"
INDEX_SUFFIX = ".safetensors.index.json"

MAX_INDEX_KEYS = 8
"""Most keys that an index may have beside weight_map; real ones have "metadata"."""

_PART_NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.safetensors", re.DOTALL)


def find_index(directory: Path, names: Collection[str]) -> Path | None:
    """The index among a directory's ``names``, None if there is none; CheckpointError for several.

    ``model.safetensors.index.json`` wins over indexes of other variants.
    """
    found = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if INDEX_NAME in found:
        return directory / INDEX_NAME
    if len(found) > 1:
        listed = ", ".join(found[:4])
        raise CheckpointError(f"{directory}: several index files ({listed}); name one of them")
    return directory / found[0] if found else None


def read_index(path: Path) -> dict[str, str]:
    """The index's weight_map: tensor name -> path of its shard below the index's directory.

    Errors: CheckpointError for an index that is malformed, empty, too large, or that names a shard
    outside its directory.
    """
    with open_header(path) as file:
        if file.size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: {file.size} bytes, more than {MAX_HEADER_BYTES}")
        members = JsonMembers(file, 0, file.size, "index")
        weight_map: dict[str, str] | None = None
        members.enter()
        others = 0
        while (key := members.next_key()) is not None:
            if key != "weight_map":
                members.value()
                others += 1
                if others > MAX_INDEX_KEYS:
                    members.fail(f"more than {MAX_INDEX_KEYS} keys beside weight_map")
            elif weight_map is None:
                weight_map = _read_weight_map(members)
            else:
                members.fail("weight_map appears twice")
        members.finish()
    if not weight_map:
        raise CheckpointError(f"{path}: index: no weight_map, or an empty one")
    return weight_map


def _read_weight_map(members: JsonMembers) -> dict[str, str]:
    weight_map: dict[str, str] = {}
    checked: dict[str, str] = {}  # one string a shard, not one a tensor
    memory = MAX_RECORD_BYTES
    members.enter()
    while (name := members.next_key()) is not None:
        shard = members.string()
        if name in weight_map:
            members.fail(f"tensor {shown(name)} is listed twice")
        if len(weight_map) == MAX_TENSORS:
            members.fail(f"more than {MAX_TENSORS} tensors")
        memory -= sys.getsizeof(name) + 100
        if memory < 0:
            members.fail(f"tensor names beyond {MAX_RECORD_BYTES} bytes")
        if shard not in checked:
            if len(checked) == MAX_FILES:
                members.fail(f"more than {MAX_FILES} shards")
            fault = _shard_fault(shard)
            if fault:
                members.fail(f"tensor {shown(name)}: shard {shown(shard)} {fault}")
            # "./a" and "a" are one file. Lexical: links inside a cache lead out legitimately.
            checked[shard] = str(PurePosixPath(shard))
        weight_map[name] = checked[shard]
    return weight_map


def _shard_fault(shard: str) -> str:
    """Why a shard's name may not be opened, '' if it may."""
    if "\0" in shard or "\\" in shard or len(shard) > 4096:
        return "is no file name (NUL, backslash or too long)"
    parts = PurePosixPath(shard)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        return "is not below the model's directory"
    try:
        shard.encode()
    except UnicodeEncodeError:
        return "is not valid Unicode"
    return ""


def check_parts(directory: Path, names: Collection[str]) -> None:
    """Without an index, numbered names still tell which shard is missing: a CheckpointError."""
    matches = [match for match in map(_PART_NAME.fullmatch, names) if match]
    for stem, total in sorted({(match[1], match[3]) for match in matches}):
        for part in range(1, min(int(total), MAX_FILES) + 1):
            wanted = f"{stem}-{part:05}-of-{total}.safetensors"
            if wanted not in names:
                raise CheckpointError(f"{directory / wanted}: missing, other parts are there")
