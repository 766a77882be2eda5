"""Products of the processor beside copies: rates, their record, and "auto" that goes by it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from fake_device import FakeDevice
from probing import KIB, TINY, limits_with
from support import open_checkpoint

from layer_streamer import ConfigError
from layer_streamer.machine.limits import (
    MachinePart,
    ProductRate,
    decode,
    encode,
)
from layer_streamer.measuring import probe_products
from layer_streamer.measuring.probe_config import Journal
from layer_streamer.measuring.probe_products import measure_products
from layer_streamer.measuring.probe_table import describe


def test_products_of_each_count_of_tokens_are_measured_beside_copies() -> None:
    device = FakeDevice(0, eager=1.0)
    threads = torch.get_num_threads()
    rates = measure_products(device, TINY, 256 * KIB, Journal())
    assert [rate.tokens for rate in rates] == [1, 8]
    assert all(rate.bytes_per_s > 0 and rate.copies > 0 for rate in rates)
    assert torch.get_num_threads() == threads
    device.drain()
    assert not device.errors and not device._pinned


def test_an_error_of_a_product_ends_the_copies_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise MemoryError("no room for a product")

    monkeypatch.setattr(probe_products.F, "linear", fail)
    device = FakeDevice(0, eager=1.0)
    with pytest.raises(MemoryError, match="no room"):
        measure_products(device, TINY, 256 * KIB, Journal())
    assert not [t for t in threading.enumerate() if t.name.startswith("layer-streamer")]
    device.drain()
    assert not device._pinned


def test_the_record_and_the_table_have_products() -> None:
    limits = limits_with((ProductRate(1, 60e9, 48e9), ProductRate(8, 55e9, 49e9)))
    document = json.loads(json.dumps(encode(limits.machine)))
    assert decode(document, MachinePart) == limits.machine
    assert limits.product_rate("cpu", 8) == ProductRate(8, 55e9, 49e9)
    assert limits.product_rate("cpu", 3) is None is limits.product_rate("cuda:0")
    lines = describe(limits).splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.split()[:3] == ["products,", "1", "token"]]
    assert lines[at].split()[-1] == "60.00" and lines[at + 1].split()[-1] == "48.00"


@pytest.mark.parametrize(
    ("products", "copies", "count"), [(50e9, 50e9, 6), (150e9, 50e9, 9), (1e9, 50e9, 0)]
)
def test_auto_shares_layers_out_so_that_link_and_processor_end_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, products: float, copies: float, count: int
) -> None:
    tiny_checkpoint(tmp_path, 12, hidden=40)
    limits = limits_with((ProductRate(1, products, copies),))
    monkeypatch.setattr("layer_streamer.assembly.load_limits", lambda path, **options: limits)
    options: dict[str, Any] = {"read_mode": "mapped", "n_gpu": 1, "host_layers": "auto"}
    with open_checkpoint(FakeDevice(1), tmp_path, **options) as streamer:
        assert len(streamer.plan.host_layers) == count
        both = streamer.plan.predicted_on_host
        assert (both is not None) == bool(count)
        if both is not None:  # as even as whole layers are
            assert both[0] == pytest.approx(both[1], rel=2 / count)
            assert f"with {count} layers computed in host memory" in str(streamer.plan)
        slots = sum(streamer.plan.placement.device_bytes)
        each = max(size.device_nbytes for size in streamer.plan.sizes)
    # Of those alone that the device has no room for.
    options["device_budget"] = slots + 6 * each
    with open_checkpoint(FakeDevice(1), tmp_path, **options) as streamer:
        assert len(streamer.plan.host_layers) == pytest.approx(count / 2, abs=0.5)


def test_auto_without_a_probe_says_what_measures(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, 4, hidden=40)
    with pytest.raises(ConfigError, match="layer-streamer probe does"):
        open_checkpoint(FakeDevice(1), tmp_path, host_layers="auto")
    with open_checkpoint(None, tmp_path, host_layers="auto") as streamer:
        assert streamer.plan.host_layers == ()


def test_auto_leaves_a_pass_that_reads_from_disk_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint(tmp_path, 4, hidden=40)
    limits = limits_with((ProductRate(1, 50e9, 50e9),))
    monkeypatch.setattr("layer_streamer.assembly.load_limits", lambda path, **options: limits)
    options: dict[str, Any] = {"n_cpu_pinned": 1, "host_layers": "auto"}
    with open_checkpoint(FakeDevice(1), tmp_path, **options) as streamer:
        assert streamer.plan.host_layers == ()
