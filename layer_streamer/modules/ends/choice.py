"""Which of a model's matrices are away from the device: as asked, and as the budget has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

from torch import nn

from ...checkpoint.manifest import Manifest
from ...errors import ConfigError
from ...planning.budget import format_bytes
from ...planning.options import Options
from ...streamer import LayerStreamer
from ..naming.recipe import Recipe
from ..share import Amount, Part, amount_of, budget_of, fits, part_of, refusal, total
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

    embeddings: Embeddings
    head: Heads

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

    def largest(self, away: Sequence[Matrix]) -> str:
        """Of what is resident: "'lm_head.weight' of 1.02 GiB"."""
        gone = {matrix.name for matrix in away}
        some = ((r.made_nbytes, name) for name, r in self.recipes.items() if name not in gone)
        nbytes, name = max(some, default=(0, ""))
        return f"{name!r} of {format_bytes(nbytes)}" if name else ""

    def head_of(self, matrix: Matrix, options: Options) -> Part:
        """The part that streams a head's rows."""
        recipe = self.recipes[matrix.name]
        dtype = recipe.convert.dtype if recipe.convert is not None else None
        return part_of(manifest_of_rows(self.manifest, recipe), options, dtype)


@dataclass(frozen=True, slots=True)
class Division:
    """What is where."""

    parts: Mapping[str, Part]
    """By name what streams, the head last if it does."""
    away: tuple[Matrix, ...]
    """Not on the device."""
    budget: Amount | None
    kept: Amount
    """What is in none of the parts, and resident."""


def choose(
    parts: Mapping[str, Part],
    outside: Outside,
    ends: Ends,
    wishes: Wishes,
    options: Options,
    reserve: int,
) -> Division:
    """The best of the ways that fit, with as many slots as parts should have, or else with the
    fewest.

    ``parts``: the sequences of blocks. ``reserve``: bytes of the budget that are the caller's.
    ConfigError for wishes that cannot be, and if no way fits.
    """
    plan = next(iter(parts.values())).plan
    budget, memories = budget_of(options, plan, reserve), len(amount_of(plan))
    whole = total([part.whole for part in parts.values()], outside.kept((), memories))
    streams = budget is None or not all(map(int.__le__, whole, budget))
    heads: dict[str, Part] = {}
    some = [*ways(ends, wishes, streams=streams)]
    for fewest in (False, True):
        for away in some:
            for matrix in away:
                if matrix.head is not None and not heads:
                    heads[matrix.head.name] = outside.head_of(matrix, options)
            given = {**parts, **(heads if any(matrix.head for matrix in away) else {})}
            found = Division(given, away, budget, outside.kept(away, memories))
            if fits([*given.values()], budget, found.kept, fewest=fewest):
                return found
    raise refusal([*given.values()], options, budget or (), found.kept, outside.largest(away))


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
        tables = [large, ends.tables]
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
