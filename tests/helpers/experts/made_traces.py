"""Traces made up: zipf's law in each layer, with an order of its own; and any that can be."""

from __future__ import annotations

import random
from itertools import accumulate
from pathlib import Path

from hypothesis import strategies as st

from layer_streamer.experts.trace import ExpertPass, Trace, TraceHeader
from layer_streamer.experts.trace_writer import TraceWriter


def zipf_trace(header: TraceHeader, tokens: int, seed: int = 0) -> Trace:
    """A pass a token, each independent of the others."""
    rng = random.Random(seed)
    every = range(header.num_experts)
    orders = [rng.sample(every, len(every)) for _ in range(header.num_layers)]
    weights = list(accumulate(1 / (rank + 1) for rank in every))

    def route(order: list[int]) -> tuple[int, ...]:
        chosen = dict[int, None]()
        while len(chosen) < header.top_k:
            chosen.setdefault(*rng.choices(order, cum_weights=weights))
        return tuple(chosen)

    passes = [
        ExpertPass(1, tuple((layer, route(order)) for layer, order in enumerate(orders)))
        for _ in range(tokens)
    ]
    return Trace(header, tuple(passes))


def write_trace(path: Path, trace: Trace) -> Path:
    """By the library's own writer."""
    with TraceWriter(path, trace.header) as writer:
        for one in trace.passes:
            assert writer.append(one)
    return path


@st.composite
def any_trace(draw: st.DrawFn, most_passes: int = 6) -> Trace:
    """Small, of any counts; layers may ask for nothing, twice, or for more than a token does."""
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    top_k = draw(st.integers(1, experts))
    nbytes = draw(st.none() | st.integers(1, 10**9))
    together = st.lists(st.integers(0, experts - 1), unique=True, max_size=experts).map(tuple)
    asked = st.lists(st.tuples(st.integers(0, layers - 1), together), max_size=6).map(tuple)
    passes = st.lists(st.builds(ExpertPass, st.integers(1, 9), asked), max_size=most_passes)
    return Trace(TraceHeader(layers, experts, top_k, nbytes), tuple(draw(passes)))
