"""Layers that stay in memory for good: what is handed out equals the file, whatever the tiers."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import odd_checkpoint, tiny_tensors, write_safetensors
from fake_device import FakeDevice
from pairs import pairwise as pairwise_rows
from support import Witness, make_device, make_devices, open_checkpoint, raw

from layer_streamer import ConfigError, LayerStreamer

DEVICES = ["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)]
PASSES = 3
SHARES = [None, 0.0, 0.3, 0.7, 1.0]
SETTINGS: dict[str, list[Any]] = {
    "device_share": SHARES,
    "host_share": SHARES,
    "read_mode": ["auto", "buffered", "direct", "mapped"],
    "n_gpu": [0, 1, 5],
    "n_cpu_pinned": [None, 1, 2],
    "n_cpu": [None, 1],
    "on_copy": [None, lambda layer_idx, stream: None],
    "dtype": [None, torch.float32],
    "devices": [1, 2, 3],
}


def expected(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    castable = (torch.float32, torch.float16, torch.bfloat16)
    if dtype is None:
        return tensors
    return {n: t.to(dtype) if t.dtype in castable else t for n, t in tensors.items()}


def budgets(path: Path, device: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Shares of what lies between nothing resident and everything resident, as bytes."""
    options = dict(options)
    shares = {name: options.pop(f"{name}_share") for name in ("device", "host")}
    with open_checkpoint(device, path, **{**options, "read_mode": "buffered"}) as streamer:
        plan = streamer.plan
    whole = {
        "device": sum(size.device_nbytes for size in plan.sizes),
        "host": sum(size.host_nbytes for size in plan.sizes),
    }
    slots = {"device": max(plan.placement.device_bytes), "host": plan.placement.host_bytes}
    if plan.machine.unified:
        # Both names mean the one memory that all devices share.
        whole["host"] = whole["device"]
        slots = dict.fromkeys(slots, sum(plan.placement.device_bytes))
    for name, share in shares.items():
        if share is not None:
            options[f"{name}_budget"] = slots[name] + int(share * whole[name])
    return options


@pytest.mark.parametrize("kind", DEVICES)
def test_every_pair_of_budgets_modes_and_devices_streams_the_files_bytes(
    tmp_path: Path, kind: str
) -> None:
    tensors = odd_checkpoint(tmp_path, finite=True)
    for row in pairwise_rows(SETTINGS):
        count = row.pop("devices")
        options = budgets(tmp_path, make_devices(kind, count), row)
        if kind != "cpu" and options["read_mode"] == "mapped":
            options["host_budget"] = "1GiB"
        device = make_devices(kind, count)
        with open_checkpoint(device, tmp_path, read_threads=2, read_chunk=4096, **options) as s:
            check_passes(s, device, expected(tensors, options["dtype"]))


def check_passes(streamer: LayerStreamer, device: Any, tensors: dict[str, torch.Tensor]) -> None:
    witness = Witness(device, tensors)
    for _ in range(PASSES):
        streamer.run_pass(None, witness)
    assert witness.layers == PASSES * list(range(streamer.num_layers))
    witness.check()


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors = tiny_tensors(12, hidden=48)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    return tmp_path, tensors


@pytest.mark.parametrize("kind", DEVICES)
def test_when_everything_fits_on_the_device_nothing_is_read_or_copied(
    checkpoint: tuple[Path, dict[str, torch.Tensor]], kind: str
) -> None:
    path, tensors = checkpoint
    device = make_device(kind)
    with open_checkpoint(device, path, device_budget="1GiB") as streamer:
        assert set(streamer.plan.tiers) == {"device"}
        check_passes(streamer, device, tensors)
        assert list(streamer.last_pass.steps) == ["compute"]
        first, second = dict(streamer.sweep()), dict(streamer.sweep())
        for i in range(12):
            assert all(first[i][key] is second[i][key] for key in first[i])


@pytest.mark.parametrize("kind", DEVICES)
def test_what_a_pass_hands_out_of_layers_on_the_device_stays_where_it_is_until_close(
    checkpoint: tuple[Path, dict[str, torch.Tensor]], kind: str
) -> None:
    path, tensors = checkpoint
    device = make_device(kind)
    witness = Witness(device, tensors)
    # Slots are taken again and again beside them, by passes that end and by one that does not.
    options: dict[str, Any] = {"device_budget": 250_000, "n_gpu": 0, "n_cpu_pinned": 1}
    with open_checkpoint(device, path, **options) as streamer:
        resident = [i for i, tier in enumerate(streamer.plan.tiers) if tier == "device"]
        assert 0 < len(resident) < 12
        kept = {i: weights for i, weights in streamer.sweep() if i in resident}
        places = {(i, k): tensor.data_ptr() for i, w in kept.items() for k, tensor in w.items()}
        next(streamer.sweep())
        for _ in range(2):
            for i, weights in streamer.sweep():
                for key in weights if i in resident else ():
                    assert weights[key] is kept[i][key]
                    assert weights[key].data_ptr() == places[i, key]
        for i in resident:
            witness(None, kept[i], i)
    witness.check()


@pytest.mark.parametrize("kind", ["fake", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("read_mode", ["mapped", "buffered", "direct"])
def test_when_everything_fits_in_host_memory_nothing_is_read_after_opening(
    checkpoint: tuple[Path, dict[str, torch.Tensor]], kind: str, read_mode: str
) -> None:
    path, tensors = checkpoint
    device = make_device(kind)
    with open_checkpoint(device, path, host_budget="1GiB", read_mode=read_mode) as streamer:
        assert set(streamer.plan.tiers) == {"host"}
        check_passes(streamer, device, tensors)
        assert "read" not in streamer.last_pass.steps
        assert streamer.memory.pinned_bytes == streamer.memory.host_bytes > 0


def test_auto_maps_the_files_where_memory_holds_them_and_no_host_pool_is_named(
    checkpoint: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, _ = checkpoint
    with open_checkpoint(make_device("fake"), path) as streamer:
        assert streamer.plan.read_mode == "mapped"
    with open_checkpoint(make_device("fake"), path, n_cpu_pinned=4) as streamer:
        assert streamer.plan.read_mode == "buffered"
        assert set(streamer.plan.tiers) == {"disk"}


def test_a_budget_below_its_slots_is_refused_with_the_bound(
    checkpoint: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, _ = checkpoint
    with pytest.raises(ConfigError, match="device_budget"):
        open_checkpoint(make_device("fake"), path, device_budget=1000)
    with pytest.raises(ConfigError, match="host_budget"):
        open_checkpoint(make_device("fake"), path, host_budget=1000)


def test_resident_layers_are_spread_over_the_pass(
    checkpoint: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, _ = checkpoint
    with open_checkpoint(make_device("fake"), path) as streamer:
        size = streamer.plan.sizes[0]
    budget = 3 * size.slot_nbytes + 4 * size.device_nbytes
    with open_checkpoint(make_device("fake"), path, device_budget=budget) as streamer:
        resident = [i for i, tier in enumerate(streamer.plan.tiers) if tier == "device"]
        assert len(resident) == 4
        gaps = {b - a for a, b in pairwise(resident)}
        assert gaps == {3}
        assert streamer.memory.device_bytes <= budget


def test_a_refused_mapping_falls_back_to_an_arena(
    checkpoint: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tensors = checkpoint
    device = make_device("fake")
    pin = FakeDevice.pin
    monkeypatch.setattr(
        FakeDevice,
        "pin",
        lambda self, memory, **kind: not kind.get("read_only") and pin(self, memory),
    )
    with open_checkpoint(device, path) as streamer:
        assert streamer.plan.read_mode == "buffered"
        assert "refused" in streamer.plan.reason
        check_passes(streamer, device, tensors)


def test_no_copy_crosses_from_one_pinned_segment_to_the_next(
    checkpoint: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tensors = checkpoint
    for options in ({"read_mode": "mapped"}, {"host_budget": "1GiB", "read_mode": "direct"}, {}):
        device = make_device("fake")
        device.pin_segment = 12288
        with open_checkpoint(device, path, **options) as streamer:
            check_passes(streamer, device, tensors)


@pytest.mark.parametrize("kind", DEVICES)
def test_x_moves_to_each_layers_device_and_back_to_the_first(
    checkpoint: tuple[Path, dict[str, torch.Tensor]], kind: str
) -> None:
    path, _ = checkpoint
    with open_checkpoint(make_devices(kind, 3), path) as streamer:
        assert len(streamer.devices) == (3 if kind != "cuda" else min(3, torch.cuda.device_count()))
        assert streamer.run_pass(torch.zeros(1), lambda x, w, i: x + 1).item() == 12


@pytest.mark.parametrize("kind", ["fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_passes_left_early_stay_exact_over_several_devices_and_all_tiers(
    checkpoint: tuple[Path, dict[str, torch.Tensor]], kind: str
) -> None:
    path, tensors = checkpoint
    rng = random.Random(5)
    device = make_devices(kind, 2)
    options: dict[str, Any] = {"device_budget": 120_000, "host_budget": 310_000, "n_cpu_pinned": 1}
    with open_checkpoint(device, path, **options) as streamer:
        assert set(streamer.plan.tiers) == {"device", "host", "disk"}
        for _ in range(30):
            stop = rng.randrange(12)
            for layer_idx, _ in streamer.sweep():
                if layer_idx == stop:
                    break
            check_passes(streamer, device, tensors)


@pytest.mark.parametrize("kind", ["cpu", "fake"])
def test_tail_steps_are_placed_like_layers(tmp_path: Path, kind: str) -> None:
    tensors = tiny_tensors(3)
    path = write_safetensors(tmp_path / "model.safetensors", tensors)
    device = make_device(kind)
    with open_checkpoint(device, path, tail=["lm_head.weight"], device_budget="1GiB") as streamer:
        for _ in range(2):
            parts = [w["lm_head.weight"] for i, w in streamer.sweep() if i >= 3]
            assert torch.equal(
                torch.cat([raw(part) for part in parts]), raw(tensors["lm_head.weight"])
            )


def test_close_waits_for_work_that_reads_resident_layers(
    checkpoint: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, tensors = checkpoint
    device = FakeDevice(seed=7, eager=0.0)
    witness = Witness(device, tensors)
    with open_checkpoint(device, path, device_budget="1GiB") as streamer:
        streamer.run_pass(None, witness)
        slab = next(streamer.sweep())[1]["mlp.up_proj.weight"]
    # What the allocator gives to the next one who asks.
    slab.fill_(0)
    witness.check()
