"""A model of diffusers without its weights: a transformer of a pipeline, from its own folder.

diffusers and accelerate are imported when such a model is asked for, and not before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.json_file import read_json
from ..checkpoint.manifest import TensorSpec
from ..errors import ConfigError, printable
from ..planning.layout import CASTABLE
from .holders import tensors_of

WEIGHTS = "diffusion_pytorch_model"
"""What the files of a model are named, suffix aside."""


def is_diffuser(folder: Path) -> bool:
    """True if config.json is one of diffusers' models."""
    return "_class_name" in read_json(folder / "config.json")


def weights_of(folder: Path) -> Path:
    """What diffusers would load of a folder, which may hold variants beside it; else the folder."""
    whole, index = folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.safetensors.index.json"
    return next((path for path in (whole, index) if path.is_file()), folder)


def config_of_file(file: Path, options: Mapping[str, Any]) -> Path:
    """The folder with the configuration of a model in a single file: ``config`` of the model's
    options, as in diffusers' ``from_single_file``. ConfigError if it is not named, or none."""
    folder = Path(options.get("config") or "").expanduser()
    if not options.get("config") or not (folder / "config.json").is_file():
        raise ConfigError(
            f"{file}: a single file says nothing of its model: name a folder with its config.json "
            'by model_options={"config": folder}'
        )
    return folder


def build_diffuser(
    cls: Any, folder: Path, specs: Mapping[str, TensorSpec], dtype: torch.dtype | None
) -> nn.Module:
    """The model of ``folder`` with its parameters on meta and its buffers real; nothing is read.

    ``cls``: None is the class that config.json names. ``dtype``: None is that of the checkpoint's
    first floating-point tensor. ConfigError for a class that diffusers does not have.
    """
    import diffusers
    from accelerate import init_empty_weights

    if cls is None:
        name = str(read_json(folder / "config.json")["_class_name"])
        cls = getattr(diffusers, name, None)
        if cls is None:
            raise ConfigError(
                f"{folder}/config.json: diffusers {diffusers.__version__} has no class "
                f"{printable(name)!r}: say which class by cls=, or update diffusers"
            )
    floats = (spec.dtype for spec in specs.values() if spec.dtype in CASTABLE)
    with init_empty_weights(include_buffers=False):
        model = cls.from_config(cls.load_config(folder))
    dtype = dtype or next(floats, torch.float32)
    for module in model.modules():
        # What no checkpoint has (rotations) stays as it was made, as in diffusers' own loader.
        for _, tensor in tensors_of(module):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
    found: nn.Module = model.eval().requires_grad_(False)
    return found
