"""What a simulation comes to: each pool by itself, each policy, and the bytes that follow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_traces import any_trace, zipf_trace

from layer_streamer.errors import ConfigError
from layer_streamer.experts.hits import count_hits, most_hits
from layer_streamer.experts.policies import POLICIES, PolicyName, make_policy
from layer_streamer.experts.simulate import Simulated, count_asked, simulate
from layer_streamer.experts.trace import ExpertPass, Trace, TraceHeader

SHAPE = TraceHeader(num_layers=6, num_experts=32, top_k=4, expert_nbytes=1000)


def by_row(trace: Trace, slots: list[int], counted: Trace | None = None) -> dict[Any, Simulated]:
    found = list(simulate(trace, slots, POLICIES, counted or trace))
    return {(one.slots, one.policy, one.pool): one for one in found}


@given(trace=any_trace(), slots=st.integers(1, 9))
def test_no_row_has_more_hits_than_belady_and_bytes_are_those_of_what_was_missed(
    trace: Trace, slots: int
) -> None:
    if not trace.passes:
        return
    rows = by_row(trace, [slots])
    assert len(rows) == 2 * (len(POLICIES) + 1)
    asked, nbytes = count_asked(trace), trace.header.expert_nbytes
    for one in rows.values():
        assert 0 <= one.hits <= rows[slots, "belady", one.pool].hits <= asked
        if nbytes is None:
            assert one.nbytes_a_token is None
        else:
            assert one.nbytes_a_token == (asked - one.hits) * nbytes / trace.tokens


@given(trace=any_trace(), slots=st.integers(1, 9))
def test_a_pool_a_layer_is_each_layer_by_itself_and_the_shared_one_has_as_many_slots(
    trace: Trace, slots: int
) -> None:
    if not trace.passes:
        return
    rows = by_row(trace, [slots])
    alone = 0
    for layer in trace.layers:
        steps = list(trace.steps(layer))
        assert all(key[0] == layer for keys in steps for key in keys)
        alone += count_hits(steps, slots, make_policy("lru", slots, trace.header.top_k))
    assert rows[slots, "lru", "layer"].hits == alone
    steps, together = list(trace.steps()), max(1, slots * len(trace.layers))
    assert rows[slots, "lru", "all"].hits == count_hits(steps, together, make_policy("lru", 1, 1))
    assert rows[slots, "belady", "all"].hits == most_hits(steps, together)


@pytest.mark.parametrize("name", POLICIES)
def test_each_pool_has_a_policy_made_for_its_slots_its_layers_and_their_counts(
    name: PolicyName,
) -> None:
    trace, slots = zipf_trace(SHAPE, 300), 8  # beyond what is counted before it is halved
    rows = by_row(trace, [slots])
    alone = sum(
        count_hits(
            list(trace.steps(layer)), slots,
            make_policy(name, slots, SHAPE.top_k, trace.counts(layer)),
        )
        for layer in trace.layers
    )  # fmt: skip
    assert rows[slots, name, "layer"].hits == alone
    together, asked = slots * SHAPE.num_layers, SHAPE.top_k * SHAPE.num_layers
    policy = make_policy(name, together, asked, trace.counts())
    assert rows[slots, name, "all"].hits == count_hits(list(trace.steps()), together, policy)


def test_with_a_slot_for_every_expert_each_is_moved_once() -> None:
    trace = zipf_trace(SHAPE, 40)
    once = len({key for keys in trace.steps() for key in keys})
    for one in by_row(trace, [SHAPE.num_experts, 10**12]).values():
        assert one.hits == count_asked(trace) - once


def test_more_slots_hit_more_and_belady_by_far_the_most() -> None:
    """Where some experts are asked for far more often than others, without order."""
    trace = zipf_trace(SHAPE, 300)
    rows = by_row(trace, [8, 16])
    for name in POLICIES:
        for pool in ("layer", "all"):
            assert rows[8, name, pool].hits < rows[16, name, pool].hits
    hits = {name: rows[8, name, "layer"].hits for name in (*POLICIES, "belady")}
    assert hits["lru"] < hits["segmented"] < hits["lfu"] < hits["belady"]


def test_a_fixed_set_comes_from_the_trace_that_it_is_counted_from() -> None:
    trace = zipf_trace(SHAPE, 200, seed=1)
    own, others = by_row(trace, [8]), by_row(trace, [8], zipf_trace(SHAPE, 200, seed=2))
    assert own[8, "fixed", "layer"].hits > others[8, "fixed", "layer"].hits
    assert {row: one for row, one in own.items() if row[1] != "fixed"} == {
        row: one for row, one in others.items() if row[1] != "fixed"
    }


def test_a_fixed_set_of_another_model_is_refused() -> None:
    other = zipf_trace(replace(SHAPE, num_layers=5), 2)
    with pytest.raises(ConfigError, match="a trace of 5 layers of 32 experts, for one of 6"):
        by_row(zipf_trace(SHAPE, 2), [4], other)


def test_layers_without_experts_have_no_slots_in_the_shared_pool() -> None:
    """As the first ones of some mixtures."""
    asked = tuple((layer, (0, 1, 2, 3)) for layer in (3, 4))
    trace = Trace(SHAPE, (ExpertPass(1, asked),) * 5)
    rows = by_row(trace, [4, 3])
    assert rows[4, "lru", "all"].hits == rows[4, "lru", "layer"].hits == 4 * 8
    # With three slots each: not six times three, where all would have room.
    assert rows[3, "lru", "all"].hits < 4 * 8
