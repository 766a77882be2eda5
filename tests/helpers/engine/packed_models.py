"""Tiny checkpoints whose matrices are packed, and the models that they then hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from packings import PACKINGS, Packing
from safetensors.torch import save_file

Choice = Callable[[str], Packing | None]
"""How a module is packed, by its name; None: it is not."""


def in_layers(packing: Packing) -> Choice:
    """All matrices of all layers, and nothing else."""
    return lambda module: packing if ".layers." in module else None


def write_packed(
    path: Path,
    model: Any,
    choose: str | Choice,
    config: dict[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write the model with its matrices packed, and put what the oracles find in them into it.

    ``choose`` is a choice, or the name of a packing for all matrices of layers. ``dtype`` is that
    of what is not packed.
    """
    if isinstance(choose, str):
        config = config or PACKINGS[choose].config
        choose = in_layers(PACKINGS[choose])
    generator, tensors = torch.Generator().manual_seed(3), {}
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        packing = choose(module) if parameter.ndim == 2 else None
        if packing is None:
            tensors[name] = parameter.detach().to(dtype)
            parameter.data.copy_(tensors[name])
            continue
        parts = packing.pack(parameter.detach(), generator)
        tensors |= {f"{module}.{kind}": part.contiguous() for kind, part in parts.items()}
        parameter.data.copy_(packing.unpack(parts))
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    fields = model.config.to_dict() | {"quantization_config": config}
    (path / "config.json").write_text(json.dumps(fields, default=str))
    return path
