"""One budget over several devices and streamers: what lies on one device is not paid on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_safetensors
from fake_device import FakeDevice
from hypothesis import given
from hypothesis import strategies as st

from layer_streamer import ConfigError, LayerStreamer
from layer_streamer.checkpoint.formats import read_manifest
from layer_streamer.checkpoint.manifest import FrozenMapping, LayerSpec, Manifest, TensorSpec
from layer_streamer.modules import share
from layer_streamer.planning.options import Options

KIB = 1 << 10
NOWHERE = Path("nowhere")


class Noted:
    """Stands for a streamer: the plan that it would be opened with, and its end."""

    def __init__(self, manifest: Manifest, options: Any) -> None:
        self.plan = share.plan_checkpoint(manifest, **options)
        self.closed = False

    @classmethod
    def from_checkpoint(cls, manifest: Manifest, **options: Any) -> Noted:
        return cls(manifest, options)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[FakeDevice]:
    """Two devices with memory of their own."""
    devices = FakeDevice.several(2, seed=3)
    for module in ("preview", "streamer"):
        monkeypatch.setattr(f"layer_streamer.{module}.open_devices", lambda names: devices)
    return devices


def checkpoint(folder: Path, layers: int = 6, floats: int = 16 * KIB) -> Manifest:
    tensors = {f"model.layers.{i}.w": torch.full((floats,), float(i)) for i in range(layers)}
    return read_manifest(write_safetensors(folder / "model.safetensors", tensors))


def opened(parts: list[share.Part], kept: share.Amount) -> list[LayerStreamer]:
    return share.open_all(parts, share.budget_of(parts[0], 0), kept)


def test_what_is_on_the_first_device_is_not_paid_on_the_second(
    tmp_path: Path, two: list[FakeDevice]
) -> None:
    options = Options(n_gpu=0, device_budget=250 * KIB)
    part = share.part_of(checkpoint(tmp_path), options)
    for kept, tiers in (
        ((0, 0), ["device"] * 6),
        ((100 * KIB, 0), ["disk", "device"] * 3),
        ((0, 100 * KIB), ["device", "disk"] * 3),
    ):
        (streamer,) = opened([part], kept)
        first, second = streamer.plan.placement.device_bytes
        assert first + kept[0] <= 250 * KIB and second + kept[1] <= 250 * KIB
        found = ["device" if tier == "device" else "disk" for tier in streamer.plan.tiers]
        for device in (0, 1):
            mine, want = found[device::2], tiers[device::2]
            assert ("disk" in mine) == ("disk" in want)
        streamer.close()


def test_what_lies_on_the_first_device_may_be_all_that_is_refused(
    tmp_path: Path, two: list[FakeDevice]
) -> None:
    options = Options(n_gpu=0, device_budget=250 * KIB)
    part = share.part_of(checkpoint(tmp_path), options)
    with pytest.raises(ConfigError, match=r"device_budget=250 KiB of cpu: needs at least 284 KiB"):
        opened([part], (220 * KIB, 0))
    assert not two[0].errors


def test_a_number_for_each_device_is_kept_free_there(tmp_path: Path, two: list[FakeDevice]) -> None:
    manifest = checkpoint(tmp_path)
    options = Options(n_gpu=0, device_budget=256 * KIB)
    with LayerStreamer.from_checkpoint(manifest, reserve_bytes=[128 * KIB, 0], **options) as some:
        first, second = some.plan.placement.device_bytes
    assert first <= 128 * KIB < second <= 256 * KIB
    with pytest.raises(ConfigError, match=r"reserve_bytes=\[1, 2, 3\]: 3 numbers for 2 devices"):
        LayerStreamer.from_checkpoint(manifest, reserve_bytes=[1, 2, 3])
    with pytest.raises(ConfigError, match="reserve_bytes='a lot': must be"):
        LayerStreamer.from_checkpoint(manifest, reserve_bytes=[1, "a lot"])


def made_up(sizes: list[int]) -> Manifest:
    """A manifest of layers of these sizes, in no file."""
    layers = []
    for i, size in enumerate(sizes):
        spec = TensorSpec("w", torch.uint8, (size * KIB,), NOWHERE, 0, size * KIB)
        layers.append(LayerSpec(i, FrozenMapping({"w": spec})))
    files: Any = FrozenMapping({NOWHERE: None})
    return Manifest(NOWHERE, "safetensors", tuple(layers), FrozenMapping({}), files)


@given(
    sizes=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=7), min_size=1, max_size=3),
    kept=st.tuples(st.integers(0, 100), st.integers(0, 100)),
    budget=st.integers(0, 600),
    n_gpu=st.sampled_from([None, 0, 1]),
    host=st.sampled_from([None, 1000, 4000]),
)
def test_no_device_holds_more_than_its_budget_whatever_the_parts_are(
    sizes: list[list[int]], kept: tuple[int, int], budget: int, n_gpu: int | None, host: int | None
) -> None:
    devices = FakeDevice.several(2, seed=3)
    there = (kept[0] * KIB, kept[1] * KIB)
    options = Options(n_gpu=n_gpu, device_budget=budget * KIB, n_cpu_pinned=1)
    if host is not None:
        options["host_budget"] = host * KIB
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("layer_streamer.preview.open_devices", lambda names: devices)
        patched.setattr("layer_streamer.assembly.OpenFiles", NoFiles)
        patched.setattr(share, "LayerStreamer", Noted)
        parts = [share.part_of(made_up(some), options) for some in sizes]
        try:
            streamers = opened(parts, there)
        except ConfigError as error:
            least = share.total([part.least for part in parts], there)
            hosts = sum(part.host_nbytes for part in parts)
            assert max(least) > budget * KIB or (host or 0) * KIB < hosts, str(error)
            return
    for device in (0, 1):
        taken = sum(s.plan.placement.device_bytes[device] for s in streamers)
        assert taken + there[device] <= budget * KIB
    if host is not None:
        assert sum(s.plan.placement.host_bytes for s in streamers) <= host * KIB


class NoFiles:
    """Of a manifest that is in none."""

    def __init__(self, files: object) -> None:
        self.files = files

    def cached_share(self, extents: object) -> float:
        return 1.0

    def close(self) -> None:
        return
