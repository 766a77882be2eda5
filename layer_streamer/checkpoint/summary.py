"""What a checkpoint holds, for people: ``layer-streamer inspect``. Pure.

A table for the reader, and the same as one JSON document.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import groupby

from ..errors import printable
from .manifest import LayerSpec, Manifest, TensorSpec


def describe(manifest: Manifest) -> str:
    """A table: layers (equal neighbours in one row), then the tensors outside of them."""
    files = len(manifest.files)
    lines = [
        f"{printable(str(manifest.path))}: {manifest.format}, {manifest.num_layers} layers, "
        f"{manifest.nbytes / 1e9:.3f} GB in {files} file{'s' if files > 1 else ''}",
        f"  {'layers':<12} {'MB each':>10}  tensors",
    ]
    for _, equal in groupby(manifest.layers, key=_signature):
        layers = list(equal)
        first, last = layers[0], layers[-1]
        name = f"{first.layer_idx}-{last.layer_idx}" if len(layers) > 1 else f"{first.layer_idx}"
        kinds = Counter(kind(spec) for spec in first.tensors.values())
        listed = ", ".join(f"{count} {label}" for label, count in kinds.items())
        lines.append(f"  {name:<12} {first.nbytes / 1e6:>10.2f}  {listed}")
    lines.append(f"  {'outside':<12} {'MB':>10}  type and shape")
    for name, spec in manifest.static.items():
        shape = "x".join(map(str, spec.shape)) or "scalar"
        what = f"{kind(spec)} {shape}  {printable(name)}"
        lines.append(f"  {'':<12} {spec.nbytes / 1e6:>10.2f}  {what}")
    return "\n".join(lines)


def document(manifest: Manifest) -> str:
    """One line of JSON: format, bytes, and every tensor's type, shape and extent."""
    return json.dumps(
        {
            "path": str(manifest.path),
            "format": manifest.format,
            "num_layers": manifest.num_layers,
            "nbytes": manifest.nbytes,
            "files": {str(path): stamp.size for path, stamp in manifest.files.items()},
            "layers": [
                {key: _entry(spec) for key, spec in layer.tensors.items()}
                for layer in manifest.layers
            ],
            "static": {name: _entry(spec) for name, spec in manifest.static.items()},
        },
        separators=(",", ":"),
    )


def kind(spec: TensorSpec) -> str:
    """How a tensor is stored: its GGML type, or its dtype."""
    return spec.ggml_type or str(spec.dtype).removeprefix("torch.")


def _signature(layer: LayerSpec) -> frozenset[tuple[str, str, tuple[int, ...]]]:
    return frozenset((key, kind(spec), spec.shape) for key, spec in layer.tensors.items())


def _entry(spec: TensorSpec) -> dict[str, object]:
    return {
        "type": kind(spec),
        "shape": spec.shape,
        "file": str(spec.path),
        "offset": spec.offset,
        "nbytes": spec.nbytes,
    }
