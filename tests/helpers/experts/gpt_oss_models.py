"""Checkpoints of gpt-oss as they are published: experts in MXFP4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from assets import tiny_checkpoint
from safetensors.torch import load_file, save_file

GROUP = 32
LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""What the codes stand for."""


def to_blocks(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of floats (..., width): blocks (..., groups, 16), scales (..., groups), and the floats that
    they stand for."""
    groups = rows.unflatten(-1, (-1, GROUP))
    exponents = groups.abs().amax(-1).clamp_min(1e-30).log2().floor() - 2
    scaled = groups / exponents.exp2()[..., None]
    codes = (scaled[..., None] - LEVELS).abs().argmin(-1)
    floats = (LEVELS[codes] * exponents.exp2()[..., None]).flatten(-2)
    pairs = codes.unflatten(-1, (-1, 2)).to(torch.uint8)
    return pairs[..., 0] | pairs[..., 1] << 4, (exponents + 127).to(torch.uint8), floats


def write_blocks(path: Path, model: Any) -> Path:
    """Save the model with its experts in blocks, and give it the floats that they stand for."""
    tensors: dict[str, torch.Tensor] = {}
    tiny_checkpoint(path, model)
    parameters = dict(model.named_parameters())
    for name, tensor in load_file(path / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales, floats = to_blocks(tensor.transpose(1, 2).contiguous())
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            parameters[name].data.copy_(floats.transpose(1, 2))
        else:
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    fields = json.loads((path / "config.json").read_text())
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    fields["quantization_config"] = {
        "quant_method": "mxfp4", "modules_to_not_convert": skipped
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(fields))
    return path
