"""What each parameter of a module is made of: names of a checkpoint against names of a module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...checkpoint.manifest import FrozenMapping, Manifest, TensorSpec
from ...errors import ConfigError
from .hub_names import draft_hub_names, ignored
from .places import Place, places_of
from .plain_names import draft_plain_names, ignored_names
from .recipe import Recipe


@dataclass(frozen=True, slots=True)
class Names:
    """What a module's parameters and persistent buffers are made of."""

    recipes: Mapping[str, Recipe]
    """By full dotted name, in the module's order: all that have a source of their own."""
    tied: Mapping[str, str]
    """Names without a source of their own, and the one in ``recipes`` that they share."""
    unused: tuple[str, ...]
    """Tensors of the checkpoint without a place in the module, in the checkpoint's order; without
    those that the module's class says are of no use."""
    missing: tuple[str, ...]
    """Parameters and persistent buffers that have no source, are not tied to one that has, and
    that the module's class does not make itself, in the module's order."""
    made: tuple[str, ...] = ()
    """The same that the module's class does make itself (``_keys_to_ignore_on_load_missing``)."""


def name_tensors(
    model: nn.Module, manifest: Manifest, *, key_mapping: Mapping[str, str] | None = None
) -> Names:
    """Finds what each parameter and persistent buffer of ``model`` is made of.

    ``model`` is on the meta device, with the dtypes that it shall run in; nothing of it is
    changed. For a transformers model its own conversion mapping and tie rules count; for any other
    module names are equal, and where it is one of diffusers' its class's exceptions count, too.
    ``key_mapping`` maps regular expressions to what replaces them in the
    checkpoint's names, in order, once each, before anything else; ``\\1`` is what the group
    matched.

    Reads nothing. Errors: CheckpointError for a tensor whose shape or dtype does not fit its
    parameter, with both names, what was expected and what is there; ConfigError for a
    ``key_mapping`` that is no regular expression. What is missing or unused is no error here.
    """
    key_mapping = _checked(key_mapping or {})
    places = places_of(model)
    specs = {spec.name: spec for spec in _tensors(manifest)}
    hub = is_hub_model(model)
    if hub:
        draft = draft_hub_names(model, places, specs, key_mapping)
    else:
        draft = draft_plain_names(model, places, specs, key_mapping)
    tied = _ties(model if hub else None, places, draft.recipes)
    missing = {name for name in places if name not in draft.recipes and name not in tied}
    names = {*draft.unplaced.values()}
    made, useless = ignored(model, missing, names) if hub else (set(), ignored_names(model, names))
    return Names(
        FrozenMapping({name: draft.recipes[name] for name in places if name in draft.recipes}),
        FrozenMapping(tied),
        tuple(n for n in specs if n in draft.unplaced and draft.unplaced[n] not in useless),
        tuple(name for name in places if name in missing - made),
        tuple(name for name in places if name in made),
    )


def is_hub_model(model: nn.Module) -> bool:
    """Whether its class is one of transformers', found without importing that."""
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.")
        for base in type(model).__mro__
    )


def _checked(key_mapping: Mapping[str, str]) -> Mapping[str, str]:
    for pattern in key_mapping:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"key_mapping: {pattern!r} is no regular expression: {error}"
            ) from None
    return key_mapping


def _tensors(manifest: Manifest) -> Iterable[TensorSpec]:
    yield from manifest.static.values()
    for layer in manifest.layers:
        yield from layer.tensors.values()


def _ties(model: Any, places: Mapping[str, Place], recipes: Mapping[str, Recipe]) -> dict[str, str]:
    """Names without a source, and the name with one that they share.

    Of names that are tied any may be the one that the checkpoint has; where it has several, each
    has its own, as in transformers (which ties them if they are equal).
    """
    pairs = dict(model.get_expanded_tied_weights_keys(all_submodels=True)) if model else {}
    groups: dict[str, set[str]] = {name: {name} for name in places}
    by_identity: dict[int, str] = {}
    same = [(name, by_identity.setdefault(p.identity, name)) for name, p in places.items()]
    for one, other in [*pairs.items(), *same]:
        if one in groups and other in groups and groups[one] is not groups[other]:
            groups[one] |= groups[other]
            for name in groups[other]:
                groups[name] = groups[one]
    tied = {}
    for name in places:
        if name in recipes or len(groups[name]) == 1:
            continue
        sources = [other for other in places if other in groups[name] and other in recipes]
        if sources:
            named = pairs.get(name)
            tied[name] = named if named in sources else sources[0]
    return tied
