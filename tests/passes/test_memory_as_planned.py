"""What is allocated is what the plan said, no more and no less."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import tiny_checkpoint
from routes import NUM_LAYERS, ROUTES, make_devices, nothing, open_route, route_params

from layer_streamer.planning.layout import PAGE

NUM_READERS = 2


@pytest.mark.parametrize("route", route_params())
def test_slots_and_residents_take_the_bytes_that_the_plan_says(tmp_path: Path, route: str) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS + 3, hidden=48)
    with open_route(route, tmp_path, make_devices(route)) as streamer:
        placement, memory = streamer.plan.placement, streamer.memory
        if streamer.plan.read_mode == "mapped":
            return  # whole pages of files, and no slots on a CPU
        if ROUTES[route].kind != "cpu":
            taken = memory.device_bytes, memory.host_bytes
            assert taken == (sum(placement.device_bytes), placement.host_bytes)
            return
        # Slots of the one pool are whole pages, which the plan does not round to.
        rounding = PAGE * sum(slots.count for slots in placement.device_slots)
        assert memory.device_bytes == 0
        assert 0 <= memory.host_bytes - sum(placement.device_bytes) < max(rounding, 1)


@pytest.mark.parametrize("route", route_params("ring", "partial ring", "two partial"))
def test_a_ring_has_two_slots_for_each_reader(tmp_path: Path, route: str) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS + 3, hidden=48)
    with open_route(route, tmp_path, make_devices(route)) as streamer:
        streamer.run_pass(None, nothing)
        report = streamer.last_pass
        assert report is not None
        rings = [n for name, (_, n) in report.peak_slots.items() if name.endswith("ring")]
        assert rings == [2 * NUM_READERS] * ROUTES[route].num_devices
