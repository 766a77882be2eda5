"""Which files make up a sharded checkpoint: its index, or its files' numbered names.

An index is a JSON file whose ``weight_map`` maps each tensor's name to the file that holds it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..errors import CheckpointError
from .foreign import HEAD_BYTES, JSON_BEGINS, foreign_file
from .header import MAX_FILES, MAX_HEADER_BYTES, MAX_RECORD_BYTES, MAX_TENSORS, open_header
from .json_members import JsonMembers
from .names import file_fault, shown

INDEX_NAME = "model.safetensors.index.json"
INDEX_SUFFIX = ".safetensors.index.json"

MAX_INDEX_KEYS = 8
"""Most keys that an index may have beside weight_map; real ones have "metadata"."""

_PART_NAME = re.compile(r"(.*)-([0-9]{1,9})-of-([0-9]{1,9})(\.safetensors|\.gguf)", re.DOTALL)


def read_index(path: Path) -> dict[str, str]:
    """The index's weight_map: tensor name -> path of its shard below the index's directory.

    Errors: CheckpointError for an index that is malformed, empty, too large, or that names a shard
    outside its directory.
    """
    with open_header(path) as file:
        if file.size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: {file.size} bytes, more than {MAX_HEADER_BYTES}")
        head = file.read(0, min(file.size, HEAD_BYTES))
        if not JSON_BEGINS.match(head):
            what = foreign_file(head, "", file.size) or "expected an object"
            raise CheckpointError(f"{path}: index: {what}")
        members = JsonMembers(file, 0, file.size, "index")
        weight_map: dict[str, str] | None = None
        members.enter()
        others = 0
        for key in iter(members.next_key, None):
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
            fault = file_fault(shard)
            if fault:
                members.fail(f"tensor {shown(name)}: shard {shown(shard)} {fault}")
            # "./a" and "a" are one file.
            checked[shard] = str(PurePosixPath(shard))
        weight_map[name] = checked[shard]
    return weight_map


class SplitName(NamedTuple):
    """What the name of one file of a sharded model says: NAME-00001-of-00002 and a suffix."""

    model: tuple[str, int, str]
    """What all parts share: the name before the number, how many they are, and the suffix."""
    number: int
    digits: tuple[int, int]
    """How many digits the number and the count are written with."""

    def sibling(self, number: int) -> str:
        """The name that another part should have."""
        stem, total, suffix = self.model
        return f"{stem}-{number:0{self.digits[0]}}-of-{total:0{self.digits[1]}}{suffix}"


def part_of(name: str) -> SplitName | None:
    """What a file's name says of its place among others; None if it is a model by itself."""
    match = _PART_NAME.fullmatch(name)
    if match is None:
        return None
    stem, number, total, suffix = match.groups()
    return SplitName((stem, int(total), suffix), int(number), (len(number), len(total)))


def group_parts(names: Iterable[str]) -> dict[tuple[str, int, str], dict[int, str]]:
    """The parts of sharded models among these files: their names by their numbers."""
    models: dict[tuple[str, int, str], dict[int, str]] = {}
    for name in names:
        part = part_of(name)
        if part is not None:
            models.setdefault(part.model, {})[part.number] = name
    return models


def all_parts(path: Path, there: Mapping[int, str]) -> list[Path]:
    """All parts of the model that ``path`` is a part of, in order, ``there`` being the names of
    those in its folder; the path itself if it is a model by itself.

    They are counted from 0 where there is a part 0, from 1 elsewhere. CheckpointError for a number
    that none of them has, or for more than MAX_FILES.
    """
    part = part_of(path.name)
    if part is None:
        return [path]
    total = part.model[1]
    first = 0 if part.number == 0 or 0 in there else 1
    if total > MAX_FILES or not first <= part.number < first + total:
        raise CheckpointError(
            f"{path}: part {part.number} of {total} (1 to {MAX_FILES} parts are read)"
        )
    numbers = range(first, first + total)
    return [path.with_name(there.get(k) or part.sibling(k)) for k in numbers]


def check_parts(directory: Path, names: Collection[str]) -> None:
    """Without an index, numbered names still tell which shard is missing: a CheckpointError."""
    present = frozenset(names)
    for there in group_parts(names).values():
        for path in all_parts(directory / min(there.values()), there):
            if path.name not in present:
                raise CheckpointError(f"{path}: missing, other parts are there")
