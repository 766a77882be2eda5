"""Which tensors make up a layer: found by the numbers in their names. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

from ..errors import CheckpointError, ConfigError, printable
from .manifest import FrozenMapping, LayerSpec, TensorSpec

LAYER_PATTERNS = ("model.layers.{i}.", "transformer.h.{i}.", "blk.{i}.")
"""Prefixes by which layers are found when no pattern is given; ``{i}`` is the layer index."""

MAX_LAYERS = 100_000

LISTED_PREFIXES = 5
"""So many are listed where no layers were found."""
PREFIX_CHARS = 100
"""Of a name, how far it is searched for numbers."""
SHOWN_CHARS = 120
"""Of a prefix, escaped, how much is shown."""
MAX_NUMBERS = 4
"""Of a name, how many are looked at."""
MAX_PREFIXES = 4096
"""So many are told apart; real files have a few, even mixtures of experts."""

_NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,4})[./](?=.)")


def group_layers(
    specs: Mapping[str, TensorSpec], path: Path, layer_pattern: str | None = None
) -> tuple[tuple[LayerSpec, ...], dict[str, TensorSpec], str]:
    """Split tensors into layers 0..n-1 and the rest, by their name's prefix, which comes third.

    ``layer_pattern`` is a prefix with ``{i}`` for the index ("model.layers.{i}."); None tries
    LAYER_PATTERNS and takes the first that matches. Errors: ConfigError for a pattern without
    ``{i}``, CheckpointError if no layer matches or an index is missing.
    """
    for pattern in LAYER_PATTERNS if layer_pattern is None else (layer_pattern,):
        layers, static = _split(specs, pattern)
        if layers:
            break
    else:
        tried = layer_pattern or ", ".join(LAYER_PATTERNS)
        raise CheckpointError(
            f"{path}: no layers found (tried {tried}); {_list_prefixes(specs)}; "
            "name their prefix with layer_pattern="
        )
    if max(layers) + 1 != len(layers):
        missing = next(i for i in range(len(layers)) if i not in layers)
        raise CheckpointError(f"{path}: layer {missing} of {max(layers) + 1} has no tensors")
    ordered = tuple(LayerSpec(i, FrozenMapping(layers[i])) for i in range(len(layers)))
    return ordered, static, pattern


def _split(
    specs: Mapping[str, TensorSpec], pattern: str
) -> tuple[dict[int, dict[str, TensorSpec]], dict[str, TensorSpec]]:
    if pattern.count("{i}") != 1:
        raise ConfigError(f"layer_pattern={pattern!r}: must contain {{i}} exactly once")
    head, tail = (re.escape(part) for part in pattern.split("{i}"))
    prefix = re.compile(rf"{head}(0|[1-9][0-9]{{0,8}}){tail}(?=.)")
    layers: dict[int, dict[str, TensorSpec]] = {}
    static: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        match = prefix.match(name)
        if match and int(match[1]) >= MAX_LAYERS:
            raise CheckpointError(
                f"{spec.path}: tensor {name!r}: layer {match[1]}, more than {MAX_LAYERS} layers"
            )
        if match:
            layers.setdefault(int(match[1]), {})[name[match.end() :]] = spec
        else:
            static[name] = spec
    return layers, static


def _list_prefixes(names: Iterable[str]) -> str:
    """What an error says of the numbers in some names: one line, bounded."""
    found = sorted(numbered_prefixes(names).items(), key=lambda item: -item[1])
    if not found:
        return "no prefix in it is numbered from 0 on"
    listed = [f"{_cut(prefix)} ({count})" for prefix, count in found[:LISTED_PREFIXES]]
    more = ", ..." if len(found) > LISTED_PREFIXES else ""
    return f"numbered prefixes in it: {', '.join(listed)}{more}"


def _cut(prefix: str) -> str:
    text = printable(prefix)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


def numbered_prefixes(names: Iterable[str]) -> dict[str, int]:
    """By prefix with ``{i}`` in place of a number, how many layers it would make.

    Only prefixes that are numbered 0 to n-1. A number within a numbered part ("blk.0.experts.3.")
    counts only where there is one such part.
    """
    indices: dict[str, set[int]] = {}
    within: dict[str, str | None] = {}
    for name in names:
        outer: str | None = None
        for match in islice(_NUMBER.finditer(name, 0, PREFIX_CHARS), MAX_NUMBERS):
            prefix = f"{name[: match.start()]}{{i}}{name[match.end() - 1]}"
            if prefix not in indices:
                if len(indices) == MAX_PREFIXES:
                    break
                indices[prefix], within[prefix] = set(), outer
            indices[prefix].add(int(match[1]))
            if len(indices[prefix]) > 1:
                break
            outer = prefix
    inner: set[str] = set()
    for prefix, outer in within.items():
        if outer is not None and (outer in inner or len(indices[outer]) > 1):
            inner.add(prefix)
    return {
        prefix: len(found)
        for prefix, found in indices.items()
        if prefix not in inner and max(found) + 1 == len(found) and prefix.count("{i}") == 1
    }
