"""Budgets of a pipeline on a device with memory of its own: a fake one, on which nothing is run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from fake_device import FakeDevice
from recipes import quiet
from tiny_pipelines import held, picture, taken, tiers

from layer_streamer import ConfigError, stream

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)

MARGIN = 512 << 20
"""What "auto" leaves of so little free memory."""


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """What every streamer is opened on."""
    fake = FakeDevice(3)
    for module in ("preview", "streamer", "modules.opening", "modules.pipelines.pipeline"):
        monkeypatch.setattr(f"layer_streamer.{module}.open_devices", lambda device: (fake,))
    return fake


def plan_of(folder: Path, **options: Any) -> Any:
    with quiet():
        pipe: Any = stream(folder, **options)
    pipe.layer_streamer.close()
    return pipe.layer_streamer.plan


def on_host(plan: Any) -> int:
    sequences = [p for c in plan.components.values() for p in c.sequences.values()]
    return sum(p.placement.host_bytes for p in sequences)


def test_without_a_budget_what_is_free_less_a_margin_and_the_reserve_is_one(
    flux: Path, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(flux)
    assert {t for name in plan.components for t in tiers(plan, name)} == {"device"}
    assert plan.reserve_nbytes == 2 << 30
    # Now hardly more is free than slots need.
    least = taken(plan_of(flux, device_budget=taken(plan) * 6 // 10))
    monkeypatch.setattr(device, "free_bytes", lambda: MARGIN + least)
    plan = plan_of(flux, reserve_bytes=0)
    assert "device" in tiers(plan, "transformer")
    assert tiers(plan, "transformer") != {"device"}
    assert taken(plan) <= least
    with pytest.raises(ConfigError, match=r"device_budget=0 B.*: needs at least"):
        plan_of(flux)


@pytest.mark.slow
def test_in_a_tight_budget_there_are_fewer_slots_where_nobody_says_how_many(
    flux: Path, device: FakeDevice
) -> None:
    counts = []
    for budget in ("754KiB", "640KiB"):
        plan = plan_of(flux, device_budget=budget)
        (blocks,) = plan.components["transformer"].sequences.values()
        counts += [slots.count for slots in blocks.placement.device_slots]
    assert counts == [3, 2]
    with pytest.raises(ConfigError, match=r"needs at least .*: .* of slots, .* outside the blocks"):
        plan_of(flux, device_budget="640KiB", n_gpu=2)


@pytest.mark.slow
def test_one_host_budget_holds_what_all_components_have_in_host_memory(
    flux: Path, device: FakeDevice
) -> None:
    ring = {"read_threads": 1, "read_chunk": 4096, "n_gpu": 0}
    slots = on_host(plan_of(flux, device_budget=taken(plan_of(flux, device_budget="1GiB")) // 2,
                            read_mode="direct", **ring))  # fmt: skip
    budget = slots + 300_000
    plan = plan_of(flux, device_budget="800KiB", host_budget=budget, **ring)
    assert 0.6 * budget < on_host(plan) <= budget
    assert "host" in tiers(plan, "transformer")
    assert "disk" in tiers(plan, "transformer")
    assert taken(plan) <= 800 << 10
    with pytest.raises(ConfigError, match=r"host_budget=4.00 KiB: needs at least .* of slots"):
        plan_of(flux, host_budget=4096, **ring)


@pytest.mark.gpu
def test_on_a_gpu_a_pipeline_draws_the_same_in_what_it_was_given(flux: Path) -> None:
    import diffusers
    import torch

    with quiet():
        want = picture(diffusers.FluxPipeline.from_pretrained(flux).to("cuda"))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for options in ({}, {"device_budget": "1MiB"}, {"device_budget": "800KiB", "n_gpu": 1}):
            pipe: Any = stream(diffusers.FluxPipeline, flux, **options)  # type: ignore[call-overload]
            assert pipe.device.type == pipe._execution_device.type == "cuda"
            assert {p.device.type for p in pipe.vae.parameters()} == {"cuda"}
            plan = pipe.layer_streamer.plan
            assert torch.cuda.memory_allocated() - before <= taken(plan) + (1 << 20)
            for _ in range(2):
                assert torch.allclose(picture(pipe), want, rtol=0, atol=1e-4)
            assert pipe.to("cuda") is pipe
            assert held(plan, "transformer")
            pipe.layer_streamer.close()
            del pipe
