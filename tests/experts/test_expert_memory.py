"""What slots of experts take, beside all else."""

from __future__ import annotations

import gc
import random
import tracemalloc
from pathlib import Path

import psutil
import pytest
import torch
from fake_device import FakeDevice
from mixtures import EXPERTS, LAYERS, LAYOUTS, alone, check, opened, stacked
from support import open_checkpoint

from layer_streamer import ConfigError
from layer_streamer.devices.device import CpuDevice


class Synchronous(CpuDevice):
    """With memory of its own, and nothing that grows with each event, as the late device's does."""

    unified, maps_files = False, True

    def pin(self, memory: torch.Tensor, *, read_only: bool = False) -> bool:
        return True


@pytest.mark.parametrize("maps", [True, False])
@pytest.mark.parametrize("passes", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_slots_are_all_that_is_taken_and_passes_add_nothing(
    tmp_path: Path, maps: bool, passes: int
) -> None:
    expected = stacked(tmp_path)
    dice, device = random.Random(0), Synchronous()
    device.maps_files = maps
    process = psutil.Process()
    taken = []
    allocate = device.allocate
    device.allocate = lambda nbytes: taken.append(nbytes) or allocate(nbytes)  # type: ignore
    options = {"experts": "demand", "expert_slots": 5, "read_threads": 2}
    with open_checkpoint(device, tmp_path, **options) as streamer:
        own = [t.nbytes for (i, e, _), t in expected.items() if (i, e) == (0, 0)]
        nbytes = sum(-(-n // 16) * 16 for n in own)
        assert 5 * (-(-nbytes // 256) * 256) in taken
        count, use = len(taken), streamer.memory
        asked = [[dice.choices(range(EXPERTS), k=4)] * LAYERS for _ in range(passes)]
        for number, some in enumerate(asked):
            if number == passes // 2:
                gc.collect()
                held = process.num_fds(), process.num_threads(), len(gc.get_objects())
                tracemalloc.start()
            check(streamer, expected, some)
        gc.collect()
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (process.num_fds(), process.num_threads()) == held[:2]
        assert len(gc.get_objects()) < held[2] + 200 and grown < 50_000
        assert len(taken) == count and streamer.memory == use
        assert use.device_bytes == sum(taken)


def test_a_budget_leaves_room_for_the_slots_of_experts(tmp_path: Path) -> None:
    alone(tmp_path)
    device, options = FakeDevice(1), {"experts": "demand", "read_threads": 2}
    with open_checkpoint(device, tmp_path, **options, expert_slots=2) as streamer:
        least = streamer.memory.device_bytes
    with open_checkpoint(
        FakeDevice(1), tmp_path, **options, expert_slots=2, device_budget=least
    ) as streamer:
        assert streamer.memory.device_bytes <= least
    with pytest.raises(ConfigError, match="device_budget"):
        open_checkpoint(FakeDevice(1), tmp_path, **options, expert_slots=9, device_budget=least)


@pytest.mark.parametrize("kind", ["cpu", "mapped"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unless_they_are_counted_slots_are_what_a_budget_leaves(
    tmp_path: Path, layout: str, kind: str
) -> None:
    expected = LAYOUTS[layout](tmp_path)
    held = []
    for budget in (12_000, 20_000, 1 << 30):
        with opened(tmp_path, kind, None, device_budget=budget) as streamer:
            store = streamer._opened().experts
            assert store is not None
            check(streamer, expected, [[3, 1]] * LAYERS)
            assert streamer.memory.device_bytes <= budget
            pools = {id(pool): pool for pool in store.pools.values()}
            held.append(sum(map(len, pools.values())))
            assert set(streamer.plan.tiers) == {"device"}
    assert held[0] < held[1] <= held[2] == len({(i, e) for i, e, _ in expected})
