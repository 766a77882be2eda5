"""Safetensors headers: where the bytes of each tensor lie.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length, little
endian; the header, a JSON object that maps each tensor's name to its ``dtype``, ``shape`` and
``data_offsets`` (begin and end, relative to the header's end) and may hold string pairs under
``__metadata__``; the tensors' bytes, row-major. A sharded checkpoint has an index, a JSON file
whose ``weight_map`` maps names to file names.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ..errors import CheckpointError, printable
from .foreign import HEAD_BYTES, foreign_file
from .header import (
    MAX_DIMS,
    MAX_FILE_TENSORS,
    MAX_HEADER_BYTES,
    MAX_INT,
    MAX_TEXT_BYTES,
    WINDOW_BYTES,
    Contents,
    HeaderFile,
    Quota,
    open_header,
)
from .json_members import JsonMembers
from .manifest import (
    TRUNCATED,
    FileStamp,
    FrozenMapping,
    TensorSpec,
    check_extents,
    checked_nbytes,
)
from .names import check_name, shown
from .shards import read_index

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F4": torch.float4_e2m1fn_x2,
}
"""The format's dtype names; "F4" counts single elements, torch's dtype pairs of them."""

logger = logging.getLogger(__name__)

_LENGTH = struct.Struct("<Q")
_INT = {int}
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}

_Kind: TypeAlias = tuple[torch.dtype, tuple[int, ...], int]
"""What tensors of one dtype and shape share: torch's dtype, torch's shape, bytes."""
_Kinds: TypeAlias = dict[tuple[str | int, ...], _Kind]


def read_safetensors(paths: Sequence[Path]) -> Contents:
    """All tensors of these files; a name in two of them is an error.

    Reads headers only. Errors: CheckpointError that names the file and its fault.
    """
    found = _Found()
    for path in paths:
        for name, spec in found.read(path).items():
            raise CheckpointError(
                f"{path}: tensor {name!r} is also in {spec.path}: no index says which of these "
                "files make up one checkpoint; name one file"
            )
    return found.contents()


def read_indexed(index: Path) -> Contents:
    """The tensors in the shards that an index names.

    Where a shard's header says other than the index, the header is right; of a tensor in two
    shards the later one's is taken. So does transformers; a notice says it. CheckpointError for a
    tensor that the index lists and no shard has.
    """
    weight_map = read_index(index)
    found, twice = _Found(), list[str]()
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        twice += found.read(path, f" (a shard that {index.name} lists)")
    for name, shard in weight_map.items():
        if name not in found.tensors:
            raise CheckpointError(
                f"{index.parent / shard}: has no tensor {shown(name)}, which {index.name} lists "
                "here, and nor has another shard"
            )
    tensors = found.tensors
    elsewhere = [n for n, shard in weight_map.items() if tensors[n].path != index.parent / shard]
    for names, what in (
        (twice, "in more than one shard, the later one's is taken"),
        ([n for n in elsewhere if n not in set(twice)], "not in the shard that the index says"),
        ([name for name in tensors if name not in weight_map], "in a shard, but not in the index"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            logger.warning("%s: %s%s: %s", printable(str(index)), shown(names[0]), more, what)
    return found.contents()


class _Found:
    """What the files of a checkpoint hold, read one after the other."""

    def __init__(self) -> None:
        self.tensors: dict[str, TensorSpec] = {}
        self._quota = Quota()
        self._files: dict[Path, FileStamp] = {}
        self._metadata: dict[str, Any] = {}

    def read(self, path: Path, context: str = "") -> dict[str, TensorSpec]:
        """Add the tensors of one more file; those of other files that they replace."""
        with open_header(path, context) as file:
            specs, notes = _read_header(file, self._quota)
        twice = {name: self.tensors[name] for name in specs if name in self.tensors}
        self.tensors.update(specs)
        self._metadata.update(notes)
        self._files[path] = file.stamp
        return twice

    def contents(self) -> Contents:
        files, metadata = FrozenMapping(self._files), FrozenMapping(self._metadata)
        return Contents(self.tensors, files, metadata)


def _read_header(file: HeaderFile, quota: Quota) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """One file's tensors and its ``__metadata__``."""
    length = _header_length(file)
    quota.header -= length
    if quota.header < 0:
        raise CheckpointError(
            f"{file.path}: the headers of all files together are longer than {MAX_HEADER_BYTES}"
        )
    start = _LENGTH.size + length
    _check_count(file, length)
    members = JsonMembers(file, _LENGTH.size, length, "header")
    specs: dict[str, TensorSpec] = {}
    metadata: dict[str, str] | None = None
    kinds: _Kinds = {}
    members.enter()
    while (name := members.next_key()) is not None:
        if name == "__metadata__":
            if metadata is not None:
                members.fail("__metadata__ appears twice")
            metadata = _read_metadata(members, quota)
            continue
        if name in specs:
            members.fail(f"tensor {shown(name)} appears twice")
        known = len(kinds)
        (dtype, shape, nbytes), begin = _check_entry(file.path, name, members.value(), kinds)
        quota.charge(name, len(shape) if len(kinds) > known else 0, file.path)
        specs[name] = TensorSpec(name, dtype, shape, file.path, start + begin, nbytes)
    members.finish()
    check_extents(specs.values(), file.size, file.path)
    return specs, metadata or {}


def _header_length(file: HeaderFile) -> int:
    """Bytes of the header, which the file begins with. CheckpointError for what has none, which
    names it for what it is."""
    head = file.read(0, min(file.size, HEAD_BYTES))
    length = int.from_bytes(head[: _LENGTH.size], "little")
    end = _LENGTH.size + length
    if length <= MAX_HEADER_BYTES and head[_LENGTH.size :].startswith(b"{"):
        if end <= file.size:
            return length
        fault = f"header ends at byte {end}, the file has {file.size} ({TRUNCATED})"
    elif what := foreign_file(head, file.path.name, file.size):
        fault = what
    elif file.size <= _LENGTH.size:
        fault = f"{file.size} bytes, no safetensors header ({TRUNCATED})"
    elif length > MAX_HEADER_BYTES:
        fault = f"no safetensors file: header of {length} bytes, more than {MAX_HEADER_BYTES}"
    else:
        fault = "header does not begin with '{'"
    raise CheckpointError(f"{file.path}: {fault}")


def _check_count(file: HeaderFile, length: int) -> None:
    """Reject a header of far too many entries before any is parsed."""
    entries = 0
    for at in range(0, length, WINDOW_BYTES):
        window = file.read(_LENGTH.size + at, min(WINDOW_BYTES, length - at))
        entries += window.count(b'"data_offsets"')
        if entries > MAX_FILE_TENSORS:
            raise CheckpointError(f"{file.path}: header: more than {MAX_FILE_TENSORS} tensors")


def _read_metadata(members: JsonMembers, quota: Quota) -> dict[str, str]:
    metadata: dict[str, str] = {}
    if not members.enter_or_null():
        return metadata
    while (key := members.next_key()) is not None:
        text = members.string(max_chars=quota.text)
        if key in metadata:
            members.fail(f"__metadata__: {shown(key)} appears twice")
        # 100: what a key and its value cost at least, so that very many empty ones end, too.
        quota.text -= len(key) + len(text) + 100
        if quota.text < 0:
            members.fail(f"__metadata__ takes more than {MAX_TEXT_BYTES} characters")
        metadata[key] = text
    return metadata


def _check_entry(path: Path, name: str, entry: Any, kinds: _Kinds) -> tuple[_Kind, int]:
    """One tensor's kind, and its offset in the data section; checked alone."""
    check_name(name, path, "tensor")
    if not isinstance(entry, dict) or not entry.keys() >= _ENTRY_KEYS:
        raise CheckpointError(
            f"{path}: tensor {name!r}: expected dtype, shape and data_offsets, got {shown(entry)}"
        )
    label, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _are_ints(shape) or len(shape) > MAX_DIMS or not isinstance(label, str):
        raise CheckpointError(
            f"{path}: tensor {name!r}: dtype {shown(label)} or shape {shown(shape)} is none"
        )
    # Tensors of one dtype and shape are checked once and share their records.
    kind = kinds.get((label, *shape))
    if kind is None:
        kind = kinds[label, *shape] = _check_kind(label, shape, f"{path}: tensor {name!r}")
    if not _are_ints(offsets) or len(offsets) != 2 or not 0 <= offsets[0] <= MAX_INT:
        raise CheckpointError(
            f"{path}: tensor {name!r}: data_offsets {shown(offsets)} are not two byte offsets"
        )
    begin, end = offsets
    if end - begin != kind[2]:
        raise CheckpointError(
            f"{path}: tensor {name!r}: data_offsets {shown(offsets)} hold {shown(end - begin)} "
            f"bytes, {label} of shape {shape} needs {kind[2]}"
        )
    return kind, begin


def _check_kind(label: str, shape: list[int], what: str) -> _Kind:
    """A dtype's name and a shape as torch has them, and the bytes of such a tensor."""
    dtype = DTYPES.get(label)
    if dtype is None:
        raise CheckpointError(f"{what}: unknown dtype {shown(label)}")
    if any(not 0 <= dim <= MAX_INT for dim in shape):
        raise CheckpointError(f"{what}: shape {shown(shape)} is negative or overflows 64 bits")
    if label != "F4":
        return dtype, tuple(shape), checked_nbytes(shape, 8 * dtype.itemsize, what)
    if not shape or shape[-1] % 2:
        raise CheckpointError(f"{what}: F4 of shape {shape} does not fill whole bytes in each row")
    paired = (*shape[:-1], shape[-1] // 2)
    return dtype, paired, checked_nbytes(paired, 8, what)


def _are_ints(values: object) -> bool:
    """A list of integers; true, false and 1.0 are none."""
    return isinstance(values, list) and _INT.issuperset(map(type, values))
