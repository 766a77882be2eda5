"""How many weights of a row share a scale, and the config that tells other engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..models.modules import EXPERTS, ROUTER, SHARED_GATE, shared_key

if TYPE_CHECKING:
    from ..models.config import ModelConfig

GROUPS = (128, 64, 32)
"""Sizes that kernels of other engines know, the smallest file first. Each is a multiple of those
after it."""
FLOATS = (ROUTER, SHARED_GATE)
"""Matrices that stay floats: they are small, and an error in them is another choice of experts."""


def choose_groups(config: ModelConfig, asked: int | None) -> dict[str, int]:
    """The group of every kind of matrix of the layers, by its name in the engine without an
    expert's number; None: the largest that divides its width.

    All matrices of experts have one group: transformers and vLLM know no other mixtures. ValueError
    if a group does not divide a width, or for a model that is not quantized here.
    """
    experts = config.experts
    if experts is not None and experts.clamp is not None:
        raise ValueError(
            f"a {config.model_type} model is not quantized: it is published in four bits (MXFP4), "
            "and is run as it is"
        )
    chosen, widths = {}, matrix_widths(config)
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
    mixed = [module for module in chosen if module.startswith(EXPERTS)]
    return chosen | dict.fromkeys(mixed, min((chosen[m] for m in mixed), default=0))


def matrix_widths(config: ModelConfig) -> dict[str, int]:
    """The width of every kind of matrix that is quantized, of layers of all kinds."""
    from ..models.names import weight_shapes  # and with it torch

    return {
        shared_key(module): shape[1]
        for layer_idx in range(config.num_layers)
        for module, shape in weight_shapes(config, layer_idx).items()
        if len(shape) == 2 and module not in FLOATS
    }


def kinds_of_floats(config: ModelConfig) -> list[str]:
    """The kinds of matrices of layers that stay floats, by their names on the hub."""
    from ..models.names import weight_shapes

    shapes = (weight_shapes(config, layer_idx) for layer_idx in range(config.num_layers))
    found = dict.fromkeys(module for own in shapes for module in own if module in FLOATS)
    return [config.family.hub_name(module) for module in found]


def quantization_config(
    groups: Mapping[str, int], bits: int, floats: Sequence[str] = ()
) -> dict[str, Any]:
    """What config.json says, in the schema of compressed-tensors. ``floats``: kinds of
    matrices of layers that are not quantized.

    Modules with one group size are one entry of ``config_groups``. If there are several, each names
    its modules by the ends of their names: layers of a kind have the same shapes.
    """
    sizes = sorted(set(groups.values()), reverse=True)
    entries = {}
    for number, size in enumerate(sizes):
        modules = [module for module, group in groups.items() if group == size]
        targets = ["Linear"]
        if len(sizes) > 1:
            targets = [*dict.fromkeys(map(_target, modules))]
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
        "ignore": ["lm_head", *map(_target, floats)],
        "config_groups": entries,
    }


def _target(module: str) -> str:
    """An expression for a kind of modules. Experts are one, of which no matrix is named: vLLM asks
    for Mixtral's by other names than those on the hub."""
    if module.startswith(EXPERTS):
        return "re:.*[.]experts[.][0-9]+[.].*"
    return f"re:.*{module.replace('.', '[.]')}$"
