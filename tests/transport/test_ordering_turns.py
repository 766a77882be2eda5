"""The order of events where passes go forth and back, over a device that does its work late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from ordering import (
    HANG_SECONDS,
    POOLS,
    TENSORS,
    find_errors,
    seen_errors,
    time_without_errors,
)

from layer_streamer.passes.caller import Caller
from layer_streamer.transport.copier import Copier
from layer_streamer.transport.pool import DeviceSlot
from layer_streamer.transport.reader import Feeder
from layer_streamer.transport.schedule import Orders
from layer_streamer.transport.stage import LaneRun


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_safetensors(tmp_path_factory.mktemp("turns") / "m.safetensors", TENSORS).parent


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    pools=st.sampled_from(sorted(POOLS)),
    read_mode=st.sampled_from(["buffered", "direct", "mapped"]),
    devices=st.integers(1, 2),
    more_slots=st.integers(0, 5),
    batch=st.sampled_from([None, 2]),
    dtype=st.sampled_from([None, torch.bfloat16]),
)
def test_work_of_passes_that_turn_only_ever_sees_its_layers_bytes(  # noqa: PLR0917 - drawn
    checkpoint: Path, seed: int, pools: str, read_mode: str, devices: int,
    more_slots: int, batch: int | None, dtype: Any,
) -> None:  # fmt: skip
    options = {**POOLS[pools], "read_mode": read_mode, "devices": devices, "dtype": dtype}
    options |= {"batch_gpu": batch, "batch_cpu": batch, "batch_cpu_pinned": batch}
    options["n_gpu"] += more_slots
    assert find_errors(checkpoint, seed, {**options, "turns": True}, HANG_SECONDS) == []


def leave_out(*args: Any) -> None:
    """A wait that does not wait."""


def one_more_than_lies(orders: Orders, number: int) -> bool:
    """The layer behind the last one that lies in a slot is taken to lie in one, too."""
    return kept(orders, number) or (number > orders.length and kept(orders, number - 1))


def wherever_it_is_counted(orders: Orders, n: int) -> int:
    """A layer's slot goes by the count of steps, as where passes do not turn."""
    return n % orders._used.num_slots


def slot_early(copier: Copier, lane_run: LaneRun, n: int) -> bool:
    count, released = len(copier._slots), lane_run.orders.released
    return copier.await_true(lane_run.run, lambda: released(lane_run) >= n - count)


kept = Orders.kept
MUTATIONS: dict[str, tuple[type, str, Any, str]] = {
    "the work of a layer's first hand-out is not waited for": (
        Caller, "order_after_uses", leave_out, "pinned"),
    "a layer too many is taken to lie in a slot": (Orders, "kept", one_more_than_lies, "pinned"),
    "slots go by the count of steps": (Orders, "slot", wherever_it_is_counted, "pinned"),
    "a copy takes a slot too early": (Copier, "await_slot", slot_early, "pinned"),
    "the copy does not wait for the caller's work": (
        DeviceSlot, "order_after_uses", leave_out, "ring"),
    "a run starts before the earlier ones are left": (
        Feeder, "_earlier_runs_left", lambda stage, run: True, "pinned"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_taking_out_what_keeps_turning_passes_apart_is_seen(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    owner, name, replacement, pools = MUTATIONS[mutation]
    options = {**POOLS[pools], "turns": True}
    seconds = time_without_errors(checkpoint, options)
    monkeypatch.setattr(owner, name, replacement)
    assert any(seen_errors(checkpoint, options, seconds)), f"no schedule noticed: {mutation}"
