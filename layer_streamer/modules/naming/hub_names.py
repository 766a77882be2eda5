"""Which parameter of a transformers model a tensor of a checkpoint belongs to.

Names and operations are transformers' own (its conversion mapping, its loader's rules); what they
come to is found by :mod:`.trace`. transformers is imported when the first such model is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...checkpoint.manifest import TensorSpec
from ...errors import CheckpointError
from .places import Draft, Place, cast, expect_shape, shown_shape, whole
from .recipe import Conversion, Recipe, recipe_of_inputs
from .trace import Run, Trace, piece_of

SMALL_PIECE = 2**16
"""A tensor in many pieces is made, not read in order, where they are smaller than this on average:
each would be a read of its own."""


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """What transformers' operations ask a model for. Not the model itself: its names change when
    adapters wrap its layers, and conversions are asked for after that."""

    config: Any
    places: Mapping[str, Place]
    modules: Mapping[str, nn.Module]
    """For a quantizer's operations; none without one."""
    hf_quantizer: Any

    def get_parameter(self, name: str) -> torch.Tensor:
        """A meta tensor like the parameter. AttributeError if there is none, as in torch."""
        if name not in self.places:
            raise AttributeError(name)
        place = self.places[name]
        return torch.empty(place.shape, dtype=place.dtype, device="meta")

    def get_submodule(self, name: str) -> nn.Module:
        """The module that had this name."""
        return self.modules[name]


@dataclass(slots=True)
class _Group:
    """The tensors of a checkpoint that one converter of transformers takes together."""

    name: str
    """Parameter, the first one where several are made."""
    converter: Any
    sources: list[TensorSpec] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    casts: list[torch.dtype | None] = field(default_factory=list)

    def add(self, spec: TensorSpec, pattern: str, cast: torch.dtype | None) -> None:
        self.sources.append(spec)
        self.patterns.append(pattern)
        self.casts.append(cast)

    def convert(self, tensors: Sequence[torch.Tensor], model: _Skeleton) -> dict[str, torch.Tensor]:
        """What transformers makes of them, by full parameter name."""
        # What an interrupt left of an earlier time.
        self.converter.collected_tensors.clear()
        for spec, pattern, tensor in zip(self.sources, self.patterns, tensors, strict=True):
            self.converter.add_tensor(self.name, spec.name, pattern, tensor)
        made = self.converter.convert(
            self.name,
            model=model,
            config=model.config,
            hf_quantizer=model.hf_quantizer,
        )
        return {name: v[0] if isinstance(v, list) else v for name, v in made.items()}

    @property
    def operations(self) -> str:
        """What they are called in plans and errors: Transpose(dim=1), Chunk(dim=0)."""
        return ", ".join(repr(operation) for operation in self.converter.operations)


def draft_hub_names(
    model: Any,
    places: Mapping[str, Place],
    specs: Mapping[str, TensorSpec],
    key_mapping: Mapping[str, str],
) -> Draft:
    """Recipes of a transformers model on the meta device, tensors without a place.

    ``specs`` are a checkpoint's tensors by name, ``key_mapping`` comes before transformers' own,
    as in ``from_pretrained``. Errors: CheckpointError as :func:`.names.name_tensors`.
    """
    from transformers.core_model_loading import dot_natural_key

    rename = _renamer(model, places, key_mapping)
    dtype_of = _dtype_rule(model, places)
    draft = Draft()
    groups: dict[str, _Group] = {}
    # In this order experts are stacked, and renamings that have a state look at names.
    for spec in sorted(specs.values(), key=lambda spec: dot_natural_key(spec.name)):
        name, pattern, converter = rename(spec.name)
        taken = name in draft.recipes or (converter is None and name in groups)
        if name not in places or taken:
            draft.unplaced[spec.name] = name
        elif converter is None:
            draft.recipes[name] = whole(name, places[name], spec, dtype_of(name, spec, None))
        else:
            if name not in groups:
                groups[name] = _Group(name, deepcopy(converter))
            group = groups[name]
            group.add(spec, pattern, dtype_of(name, spec, group.converter))
    quantizer = getattr(model, "hf_quantizer", None)
    modules = {} if quantizer is None else dict(model.named_modules())
    skeleton = _Skeleton(model.config, places, modules, quantizer)
    for group in groups.values():
        for recipe in _recipes(group, skeleton, places):
            draft.recipes.setdefault(recipe.name, recipe)
    return draft


def ignored(model: Any, missing: set[str], unused: set[str]) -> tuple[set[str], set[str]]:
    """Of parameters without a source and names without a place, those that the model's class says
    are no fault."""

    @dataclass
    class Loading:
        missing_keys: set[str]
        unexpected_keys: set[str]

    loading = Loading(set(missing), set(unused))
    model._adjust_missing_and_unexpected_keys(loading)
    return missing - loading.missing_keys, unused - loading.unexpected_keys


def _renamer(
    model: Any, places: Mapping[str, Place], key_mapping: Mapping[str, str]
) -> Callable[[str], tuple[str, str, Any]]:
    """From a checkpoint's name to (parameter, pattern that matched, converter or None)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    quantizer = getattr(model, "hf_quantizer", None)
    mapping = get_model_conversion_mapping(model, dict(key_mapping) or None, quantizer)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix, meta = model.base_model_prefix, dict(places)

    def rename(name: str) -> tuple[str, str, Any]:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, meta)
        if renamed not in places and name in places:
            # It has its name already, of which a renaming matches a part.
            renamed, pattern = rename_source_key(name, [], [], prefix, meta)
        return renamed, pattern or "", None if pattern is None else by_pattern[pattern]

    return rename


def _dtype_rule(
    model: Any, places: Mapping[str, Place]
) -> Callable[[str, TensorSpec, Any], torch.dtype | None]:
    """To which dtype the loader casts a tensor of a parameter; None for the stored one."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(getattr(model.config, "dtype", None) or model.dtype)
    kept, dtype_by_group, _ = build_glob_alternation(list(plan))
    quantizer = getattr(model, "hf_quantizer", None)

    def dtype_of(name: str, spec: TensorSpec, converter: Any) -> torch.dtype | None:
        dtype = places[name].dtype
        if plan and (match := kept.search(name)):
            dtype = plan[dtype_by_group[str(match.lastgroup)]]
        if quantizer is None:
            return dtype
        if hasattr(quantizer, "get_new_dtype"):
            stored = torch.empty((), dtype=spec.dtype, device="meta")
            new: torch.dtype | None = quantizer.get_new_dtype(converter, stored, dtype)
            return new
        # As older ones have it: what is renamed is stored as its kernels take it.
        return dtype if name == spec.name and spec.dtype.is_floating_point else None

    return dtype_of


def _recipes(group: _Group, model: _Skeleton, places: Mapping[str, Place]) -> Iterator[Recipe]:
    """What the tensors of one converter become: a recipe for each of its parameters."""
    trace, sources = Trace(), group.sources
    tensors = [trace.source(spec.dtype, spec.shape) for spec in sources]
    try:
        with trace:
            made = group.convert(tensors, model)
    except Exception as error:
        first = sources[0]
        raise CheckpointError(
            f"{first.path}: {_sources(sources)} (for parameter {group.name!r}): transformers' "
            f"{group.operations} cannot take {shown_shape(first.shape)}: {error}"
        ) from error
    for name, tensor in made.items():
        if name not in places:
            raise CheckpointError(
                f"{sources[0].path}: {_sources(sources)}: {group.operations} makes {name!r} of it, "
                "too, which the module has no place for"
            )
        shape = tuple(tensor.shape)
        expect_shape(name, places[name].shape, sources[0], shape, _sources(sources))
        runs = trace.runs(tensor)
        if runs is not None and _worth_it(runs, len(sources)):
            pieces = tuple(piece_of(sources[run.source], run) for run in runs)
            recipe = Recipe(name, pieces, tensor.dtype, shape)
            yield cast(recipe, group.casts[0] or sources[0].dtype, sources[0])
        else:
            yield _converted(group, name, tensor, model)


def _sources(specs: Sequence[TensorSpec]) -> str:
    more = f" and {len(specs) - 1} more" if len(specs) > 1 else ""
    return f"tensor {specs[0].name!r}{more}"


def _worth_it(runs: Sequence[Run], sources: int) -> bool:
    size = sum(run.nbytes for run in runs)
    return len(runs) <= 2 * sources or size >= len(runs) * SMALL_PIECE


def _converted(group: _Group, name: str, like: torch.Tensor, model: _Skeleton) -> Recipe:
    """A parameter that transformers' operations make from all of the group's tensors; ``like`` is
    what they make without casts."""
    casts = group.casts

    def make(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        ready = [t if to is None else t.to(to) for t, to in zip(tensors, casts, strict=True)]
        return group.convert(ready, model)[name]

    inputs = tuple((spec.dtype, spec.shape) for spec in group.sources)
    dtype, shape = casts[0] or like.dtype, tuple(like.shape)
    convert = Conversion(group.operations, inputs, dtype, shape, make)
    return recipe_of_inputs(name, group.sources, convert)
