"""Names of modules that are not transformers': equal to the checkpoint's, but for what is asked.

diffusers' models are such modules. What their classes say of exceptions is looked up on the class
by name, so that nothing of diffusers is imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from ...checkpoint.manifest import TensorSpec
from .places import Draft, Place, whole


def draft_plain_names(
    model: Any,
    places: Mapping[str, Place],
    specs: Mapping[str, TensorSpec],
    key_mapping: Mapping[str, str],
) -> Draft:
    """Recipes of a module on the meta device, tensors without a place.

    Arguments and errors are those of :func:`.hub_names.draft_hub_names`.
    """
    renamed: dict[str, str] = {}
    for source in specs:
        name = source
        for pattern, replacement in key_mapping.items():
            name = re.sub(pattern, replacement, name, count=1)
        renamed.setdefault(name, source)
    draft = Draft()
    taken = {*renamed.values()}
    draft.unplaced |= {name: name for name in specs if name not in taken}
    if hasattr(model, "_fix_state_dict_keys_on_load"):
        # It moves values from old names of attention blocks to new ones.
        model._fix_state_dict_keys_on_load(renamed)
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    for name, source in renamed.items():
        if name not in places:
            draft.unplaced[source] = name
            continue
        place = places[name]
        keep = place.dtype.is_floating_point and not kept.isdisjoint(name.split("."))
        dtype = torch.float32 if keep else place.dtype
        draft.recipes[name] = whole(name, place, specs[source], dtype)
    return draft


def ignored_names(model: Any, names: set[str]) -> set[str]:
    """Of names without a place, those that the module's class says are no fault."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}
