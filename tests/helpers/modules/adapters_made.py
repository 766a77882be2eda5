"""Random adapters as peft writes them, beside tiny models, and what peft computes with them."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def adapted(model: Any, folder: Path, targets: list[str] | None = None, **options: Any) -> Any:
    """A copy of the model with a random adapter, which is saved in the folder."""
    torch.manual_seed(11)
    asked = {"r": 3, "lora_alpha": 7, "init_lora_weights": False, **options}
    config = peft.LoraConfig(target_modules=ALL if targets is None else targets, **asked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(copy.deepcopy(model), config).eval()
        made.save_pretrained(folder, save_embedding_layers=False)
    return made.base_model.model


def edit_adapter(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite its tensors after ``edit(tensors)`` has changed them."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder: Path, **fields: Any) -> None:
    """Rewrite its config with these fields."""
    found = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(found | fields))
