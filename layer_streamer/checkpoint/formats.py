"""Checkpoint files: which format a path holds, and its manifest from the headers alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import ConfigError
from .gguf import GGUFArray, read_gguf
from .layers import group_layers
from .locate import locate, refuse_adapter
from .manifest import FrozenMapping, Manifest
from .names import absolute
from .safetensors import read_indexed, read_safetensors

__all__ = ["GGUFArray", "read_manifest"]


def read_manifest(path: str | Path, layer_pattern: str | None = None) -> Manifest:
    """The manifest of a checkpoint: a safetensors directory, index or file, or a GGUF file.

    Of a split GGUF any part may be named, and all are opened. In a directory safetensors files win
    over GGUF; one GGUF model alone is opened. Where files of a directory contradict one another,
    what transformers would load is taken, and a warning logged. ``layer_pattern`` is the layers'
    prefix with ``{i}`` for the index; None tries the usual ones. Reads headers only: no tensor's
    bytes, no mapping. All paths in the manifest are absolute.

    Errors: CheckpointError that names the file and its fault, for everything that is missing,
    malformed, or beyond the limits in ``checkpoint.header``, and for what is no checkpoint (a Git
    LFS pointer, an adapter, a pipeline), with what to do; ConfigError for a bad layer_pattern.
    """
    whole = read_tensors(path)
    layers, static, found = group_layers(whole.static, whole.path, layer_pattern)
    return replace(whole, layers=layers, static=FrozenMapping(static), layer_pattern=found)


def read_tensors(path: str | Path) -> Manifest:
    """As :func:`read_manifest`, without layers: all tensors are ``static``."""
    root = absolute(Path(path))
    source = locate(root)
    is_gguf = source.kind == "gguf"
    if is_gguf:
        contents = read_gguf(source.paths[0])
    elif source.kind == "index":
        contents = read_indexed(source.paths[0])
    else:
        contents = read_safetensors(source.paths)
    refuse_adapter(root, contents)
    return Manifest(
        path=root,
        format="gguf" if is_gguf else "safetensors",
        layers=(),
        static=FrozenMapping(contents.tensors),
        files=contents.files,
        metadata=contents.metadata,
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
