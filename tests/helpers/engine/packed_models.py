"""Tiny checkpoints whose matrices are packed, and the models that they then hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from packings import PACKINGS, Packing
from safetensors.torch import save_file

Choice = Callable[[str], Packing | None]
"""How a module is packed, by its name; None: it is not."""


def in_layers(packing: Packing) -> Choice:
    """All matrices of all layers but routers and gates of one row, and nothing else."""
    routers = (".gate", "shared_expert_gate")
    return lambda module: packing if ".layers." in module and not module.endswith(routers) else None


def hub_parameters(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Each under its name on the hub, where experts have three matrices each: views, of which a
    model has those of all experts in one tensor."""
    mixtral = model.config.model_type == "mixtral"
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for name, parameter in model.named_parameters():
        stem, _, kind = name.rpartition(".")
        stem = stem.replace(".mlp", ".block_sparse_moe") if mixtral else stem
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            yield f"{stem}.{kind}", parameter.data
            continue
        for expert, matrix in enumerate(parameter.data):
            parts = matrix.chunk(2) if kind == "gate_up_proj" else [matrix]
            own = names[:2] if kind == "gate_up_proj" else names[2:]
            for part_name, part in zip(own, parts, strict=True):
                yield f"{stem}.{expert}.{part_name}.weight", part


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
    for name, parameter in hub_parameters(model):
        module = name.removesuffix(".weight")
        packing = choose(module) if parameter.ndim == 2 else None
        if packing is None:
            tensors[name] = parameter.to(dtype).contiguous()
            parameter.copy_(tensors[name])
            continue
        parts = packing.pack(parameter.contiguous(), generator)
        tensors |= {f"{module}.{kind}": part.contiguous() for kind, part in parts.items()}
        parameter.copy_(packing.unpack(parts))
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    fields = model.config.to_dict() | {"quantization_config": config}
    (path / "config.json").write_text(json.dumps(fields, default=str))
    return path
