"""GGUF headers: metadata, and where the bytes of each tensor lie.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little endian: magic
``GGUF``, u32 version (2 or 3), u64 tensor count, u64 key count; keys with typed values; for each
tensor name, u32 number of dimensions, u64 dimensions (innermost first), u32 GGML type, u64 offset;
then, at the next multiple of ``general.alignment`` (32), the data section that offsets count from.
A split model is ``NAME-00001-of-0000N.gguf`` to ``NAME-0000N-of-0000N.gguf``, each a whole GGUF
file with ``split.no`` (from 0) and ``split.count``.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .foreign import HEAD_BYTES, foreign_file
from .ggml_types import GGML_TYPES, GGMLType
from .gguf_values import U32, Cursor, GGUFArray, Scalar, read_value
from .header import (
    MAX_FILE_TENSORS,
    MAX_KEYS,
    Contents,
    HeaderFile,
    Quota,
    list_directory,
    open_header,
)
from .manifest import TRUNCATED, FileStamp, FrozenMapping, TensorSpec, check_extents, checked_nbytes
from .names import MAX_NAME_CHARS, check_name, shown
from .shards import all_parts, group_parts, part_of

__all__ = ["GGUFArray", "read_gguf"]

MAX_DIMS = 4
"""Most dimensions of a GGML tensor (GGML_MAX_DIMS)."""

MAX_ALIGNMENT = 1 << 30
"""Largest ``general.alignment``; real files have 32, few a page."""

MIN_KEY_BYTES = 8 + 1 + 4 + 1
MIN_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8
"""What a key or a tensor takes at least, to check their counts against the bytes left."""

_COUNTS = struct.Struct("<QQ")
_DIMS = [struct.Struct(f"<{n}QIQ") for n in range(MAX_DIMS + 1)]


def read_gguf(path: Path) -> Contents:
    """Tensors and metadata of a GGUF file, and of all other parts if it is one of a split model.

    Packed tensors are raw rows: dtype uint8, shape (..., bytes per row). Reads headers only; the
    metadata is the first part's. Errors: CheckpointError that names the file and its fault.
    """
    part = part_of(path.name)
    there = group_parts(list_directory(path.parent)).get(part.model, {}) if part else {}
    paths = all_parts(path, there)
    quota = Quota()
    tensors: dict[str, TensorSpec] = {}
    files: dict[Path, FileStamp] = {}
    metadata: dict[str, Scalar | GGUFArray] = {}
    for k, file_path in enumerate(paths):
        context = f" (part {k + 1} of {len(paths)} of a split checkpoint)" if part else ""
        with open_header(file_path, context) as file:
            keys, specs = _read_header(file, quota)
        _check_part(file_path, keys, k, len(paths))
        for name in specs.keys() & tensors.keys():
            raise CheckpointError(f"{file_path}: tensor {name!r} is also in {tensors[name].path}")
        tensors.update(specs)
        files[file_path] = file.stamp
        metadata = metadata or keys
    claimed = metadata.get("split.tensors.count", len(tensors)) if part else len(tensors)
    if claimed != len(tensors):
        raise CheckpointError(
            f"{path}: split.tensors.count is {shown(claimed)}, the parts have {len(tensors)}"
        )
    _refuse_by_type(path, metadata.get("general.type"))
    return Contents(tensors, FrozenMapping(files), FrozenMapping(metadata))


def _refuse_by_type(path: Path, kind: object) -> None:
    """CheckpointError for files in this format that hold no weights of a model."""
    if kind == "imatrix":
        raise CheckpointError(f"{path}: an importance matrix, no model: name the model's own file")


def _check_part(path: Path, keys: dict[str, Any], number: int, total: int) -> None:
    """The file's own split keys, where it has them, must agree with its name."""
    claimed, k = keys.get("split.count", total), keys.get("split.no", number)
    if claimed in (0, 1) and total == 1:
        return
    if claimed != total or k != number:
        raise CheckpointError(
            f"{path}: its name says part {number + 1} of {total}, its keys split.no {shown(k)} "
            f"(from 0) and split.count {shown(claimed)}: give it the name that it was made with"
        )


def _read_header(
    file: HeaderFile, quota: Quota
) -> tuple[dict[str, Scalar | GGUFArray], dict[str, TensorSpec]]:
    """One file's keys and tensors."""
    cursor = Cursor(file, limit=quota.header)
    head = file.read(0, min(file.size, HEAD_BYTES))
    if head[:4] != b"GGUF":
        cursor.fail(foreign_file(head, file.path.name, file.size) or "no GGUF file (wrong magic)")
    cursor.pos = 4
    version = cursor.number(U32, "version")
    if version not in (2, 3):
        swapped = version & 0xFFFF == 0 and version != 0
        cursor.fail(
            f"GGUF version {version}{' (big endian?)' if swapped else ''}, only 2 and 3 are read"
        )
    num_tensors, num_keys = cursor.numbers(_COUNTS, "counts")
    if num_keys > quota.keys or num_keys * MIN_KEY_BYTES > cursor.left:
        cursor.fail(
            f"{num_keys} keys (at most {MAX_KEYS} in all) in {cursor.left} bytes ({TRUNCATED})"
        )
    quota.keys -= num_keys
    if num_tensors > MAX_FILE_TENSORS or num_tensors * MIN_TENSOR_BYTES > cursor.left:
        cursor.fail(
            f"{num_tensors} tensors (at most {MAX_FILE_TENSORS}) in {cursor.left} bytes "
            f"({TRUNCATED})"
        )
    keys = _read_keys(cursor, num_keys, quota)
    alignment = _alignment(cursor, keys)
    specs = _read_tensors(cursor, num_tensors, alignment, quota)
    quota.header -= cursor.pos
    check_extents(specs.values(), file.size, file.path)
    return keys, specs


def _read_keys(cursor: Cursor, count: int, quota: Quota) -> dict[str, Scalar | GGUFArray]:
    keys: dict[str, Scalar | GGUFArray] = {}
    for i in range(count):
        key = cursor.string(f"key {i} of {count}", MAX_NAME_CHARS)
        check_name(key, cursor.file.path, "key")
        if key in keys:
            cursor.fail(f"key {key!r} appears twice")
        quota.text -= len(key)
        if quota.text < 0:
            cursor.fail("keys and strings of the metadata are too long together")
        keys[key] = read_value(cursor, key, quota)
    return keys


def _alignment(cursor: Cursor, keys: dict[str, Scalar | GGUFArray]) -> int:
    value = keys.get("general.alignment", 32)
    if type(value) is not int or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        cursor.fail(f"general.alignment {shown(value)} is no power of two up to {MAX_ALIGNMENT}")
    return value


def _read_tensors(
    cursor: Cursor, count: int, alignment: int, quota: Quota
) -> dict[str, TensorSpec]:
    path = cursor.file.path
    records: dict[str, tuple[GGMLType, tuple[int, ...], int, int]] = {}
    for i in range(count):
        name = cursor.string(f"tensor {i} of {count}", MAX_NAME_CHARS)
        check_name(name, path, "tensor")
        if name in records:
            cursor.fail(f"tensor {name!r} appears twice")
        what = f"tensor {name!r}"
        num_dims = cursor.number(U32, what)
        if num_dims > MAX_DIMS:
            cursor.fail(f"{what}: {num_dims} dimensions, more than {MAX_DIMS}")
        *dims, type_id, offset = cursor.numbers(_DIMS[num_dims], what)
        ggml_type = GGML_TYPES.get(type_id)
        if ggml_type is None:
            cursor.fail(f"{what}: unknown GGML type {type_id}")
        if offset % alignment:
            cursor.fail(f"{what}: offset {offset} is no multiple of the alignment {alignment}")
        shape, nbytes = _check_shape(ggml_type, dims, f"{path}: {what}")
        quota.charge(name, len(shape), path)
        records[name] = (ggml_type, shape, offset, nbytes)
    start = -(-cursor.pos // alignment) * alignment
    return {
        name: TensorSpec(name, kind.dtype, shape, path, start + offset, nbytes, kind.name)
        for name, (kind, shape, offset, nbytes) in records.items()
    }


def _check_shape(kind: GGMLType, dims: list[int], what: str) -> tuple[tuple[int, ...], int]:
    """Shape as torch has it, outermost first, and its bytes; packed rows as bytes."""
    shape = tuple(dims[::-1])
    if kind.is_native:
        return shape, checked_nbytes(shape, 8 * kind.block_bytes, what)
    row = dims[0] if dims else 1
    if row % kind.block_elements:
        raise CheckpointError(
            f"{what}: rows of {row} elements, {kind.name} packs {kind.block_elements} in a block"
        )
    shape = (*shape[:-1], row // kind.block_elements * kind.block_bytes)
    return shape, checked_nbytes(shape, 8, what)
