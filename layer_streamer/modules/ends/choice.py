"""Which of a model's matrices are away from the device: as asked, and as the budget has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

from torch import nn

from ...checkpoint.manifest import Manifest
from ...errors import ConfigError
from ...planning.options import Options
from ...streamer import LayerStreamer
from ..naming.recipe import Recipe
from ..share import Amount, Part, fits, part_of, refusal, total
from ..unbound import as_unbound
from .head import Head, manifest_of_rows
from .matrix import Ends, Matrix
from .rows import Rows

Embeddings: TypeAlias = Literal["auto", "device", "host"]
Heads: TypeAlias = Literal["auto", "device", "stream"]

LARGE = 64 << 20
"""Bytes from which on a table takes its rows from host memory, if anything streams at all: that
costs some microseconds a forward, and a smaller one hardly any memory."""
AWAY = (
    "by itself, and only some rows of it are on the device at a time: embeddings='device' and "
    "head='device' have it there"
)


class Wishes(NamedTuple):
    """What was asked for."""

    embeddings: Embeddings = "auto"
    head: Heads = "auto"

    def check(self) -> None:
        """ConfigError for what is none of the words."""
        words = {"embeddings": get_args(Embeddings), "head": get_args(Heads)}
        for name, asked in self._asdict().items():
            if asked not in words[name]:
                raise ConfigError(f"{name}={asked!r}: must be one of {words[name]}")


class Outside(NamedTuple):
    """What is in no block."""

    manifest: Manifest
    """The checkpoint's."""
    recipes: Mapping[str, Recipe]
    """Of the parameters, by name."""
    made_nbytes: int
    """Memory, on each device, for what blocks have that is made by arithmetic."""

    def kept(self, away: Sequence[Matrix], memories: int) -> Amount:
        """What is resident, on the first device but for what is made, with these matrices away."""
        gone = {matrix.name for matrix in away}
        here = sum(r.made_nbytes for name, r in self.recipes.items() if name not in gone)
        return (here + self.made_nbytes, *[self.made_nbytes] * (memories - 1))

    def largest(self, away: Sequence[Matrix]) -> tuple[int, str]:
        """Of what is resident, the bytes of what takes the most, and its name."""
        gone = {matrix.name for matrix in away}
        some = ((r.made_nbytes, name) for name, r in self.recipes.items() if name not in gone)
        return max(some, default=(0, ""))

    def head_of(self, matrix: Matrix, options: Options) -> Part:
        """The part that streams a head's rows."""
        recipe = self.recipes[matrix.name]
        dtype = recipe.convert.dtype if recipe.convert is not None else None
        rows = manifest_of_rows(self.manifest, recipe)
        return part_of(rows, Options(**{**options, "dtype": dtype}))


@dataclass(frozen=True, slots=True)
class Division:
    """What of a model is where."""

    parts: Mapping[str, Part]
    """By name what streams, the head last if it does."""
    away: tuple[Matrix, ...]
    """Not on the device."""
    kept: Amount
    """What is in none of the parts, and resident."""


@dataclass(frozen=True, slots=True)
class Undivided:
    """A model of which is to be chosen what is where."""

    parts: Mapping[str, Part]
    """Its sequences of blocks, by name."""
    outside: Outside
    ends: Ends
    wishes: Wishes
    options: Options
    """Of a head that streams."""

    def divided(self, away: tuple[Matrix, ...]) -> Division:
        """With these matrices away."""
        parts = dict(self.parts)
        memories = len(next(iter(parts.values())).whole)
        for matrix in away:
            if matrix.head is not None:
                parts[matrix.head.name] = self.outside.head_of(matrix, self.options)
        return Division(parts, away, self.outside.kept(away, memories))


def choose(models: Sequence[Undivided], budget: Amount | None, kept: Amount) -> list[Division]:
    """For each model, the best of the ways that fit together, with as many slots as parts should
    have or with the fewest.

    ``kept``: what is taken by what is none of theirs. ConfigError for wishes that cannot be, and if
    no way fits.
    """
    there = [model.divided(()) for model in models]
    streams = budget is None or not all(map(int.__le__, _needs(there, kept), budget))
    some = [[*ways(model.ends, model.wishes, streams=streams)] for model in models]
    for level in range(max(map(len, some))):
        at = zip(models, (own[min(level, len(own) - 1)] for own in some), strict=True)
        found = [model.divided(away) for model, away in at]
        # Two slots are nearly as fast as three; a head that streams is so many bytes more a pass.
        if any(_fit(found, budget, kept, fewest=fewest) for fewest in (False, True)):
            return found
    last = [*zip(models, found, strict=True)]
    largest = max(model.outside.largest(division.away) for model, division in last)
    parts = [part for _, division in last for part in division.parts.values()]
    raise refusal(parts, budget or (), total([d.kept for d in found], kept), largest)


def _needs(divisions: Sequence[Division], kept: Amount) -> Amount:
    """What is taken with all of it resident."""
    whole = (part.whole for division in divisions for part in division.parts.values())
    return total([*whole, *(division.kept for division in divisions)], kept)


def _fit(
    divisions: Sequence[Division], budget: Amount | None, kept: Amount, *, fewest: bool
) -> bool:
    parts = [part for division in divisions for part in division.parts.values()]
    kept = total([division.kept for division in divisions], kept)
    return fits(parts, budget, kept, fewest=fewest)


def ways(ends: Ends, wishes: Wishes, *, streams: bool) -> Iterator[tuple[Matrix, ...]]:
    """The matrices that may be away from the device together, the best way first.

    ``streams``: anything has to. What is shared between tables and the head is where the head is:
    its rows are taken from host memory if it streams. ConfigError for a head that cannot.
    """
    large = tuple(table for table in ends.tables if table.nbytes >= LARGE)
    (embeddings, head), found = wishes, ends.head
    if found is not None and found.tables and embeddings == "device":
        found = None
    if head == "stream" and found is None:
        why = "there is no plain nn.Linear outside the blocks that has rows of the checkpoint alone"
        if ends.head is not None:
            why = f"it shares {ends.head.name!r} with the embeddings, which embeddings= holds there"
        raise ConfigError(f"head='stream': {why}")
    tables: Sequence[tuple[Matrix, ...]] = [()]
    if embeddings == "host":
        tables = [ends.tables]
    elif embeddings == "auto" and streams:
        tables = [*dict.fromkeys([large, ends.tables])]
    heads: Sequence[tuple[Matrix, ...]] = [()] if head != "stream" else []
    if head != "device" and found is not None:
        heads = [*heads, (found,)]
    # A table costs a row or so a forward, a head all of it.
    return ((*some, *one) for one in heads for some in tables)


def take_away(
    matrices: Sequence[Matrix], static: LayerStreamer, streamers: Mapping[str, LayerStreamer]
) -> None:
    """Have these be away: tables look rows up in host memory, a head streams.

    ``static`` has them as static tensors, and the first device; a head's streamer is among
    ``streamers`` by its name.
    """
    for matrix in matrices:
        modules: list[nn.Module] = [*matrix.tables]
        if matrix.head is not None:
            modules.append(matrix.head.module)
        place = modules[0]._parameters["weight"]
        assert place is not None
        away = as_unbound(place, matrix.name, static.device, AWAY)
        for table in matrix.tables:
            Rows(static.host_tensor(matrix.name), away, static.device).register(table)
        if matrix.head is not None:
            name, module = matrix.head
            Head(streamers[name], name).register(module, away)  # type: ignore[arg-type]
