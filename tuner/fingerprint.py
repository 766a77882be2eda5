"""What results are valid for: the checkpoint, the machine, the versions, and what was measured."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.manifest import Manifest
from ..machine.identity import MachineIdentity
from .model import TABLES
from .trials.record import FunctionName, TrialSpec

CHECKPOINT = {"path", *TABLES} - {"dtype"}
"""Arguments that say where the checkpoint is and what is in it: its manifest stands for them."""


def describe_tune(spec: TrialSpec, manifest: Manifest, identity: MachineIdentity) -> dict[str, Any]:
    """All of it, as JSON. ``spec``: of any candidate; its settings do not count.

    What is not given is not there, so that results of before a new option still count.
    """
    from .. import __version__

    fixed = {name: value for name, value in spec.model.items() if name not in CHECKPOINT}
    if spec.engine is not None:
        fixed["engine"] = spec.engine
    if spec.on_copy is not None:
        fixed["on_copy"] = _describe_function(spec.on_copy)
    return {
        "checkpoint": _describe_checkpoint(manifest),
        "machine": asdict(identity),
        "versions": {
            "layer_streamer": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "setup": None if spec.setup_fn is None else _describe_function(spec.setup_fn),
        "measured": {
            **fixed,
            "tokens": spec.tokens if spec.setup_fn is None and spec.engine is None else None,
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


def _describe_function(name: FunctionName) -> dict[str, str]:
    """A user's function: with its whole module, as what it calls may stand beside it."""
    return {
        "module": name.module if name.module != "__main__" else name.file,
        "qualname": name.qualname,
        "source": hashlib.sha256(Path(name.file).read_bytes()).hexdigest()[:16],
    }
