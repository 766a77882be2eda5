"""Safetensors headers: where the bytes of each tensor lie.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length, little
endian; the header, a JSON object that maps each tensor's name to its ``dtype``, ``shape`` and
``data_offsets`` (begin and end, relative to the header's end) and may hold string pairs under
``__metadata__``; the tensors' bytes, row-major. A sharded checkpoint has an index, a JSON file
whose ``weight_map`` maps names to file names.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ..errors import CheckpointError
from .header import (
    MAX_DIMS,
    MAX_FILE_TENSORS,
    MAX_FILES,
    MAX_HEADER_BYTES,
    MAX_INT,
    MAX_TEXT_BYTES,
    WINDOW_BYTES,
    Budget,
    Contents,
    HeaderFile,
    check_name,
    list_directory,
    open_header,
    shown,
)
from .json_members import JsonMembers
from .manifest import FileStamp, FrozenMapping, TensorSpec, check_extents, checked_nbytes
from .shards import INDEX_SUFFIX, check_parts, find_index, read_index

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

WHOLE_MODEL = "model.safetensors"
"""The name of a checkpoint in one file."""

_LENGTH = struct.Struct("<Q")
_INT = {int}
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}

_Kind: TypeAlias = tuple[torch.dtype, tuple[int, ...], int]
"""What tensors of one dtype and shape share: torch's dtype, torch's shape, bytes."""
_Kinds: TypeAlias = dict[tuple[str | int, ...], _Kind]


def read_safetensors(path: Path) -> Contents:
    """The tensors of a directory, of one ``.safetensors`` file, or of an index file.

    Reads headers only. Errors: CheckpointError that names the file and its fault.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return _read_indexed(path)
    if not path.is_dir():
        return _read_files([path])
    names = list_directory(path)
    index = find_index(path, names)
    if index is not None:
        return _read_indexed(index)
    if WHOLE_MODEL in names:
        # What loaders take when there is no index, whatever else (adapters, say) lies beside it.
        return _read_files([path / WHOLE_MODEL])
    names = [name for name in names if name.endswith(".safetensors")]
    if not names:
        raise CheckpointError(f"{path}: no .safetensors file in this directory")
    if len(names) > MAX_FILES:
        raise CheckpointError(f"{path}: {len(names)} safetensors files, more than {MAX_FILES}")
    check_parts(path, names)
    return _read_files([path / name for name in names])


def _read_files(paths: Iterable[Path]) -> Contents:
    """All tensors of these files; a name in two of them is an error."""
    budget = Budget()
    tensors: dict[str, TensorSpec] = {}
    files: dict[Path, FileStamp] = {}
    metadata: dict[str, Any] = {}
    for path in paths:
        with open_header(path) as file:
            specs, notes = _read_header(file, budget)
        for name in specs.keys() & tensors.keys():
            raise CheckpointError(f"{path}: tensor {name!r} is also in {tensors[name].path}")
        tensors.update(specs)
        metadata.update(notes)
        files[path] = file.stamp
    return Contents(tensors, FrozenMapping(files), FrozenMapping(metadata))


def _read_indexed(index: Path) -> Contents:
    """The tensors that an index lists, from the shards that it names."""
    weight_map = read_index(index)
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, []).append(name)
    budget = Budget()
    tensors: dict[str, TensorSpec] = {}
    files: dict[Path, FileStamp] = {}
    metadata: dict[str, Any] = {}
    for shard in sorted(shards):
        path = index.parent / shard
        with open_header(path, f" (a shard that {index.name} lists)") as file:
            specs, notes = _read_header(file, budget)
        for name in shards[shard]:
            if name not in specs:
                raise CheckpointError(
                    f"{path}: has no tensor {shown(name)}, which {index.name} lists here"
                )
            tensors[name] = specs[name]
        metadata.update(notes)
        files[path] = file.stamp
    return Contents(tensors, FrozenMapping(files), FrozenMapping(metadata))


def _read_header(file: HeaderFile, budget: Budget) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """One file's tensors and its ``__metadata__``."""
    if file.size < _LENGTH.size:
        raise CheckpointError(f"{file.path}: {file.size} bytes, no safetensors header")
    (length,) = _LENGTH.unpack(file.read(0, _LENGTH.size))
    start = _LENGTH.size + length
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file.path}: header of {length} bytes, more than {MAX_HEADER_BYTES}"
        )
    if start > file.size:
        raise CheckpointError(
            f"{file.path}: header ends at byte {start}, the file has {file.size} (truncated?)"
        )
    if not length or file.read(_LENGTH.size, 1) != b"{":
        raise CheckpointError(f"{file.path}: header does not begin with '{{'")
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
            metadata = _read_metadata(members, budget)
            continue
        if name in specs:
            members.fail(f"tensor {shown(name)} appears twice")
        known = len(kinds)
        (dtype, shape, nbytes), begin = _check_entry(file.path, name, members.value(), kinds)
        budget.charge(name, len(shape) if len(kinds) > known else 0, file.path)
        specs[name] = TensorSpec(name, dtype, shape, file.path, start + begin, nbytes)
    members.finish()
    check_extents(specs.values(), file.size, file.path)
    return specs, metadata or {}


def _check_count(file: HeaderFile, length: int) -> None:
    """Reject a header of far too many entries before any is parsed."""
    entries = 0
    for at in range(0, length, WINDOW_BYTES):
        window = file.read(_LENGTH.size + at, min(WINDOW_BYTES, length - at))
        entries += window.count(b'"data_offsets"')
        if entries > MAX_FILE_TENSORS:
            raise CheckpointError(f"{file.path}: header: more than {MAX_FILE_TENSORS} tensors")


def _read_metadata(members: JsonMembers, budget: Budget) -> dict[str, str]:
    metadata: dict[str, str] = {}
    members.enter()
    while (key := members.next_key()) is not None:
        text = members.string(max_chars=budget.text)
        if key in metadata:
            members.fail(f"__metadata__: {shown(key)} appears twice")
        # 100: what a key and its value cost at least, so that very many empty ones end, too.
        budget.text -= len(key) + len(text) + 100
        if budget.text < 0:
            members.fail(f"__metadata__ takes more than {MAX_TEXT_BYTES} characters")
        metadata[key] = text
    return metadata


def _check_entry(path: Path, name: str, entry: Any, kinds: _Kinds) -> tuple[_Kind, int]:
    """One tensor's kind, and its offset in the data section; checked alone."""
    check_name(name, path, "tensor")
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
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
