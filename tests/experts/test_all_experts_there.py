"""Experts that all have a slot of their own: they are told once, and stay."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from hypothesis import given
from hypothesis import strategies as st
from mixtures import DEVICES, EXPERTS, LAYERS, LAYOUTS, Experts, alone, check, opened, same_bytes

from layer_streamer import LayerStreamer, StreamerError
from layer_streamer.experts.policies import Key, make_policy
from layer_streamer.experts.slots import SlotTable

ALL = LAYERS * EXPERTS


def tell(streamer: LayerStreamer) -> dict[int, tuple[Any, torch.Tensor]]:
    """By layer, its experts and where they are said to be."""
    found = {}
    for layer_idx, weights in streamer.sweep():
        experts = weights.experts  # type: ignore[attr-defined]
        if experts is not None:
            table = experts.all_there()
            assert table is not None and experts.where == dict(enumerate(table.tolist()))
            found[layer_idx] = experts, table
    device: Any = streamer._devices[0]
    if isinstance(device, FakeDevice):
        device.drain()
    return found


def check_all(told: Mapping[int, tuple[Any, torch.Tensor]], expected: Experts) -> None:
    for (layer_idx, expert, name), wanted in expected.items():
        experts, table = told[layer_idx]
        assert same_bytes(experts.bank(name)[table[expert]], wanted)


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_expert_is_where_it_is_said_to_be(tmp_path: Path, layout: str, kind: str) -> None:
    expected = LAYOUTS[layout](tmp_path)
    with opened(tmp_path, kind, ALL) as streamer:
        assert not streamer.experts_stay
        told = tell(streamer)
        assert streamer.experts_stay
        check_all(told, expected)
        nbytes = sum(tensor.nbytes for tensor in expected.values())
        report = streamer.last_experts
        assert report is not None and (report.asked, report.copied_bytes) == (0, nbytes)
        again = tell(streamer)
        assert streamer.last_experts is not None and streamer.last_experts.copied_bytes == 0
        assert all(told[i][1] is again[i][1] for i in told), "in the same memory"


@pytest.mark.parametrize("kind", DEVICES)
def test_with_fewer_slots_nothing_is_said_and_nothing_brought(tmp_path: Path, kind: str) -> None:
    alone(tmp_path)
    with opened(tmp_path, kind, ALL - 1) as streamer:
        for _, weights in streamer.sweep():
            assert weights.experts.all_there() is None  # type: ignore[attr-defined]
        assert streamer.last_experts is not None and streamer.last_experts.copied_bytes == 0
        assert not streamer.experts_stay


def test_what_was_loaded_before_stays_and_only_the_rest_is_brought(tmp_path: Path) -> None:
    expected = alone(tmp_path)
    with opened(tmp_path, slots=ALL) as streamer:
        check(streamer, expected, [[5, 2], [], [6]])
        told = tell(streamer)
        check_all(told, expected)
        nbytes = sum(tensor.nbytes for tensor in expected.values())
        there = sum(
            t.nbytes for (i, e, _), t in expected.items() if (i, e) in {(0, 5), (0, 2), (2, 6)}
        )
        assert streamer.last_experts is not None
        assert streamer.last_experts.copied_bytes == nbytes - there


def test_loads_of_some_move_none_of_those_that_have_been_told(tmp_path: Path) -> None:
    expected, dice = alone(tmp_path), random.Random(1)
    with opened(tmp_path, slots=ALL) as streamer:
        told = tell(streamer)
        for _ in range(5):
            asked = [dice.sample(range(EXPERTS), 3) for _ in range(LAYERS)]
            check(streamer, expected, asked)
        assert streamer.experts_stay
        check_all(told, expected)


def test_after_a_write_they_do_not_stay_until_they_are_told_anew(tmp_path: Path) -> None:
    expected = alone(tmp_path)
    with opened(tmp_path, slots=ALL) as streamer:
        told = tell(streamer)
        with pytest.raises(StreamerError, match="written to"):
            for _, weights in streamer.sweep():
                experts = weights.experts  # type: ignore[attr-defined]
                experts.all_there()
                experts.bank("mlp.experts.down.weight")[3].zero_()
        assert not streamer.experts_stay
        with pytest.raises(StreamerError, match="hand-out has ended"):
            told[0][0].all_there()
        for layer_idx, weights in streamer.sweep():  # into other slots than before
            weights.experts.load([LAYERS - layer_idx, layer_idx])  # type: ignore[attr-defined]
        assert not streamer.experts_stay
        again = tell(streamer)
        assert streamer.experts_stay
        assert all(told[i][1] is again[i][1] for i in told), "graphs read them there"
        check_all(again, expected)


def test_after_the_hand_out_they_are_told_as_long_as_they_stay(tmp_path: Path) -> None:
    expected = alone(tmp_path)
    with opened(tmp_path, slots=ALL) as streamer:
        told = tell(streamer)
        check_all({i: (experts, experts.all_there()) for i, (experts, _) in told.items()}, expected)
    assert not streamer.experts_stay


@given(
    steps=st.lists(st.lists(st.integers(0, 7), max_size=3, unique=True), max_size=12),
    data=st.data(),
)
def test_as_long_as_there_is_no_departure_all_are_where_they_were(
    steps: list[list[int]], data: st.DataObject
) -> None:
    table, there, departures = SlotTable(4, make_policy("lru", 4, 2)), dict[Key, int](), None
    for step in steps:
        keys = [(0, expert) for expert in step]
        slots = table.place(keys).slots
        assert table.departures == -1, "it is not known yet what is there"
        table.settle()
        if data.draw(st.integers(0, 5)) == 0 and keys:
            table.drop(keys[0])
            keys, slots = keys[1:], slots[1:]
        if table.departures == departures:
            assert all(key in table for key in there)
            assert all(there.get(key, slot) == slot for key, slot in zip(keys, slots, strict=True))
        else:
            there, departures = {}, table.departures
        there |= dict(zip(keys, slots, strict=True))
