"""What is in a checkpoint: layers, their tensors, and where each tensor's bytes lie.

Pure records, no file is opened here: :mod:`.formats` reads headers into a :class:`Manifest`,
:func:`manifest_from_tensor_info` builds one from tables that a caller has.
"""

from __future__ import annotations

import math
import stat
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..errors import CheckpointError, ConfigError
from .names import absolute, file_fault, shown

MAX_TENSOR_BYTES = 2**63 - 1

TRUNCATED = "truncated? download or copy it again"
"""What an error says of a file that ends too early."""

K = TypeVar("K")
V = TypeVar("V")


class FrozenMapping(Mapping[K, V]):
    """A mapping that cannot be changed, but pickled and copied, as MappingProxyType cannot be."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[K, V]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: K) -> V:
        return self._items[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def keys(self) -> KeysView[K]:
        return self._items.keys()

    def items(self) -> ItemsView[K, V]:
        return self._items.items()

    def values(self) -> ValuesView[V]:
        return self._items.values()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._items!r})"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint and the contiguous bytes that hold it."""

    name: str
    """Full name, as the file has it."""
    dtype: torch.dtype
    """Stored dtype; ``torch.uint8`` for the raw rows of a packed GGUF tensor."""
    shape: tuple[int, ...]
    """Shape of the streamed tensor; for packed GGUF tensors (..., bytes per row)."""
    path: Path
    """File that holds the bytes."""
    offset: int
    """Absolute byte offset in that file."""
    nbytes: int
    """Length in bytes."""
    ggml_type: str | None = None
    """GGML type name ("Q4_1", "F16", ...) of a tensor that comes from a GGUF file."""
    pieces: tuple[TensorSpec, ...] = ()
    """What it is made of, laid end to end, if its bytes lie in several places: ``path`` and
    ``offset`` are those of the first, ``nbytes`` is their sum. No header has such a tensor."""

    @property
    def extents(self) -> tuple[TensorSpec, ...]:
        """What holds its bytes, in order: its pieces, or itself."""
        return self.pieces or (self,)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The tensors of one layer, keyed without the layer's prefix."""

    layer_idx: int
    """Its number in the checkpoint, from 0."""
    tensors: Mapping[str, TensorSpec]
    """By name without the prefix."""

    @property
    def nbytes(self) -> int:
        """Payload bytes of the layer, padding not counted."""
        return sum(spec.nbytes for spec in self.tensors.values())


@dataclass(frozen=True, slots=True)
class FileStamp:
    """Identity of a file when it was opened; a later difference in size or time of modification
    means that it changed. The time of change alone (``ctime_ns``) moves with its names, its owner
    and its permissions, too, and says nothing of its bytes."""

    path: Path
    size: int
    mtime_ns: int
    ctime_ns: int

    def change(self, size: int, mtime_ns: int) -> str | None:
        """What is different in a file of this size and time; None if it is the same."""
        if size != self.size:
            return f"expected {self.size} bytes, got {size}"
        return None if mtime_ns == self.mtime_ns else "its time of modification moved"


@dataclass(frozen=True, slots=True)
class Manifest:
    """Immutable map from layers to tensors to byte extents.

    It holds no bytes of tensors, and can be pickled and copied. Paths are absolute, links in them
    are left as they are, and ``files`` goes along: whatever opens them later finds out if one has
    changed since.
    """

    path: Path
    """What the caller named, a directory or a file, from the root on."""
    format: str
    """"safetensors", "gguf" or "tensor_info"."""
    layers: tuple[LayerSpec, ...]
    """In order, 0 to n - 1."""
    static: Mapping[str, TensorSpec]
    """Tensors outside the layers, by full name."""
    files: Mapping[Path, FileStamp]
    """Every file that holds bytes of a tensor, as its header was read."""
    metadata: Mapping[str, Any] = field(default_factory=lambda: FrozenMapping({}))
    """The checkpoint's own key-value data; GGUF arrays are lazy (gguf_values.GGUFArray)."""
    layer_pattern: str | None = None
    """Prefix of the layers' names, ``{i}`` for the index; None if tables were given."""

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @property
    def nbytes(self) -> int:
        """Payload bytes of all layers and static tensors."""
        static = sum(spec.nbytes for spec in self.static.values())
        return static + sum(layer.nbytes for layer in self.layers)

    def tensor(self, name: str) -> TensorSpec:
        """The tensor with this full name; CheckpointError if there is none."""
        if name in self.static:
            return self.static[name]
        for layer in self.layers:
            for spec in layer.tensors.values():
                if spec.name == name:
                    return spec
        raise CheckpointError(f"{self.path}: no tensor named {name!r}")


def checked_nbytes(shape: Sequence[int], bits_per_element: int, what: str) -> int:
    """Bytes of a tensor of this shape; CheckpointError on a negative or overflowing shape.

    ``what`` names the file and tensor for the message.
    """
    count = product = 1
    for dim in shape:
        if dim < 0:
            raise CheckpointError(f"{what}: negative dimension in shape {list(shape)}")
        count *= dim
        # Of the other dimensions when one is 0: torch computes strides from them all the same.
        product *= max(dim, 1)
        if product * bits_per_element > 8 * MAX_TENSOR_BYTES:
            raise CheckpointError(f"{what}: shape {list(shape)} overflows 64 bits")
    if count * bits_per_element % 8:
        raise CheckpointError(f"{what}: shape {list(shape)} does not fill whole bytes")
    return count * bits_per_element // 8


def check_extents(specs: Iterable[TensorSpec], size: int, path: Path) -> None:
    """CheckpointError if tensors of one file overlap or leave its ``size`` bytes."""
    end, previous = 0, ""
    # Empty tensors hold no bytes and overlap nothing, but must lie in the file, too.
    for spec in sorted(specs, key=lambda spec: (spec.offset, spec.nbytes)):
        if spec.offset < 0:
            raise CheckpointError(f"{path}: tensor {spec.name!r} begins at byte {spec.offset}")
        if spec.nbytes and spec.offset < end:
            raise CheckpointError(f"{path}: tensors {previous!r} and {spec.name!r} overlap")
        if spec.offset + spec.nbytes > size:
            raise CheckpointError(
                f"{path}: tensor {spec.name!r} ends at byte {spec.offset + spec.nbytes}, "
                f"the file has {size} ({TRUNCATED})"
            )
        if spec.nbytes:
            end, previous = spec.offset + spec.nbytes, spec.name


def stamp_file(path: Path) -> FileStamp:
    """Identity of ``path`` now; CheckpointError if it is missing or no regular file."""
    try:
        info = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    return FileStamp(path, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def manifest_from_tensor_info(  # noqa: PLR0913, PLR0917 - the published constructor's own tables
    model_dir: str | Path,
    tensor_info: Mapping[str, tuple[str, int, Sequence[int]]],
    shard_offsets: Mapping[str, int],
    block_keys: Sequence[str],
    block_sizes: Mapping[str, int],
    dtype: torch.dtype,
    num_layers: int,
) -> Manifest:
    """A manifest from the tables of the published constructor.

    ``tensor_info`` maps a tensor's name to (shard file name, byte offset in the shard's data
    section, shape); ``shard_offsets`` maps a shard to the byte offset of its data section;
    ``block_keys`` lists one layer's names without ``model.layers.{i}.``; ``block_sizes`` maps each
    to its element count. Errors: ConfigError for num_layers < 1 or block_keys without a size;
    CheckpointError for a tensor that is missing, mis-sized, or outside its file, and for a shard
    that is not below the directory.
    """
    directory = absolute(Path(model_dir))
    if num_layers < 1:
        raise ConfigError(f"num_layers={num_layers}: must be at least 1")
    unsized = [key for key in block_keys if key not in block_sizes]
    if unsized or not block_keys:
        raise ConfigError(f"block_sizes: no size for {unsized or 'any key (block_keys is empty)'}")
    stamps = {shard: _stamp_shard(directory, shard) for shard in shard_offsets}
    specs: dict[str, TensorSpec] = {}
    by_shard: dict[str, list[TensorSpec]] = {shard: [] for shard in stamps}
    for name, (shard, offset, shape) in tensor_info.items():
        if shard not in stamps:
            raise CheckpointError(f"{directory}: {name!r} is in {shard!r}, not in shard_offsets")
        nbytes = checked_nbytes(shape, 8 * dtype.itemsize, f"{directory / shard}: tensor {name!r}")
        start = shard_offsets[shard] + offset
        specs[name] = TensorSpec(name, dtype, tuple(shape), directory / shard, start, nbytes)
        by_shard[shard].append(specs[name])
    for shard, stamp in stamps.items():
        check_extents(by_shard[shard], stamp.size, stamp.path)
    layers = []
    for i in range(num_layers):
        layers.append(LayerSpec(i, _layer_from_keys(directory, specs, block_keys, block_sizes, i)))
    used = {spec.name for layer in layers for spec in layer.tensors.values()}
    return Manifest(
        path=directory,
        format="tensor_info",
        layers=tuple(layers),
        static=FrozenMapping({name: s for name, s in specs.items() if name not in used}),
        files=FrozenMapping({stamp.path: stamp for stamp in stamps.values()}),
    )


def _stamp_shard(directory: Path, shard: str) -> FileStamp:
    fault = file_fault(str(shard))
    if fault:
        raise CheckpointError(f"{directory}: shard {shown(shard)} {fault}")
    return stamp_file(directory / shard)


def _layer_from_keys(
    directory: Path,
    specs: Mapping[str, TensorSpec],
    block_keys: Sequence[str],
    block_sizes: Mapping[str, int],
    layer_idx: int,
) -> Mapping[str, TensorSpec]:
    tensors = {}
    for key in block_keys:
        name = f"model.layers.{layer_idx}.{key}"
        if name not in specs:
            raise CheckpointError(f"{directory}: layer {layer_idx}: tensor {name!r} is missing")
        elements = math.prod(specs[name].shape)
        if elements != block_sizes[key]:
            raise CheckpointError(
                f"{specs[name].path}: layer {layer_idx}: tensor {name!r}: expected "
                f"{block_sizes[key]} elements, got {elements} (shape {list(specs[name].shape)})"
            )
        tensors[key] = specs[name]
    return FrozenMapping(tensors)
