"""What each policy would have hit of a trace, and what could be hit at most. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeAlias

from ..errors import ConfigError
from .hits import count_hits, most_hits
from .policies import PolicyName, make_policy
from .trace import Trace

Choice: TypeAlias = PolicyName | Literal["belady"]
PoolName: TypeAlias = Literal["layer", "all"]


@dataclass(frozen=True, slots=True)
class Simulated:
    """One policy over a trace."""

    slots: int
    """For each layer that asks for experts."""
    pool: PoolName
    """Whether each layer has a pool of so many, or all have one together, of as many in all."""
    policy: Choice
    hits: int
    """Of the experts that were asked for, those that were there."""
    nbytes_a_token: float | None
    """What is moved for the others, by the trace's own size of an expert."""


def simulate(
    trace: Trace, slots: Sequence[int], policies: Sequence[PolicyName], counted: Trace
) -> Iterator[Simulated]:
    """Each policy, and then Belady's, with each number of slots a layer, in both kinds of pool.

    ``counted``: the trace that the fixed set comes from; ConfigError if it is of another shape.
    Pools are empty at first. As it is asked for: of a long trace, one takes seconds.
    """
    ours, others = ((one.header.num_layers, one.header.num_experts) for one in (trace, counted))
    if ours != others:
        raise ConfigError(
            f"a fixed set from a trace of {others[0]} layers of {others[1]} experts, "
            f"for one of {ours[0]} layers of {ours[1]}"
        )
    names: list[Choice] = [*policies, "belady"]
    by_pool: dict[PoolName, Sequence[int | None]] = {"layer": trace.layers, "all": [None]}
    for count, name, (pool, layers) in product(slots, names, by_pool.items()):
        hits = sum(_Pool(trace, layer, count).hits(name, counted) for layer in layers)
        yield Simulated(count, pool, name, hits, _nbytes_a_token(trace, hits))


def count_asked(trace: Trace) -> int:
    """Experts that were asked for, all told."""
    return sum(len(experts) for one in trace.passes for _, experts in one.asked)


@dataclass(frozen=True, slots=True)
class _Pool:
    """One layer's, or with None that of all."""

    trace: Trace
    layer: int | None
    slots_a_layer: int

    def hits(self, name: Choice, counted: Trace) -> int:
        steps = list(self.trace.steps(self.layer))
        sharing = 1 if self.layer is not None else len(self.trace.layers)
        # More slots than experts are never filled.
        there = max(1, len({key for keys in steps for key in keys}))
        slots = min(there, self.slots_a_layer * sharing)
        if name == "belady":
            return most_hits(steps, slots)
        asked = self.trace.header.top_k * sharing
        counts = counted.counts(self.layer) if name == "fixed" else None
        return count_hits(steps, slots, make_policy(name, slots, asked, counts))


def _nbytes_a_token(trace: Trace, hits: int) -> float | None:
    nbytes = trace.header.expert_nbytes
    return None if nbytes is None else (count_asked(trace) - hits) * nbytes / trace.tokens
