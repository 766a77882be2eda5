"""How many weights of a row share a scale, and the config that tells other engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..models.config import ModelConfig

GROUPS = (128, 64, 32)
"""Sizes that kernels of other engines know, the smallest file first."""


def choose_groups(config: ModelConfig, asked: int | None) -> dict[str, int]:
    """The group of every matrix of a layer, by its name in transformers; None: the largest that
    divides its width. ValueError if it does not divide one, or for a mixture of experts."""
    from ..models.names import weight_shapes  # and with it torch

    if config.experts is not None:
        raise ValueError(
            f"a {config.model_type} model is a mixture of experts, which is run but not quantized: "
            "take a checkpoint that others have quantized"
        )
    widths = {name: shape[1] for name, shape in weight_shapes(config, 0).items() if len(shape) == 2}
    chosen = {}
    for module, width in widths.items():
        fits = [group for group in GROUPS if width % group == 0]
        if not fits:
            sizes = ", ".join(map(str, GROUPS))
            raise ValueError(f"{module} has width {width}, which none of {sizes} divides")
        if asked is not None and asked not in fits:
            every = [g for g in GROUPS if all(w % g == 0 for w in widths.values())]
            better = f"--group {every[0]} divides all widths" if every else f"{fits[0]} does"
            raise ValueError(
                f"--group {asked}: does not divide the width of {module}, {width}; {better}, and "
                "auto takes the largest for each"
            )
        chosen[module] = asked if asked is not None else fits[0]
    return chosen


def quantization_config(groups: Mapping[str, int], bits: int) -> dict[str, Any]:
    """What config.json says, in the schema of compressed-tensors.

    Modules with one group size are one entry of ``config_groups``. If there are several, each names
    its modules by the ends of their names: all layers have the same shapes.
    """
    sizes = sorted(set(groups.values()), reverse=True)
    entries = {}
    for number, size in enumerate(sizes):
        modules = [module for module, group in groups.items() if group == size]
        targets = ["Linear"]
        if len(sizes) > 1:
            targets = [f"re:.*{module.replace('.', '[.]')}$" for module in modules]
        entries[f"group_{number}"] = {
            "targets": targets,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": entries,
    }
