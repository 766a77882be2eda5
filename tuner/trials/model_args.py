"""The streamer's model arguments as JSON values and back."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError

PATHS = ("path", "model_dir")
"""Arguments that name files: a child may have another current directory."""


def encode_model(arguments: Mapping[str, Any]) -> dict[str, object]:
    """Keyword arguments of LayerStreamer or (with "path") from_checkpoint, for a TrialSpec.

    ConfigError for one that is no number, string, path, dtype, device, or list or dict of these.
    """
    encoded = {name: _encode(name, value) for name, value in arguments.items()}
    for name in PATHS:
        if name in encoded:
            encoded[name] = str(Path(str(encoded[name])).absolute())
    return encoded


def decode_model(arguments: Mapping[str, object]) -> dict[str, Any]:
    """What :func:`encode_model` was given, with lists for sequences."""
    decoded = dict(arguments)
    if isinstance(decoded.get("dtype"), str):
        decoded["dtype"] = getattr(torch, str(decoded["dtype"]))
    return decoded


def _encode(name: str, value: object) -> object:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Path | torch.device):
        return str(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {str(key): _encode(name, item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_encode(name, item) for item in value]
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        kind = type(value).__name__
        raise ConfigError(f"{name}: a {kind} cannot be handed to a trial's process") from None
