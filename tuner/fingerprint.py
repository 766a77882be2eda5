"""What results are valid for: the checkpoint, the machine, the versions, and what was measured."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.manifest import Manifest
from .trials.record import FunctionName, TrialSpec


def describe_tune(
    spec: TrialSpec,
    manifest: Manifest,
    identity: Mapping[str, Any],
    setup_fn: Callable[..., Any] | None,
) -> dict[str, Any]:
    """All of it, as JSON. ``spec``: of any candidate; its settings do not count."""
    from .. import __version__

    fixed = {name: spec.model[name] for name in ("device", "dtype") if name in spec.model}
    return {
        "checkpoint": _describe_checkpoint(manifest),
        "machine": dict(identity),
        "versions": {
            "layer_streamer": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "setup": _describe_setup(spec.setup_fn, setup_fn),
        "measured": {
            **fixed,
            "tokens": spec.tokens if setup_fn is None else None,
            "n_runs": spec.n_runs,
            "sleep_seconds": spec.sleep_seconds,
            "cache": spec.cache,
        },
    }


def digest(description: Mapping[str, Any]) -> str:
    """The fingerprint: 16 hexadecimal digits."""
    text = json.dumps(description, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _describe_checkpoint(manifest: Manifest) -> dict[str, Any]:
    header = hashlib.sha256()
    for layer in manifest.layers:
        for key, tensor in layer.tensors.items():
            where = (tensor.path.name, tensor.offset, tensor.nbytes)
            header.update(repr((key, str(tensor.dtype), tensor.shape, where)).encode())
    stamps = manifest.files.values()
    return {
        "files": [[str(Path(s.path).resolve()), s.size, s.mtime_ns] for s in stamps],
        "num_layers": manifest.num_layers,
        "header": header.hexdigest()[:16],
    }


def _describe_setup(
    name: FunctionName | None, setup_fn: Callable[..., Any] | None
) -> dict[str, str] | None:
    if name is None or setup_fn is None:
        return None
    try:
        source = inspect.getsource(setup_fn)
    except (OSError, TypeError):
        # Not written in Python, or not where it says: then its file stands for it.
        source = Path(name.file).read_bytes().hex() if Path(name.file).is_file() else ""
    return {
        "module": name.module if name.module != "__main__" else name.file,
        "qualname": name.qualname,
        "source": hashlib.sha256(source.encode()).hexdigest()[:16],
    }
