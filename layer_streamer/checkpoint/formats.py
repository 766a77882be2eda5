"""Checkpoint files: which format a path holds, and its manifest from the headers alone."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError, ConfigError
from .gguf import GGUFArray, read_gguf, split_name
from .header import MAX_HEADER_BYTES, list_directory, open_header
from .layers import group_layers
from .manifest import FrozenMapping, Manifest
from .safetensors import read_safetensors
from .shards import INDEX_SUFFIX

__all__ = ["GGUFArray", "read_manifest"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def read_manifest(path: str | Path, layer_pattern: str | None = None) -> Manifest:
    """The manifest of a checkpoint: a safetensors directory, index or file, or a GGUF file.

    Of a split GGUF any part may be named, and all are opened. In a directory safetensors files win
    over GGUF; one GGUF model alone is opened. ``layer_pattern`` is the layers' prefix with ``{i}``
    for the index; None tries the usual ones. Reads headers only: no tensor's bytes, no mapping.

    Errors: CheckpointError that names the file and its fault, for everything that is missing,
    malformed, or beyond the limits in ``formats.header``; ConfigError for a bad layer_pattern.
    """
    root = Path(path)
    source, is_gguf = _locate(root)
    contents = read_gguf(source) if is_gguf else read_safetensors(source)
    layers, static, found = group_layers(contents.tensors, root, layer_pattern)
    return Manifest(
        path=root,
        format="gguf" if is_gguf else "safetensors",
        layers=layers,
        static=FrozenMapping(static),
        files=contents.files,
        metadata=contents.metadata,
        layer_pattern=found,
    )


def as_manifest(model: str | Path | Manifest, layer_pattern: str | None) -> Manifest:
    """``model`` if it is a manifest, else that of the checkpoint there. Errors of read_manifest;
    ConfigError for a layer_pattern beside a manifest, whose layers have been found."""
    if not isinstance(model, Manifest):
        return read_manifest(model, layer_pattern)
    if layer_pattern is not None:
        raise ConfigError(
            f"layer_pattern={layer_pattern!r}: not beside a Manifest, which has its layers; "
            "read_manifest takes it"
        )
    return model


def _locate(path: Path) -> tuple[Path, bool]:
    """What to open for ``path``, and whether it is GGUF."""
    try:
        is_directory = path.is_dir()
        path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if is_directory:
        return _locate_in(path)
    if path.name.endswith(INDEX_SUFFIX):
        return path, False
    with open_header(path) as file:
        head = file.read(0, min(9, file.size))
    if head.startswith(b"GGUF") or path.suffix == ".gguf":
        return path, True
    # A cache may keep a file under a name without suffix: a length and '{' are sign enough.
    plausible = int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES and head[8:] == b"{"
    if path.suffix == ".safetensors" or plausible:
        return path, False
    raise CheckpointError(f"{path}: neither a safetensors nor a GGUF file{_hint([path.name])}")


def _locate_in(directory: Path) -> tuple[Path, bool]:
    names = list_directory(directory)
    if any(name.endswith((".safetensors", INDEX_SUFFIX)) for name in names):
        return directory, False
    models: dict[tuple[str, int], str] = {}  # the parts of one split model count once
    for name in names:
        if name.endswith(".gguf"):
            models.setdefault(split_name(name)[::2], name)
    if len(models) == 1:
        return directory / next(iter(models.values())), True
    if models:
        listed = ", ".join(list(models.values())[:4])
        raise CheckpointError(f"{directory}: several GGUF models ({listed}); name one of them")
    raise CheckpointError(f"{directory}: no .safetensors or .gguf file in it{_hint(names)}")


def _hint(names: list[str]) -> str:
    if any(name.endswith(_PICKLES) for name in names):
        return " (pickled PyTorch weights are not read; convert them to safetensors)"
    return ""
