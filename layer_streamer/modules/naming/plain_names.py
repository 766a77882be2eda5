"""Names of modules that are not transformers': equal to the checkpoint's, but for what is asked.

diffusers' models are such modules. What their classes say of exceptions is looked up on the class
by name, so that nothing of diffusers is imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...checkpoint.manifest import TensorSpec
from .gguf_blocks import is_packed, unpacked
from .original_names import rename_original
from .places import Draft, Place, cast, expect_shape
from .recipe import Recipe


def draft_plain_names(
    model: Any,
    places: Mapping[str, Place],
    specs: Mapping[str, TensorSpec],
    key_mapping: Mapping[str, str],
) -> Draft:
    """Recipes of a module on the meta device, tensors without a place.

    Arguments and errors are those of :func:`.hub_names.draft_hub_names`.
    """
    found: dict[str, Recipe] = {}
    for source, spec in specs.items():
        name = source
        for pattern, replacement in key_mapping.items():
            name = re.sub(pattern, replacement, name, count=1)
        found.setdefault(name, Recipe(name, (spec,), spec.dtype, spec.shape))
    draft = Draft()
    taken = {recipe.pieces[0].name for recipe in found.values()}
    draft.unplaced |= {name: name for name in specs if name not in taken}
    if hasattr(model, "_fix_state_dict_keys_on_load"):
        # It moves values from old names of attention blocks to new ones.
        model._fix_state_dict_keys_on_load(found)
    if not key_mapping:
        found = rename_original(model, places, {n: r.pieces[0] for n, r in found.items()}) or found
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    for name, recipe in found.items():
        if name not in places:
            draft.unplaced[recipe.pieces[0].name] = name
            continue
        place = places[name]
        keep = place.dtype.is_floating_point and not kept.isdisjoint(name.split("."))
        dtype = torch.float32 if keep else place.dtype
        draft.recipes[name] = _fitted(replace(recipe, name=name), place, dtype)
    return draft


def _fitted(recipe: Recipe, place: Place, dtype: torch.dtype) -> Recipe:
    """The recipe of a parameter that is made of stretches of bytes: cast, or unpacked."""
    spec = recipe.pieces[0]
    if is_packed(spec):
        return unpacked(recipe, place, dtype)
    expect_shape(recipe.name, place.shape, spec, recipe.shape)
    return cast(recipe, dtype, spec)


def ignored_names(model: Any, names: set[str]) -> set[str]:
    """Of names without a place, those that the module's class says are no fault."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}
