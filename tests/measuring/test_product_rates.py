"""Products of an engine's own kernels beside copies: measured once, by name, device and threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from probing import KIB, TINY

from layer_streamer import ProductRate, product_rates
from layer_streamer.machine import products as record
from layer_streamer.machine.limits import machine_folder
from layer_streamer.machine.products import forget_products, load_products, save_products
from layer_streamer.measuring import products


class Kernels:
    """Products that do nothing, and what was asked of them."""

    def __init__(self) -> None:
        self.prepared: list[int] = []
        self.threads: set[str] = set()

    def __call__(self, nbytes: int) -> Any:
        self.prepared.append(nbytes)

        def multiply() -> int:
            self.threads.add(threading.current_thread().name)
            return 1000

        return multiply


@pytest.fixture(autouse=True)
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeDevice]]:
    """Two late devices, a probe's smallest settings, a record of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(products, "CONFIG", TINY)
    found = FakeDevice.several(2, 5)
    monkeypatch.setattr(products, "open_devices", lambda names: found[: len(names)])
    yield found
    found[0].drain()
    assert not found[0].errors and not found[0]._pinned


def test_what_is_on_record_is_not_measured_again() -> None:
    first, again, other = Kernels(), Kernels(), Kernels()
    found = product_rates(["cpu"], {"a": first})
    assert product_rates(["cpu"], {"a": again, "b": other}) == found | product_rates(
        ["cpu"], {"b": again}
    )
    assert first.prepared == other.prepared == [512 * KIB] and not again.prepared
    (rate,) = found["a"]
    assert rate.tokens == 1 and rate.bytes_per_s > 0 and rate.copies > 0
    assert threading.current_thread().name not in first.threads


def test_each_of_several_devices_has_its_copies() -> None:
    found = product_rates(["cpu", "cpu"], {"a": Kernels()})
    assert len(found["a"]) == 2


@pytest.mark.parametrize("changed", ["threads", "device", "torch", "forgotten"])
def test_rates_of_something_else_do_not_count(
    changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate, threads = ProductRate(1, 7e9, 5e9), torch.get_num_threads()
    save_products("cpu", threads, {"a": rate})
    assert load_products("cpu", threads) == {"a": rate}
    if changed == "torch":
        own = record.this_machine()
        other = type(own)(own.cpu, own.num_cores, own.gpus, own.driver, "0.0")
        monkeypatch.setattr(record, "this_machine", lambda: other)
    if changed == "forgotten":
        forget_products()
    threads += changed == "threads"
    assert load_products("cuda:0" if changed == "device" else "cpu", threads) == {}


def test_a_rate_that_is_measured_again_takes_the_place_of_the_old_one() -> None:
    for seconds in (1e9, 2e9):
        save_products("cpu", 1, {"a": ProductRate(1, seconds, 1e9), "b": ProductRate(1, 3e9, 1e9)})
    save_products("cpu", 2, {"a": ProductRate(1, 4e9, 1e9)})
    assert {name: rate.bytes_per_s for name, rate in load_products("cpu", 1).items()} == {
        "a": 2e9, "b": 3e9
    }  # fmt: skip


def test_the_record_keeps_the_newest_rates_when_there_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(record, "MOST_RATES", 2)
    for name in "abc":
        save_products("cpu", 1, {name: ProductRate(1, 1e9, 1e9)})
    assert set(load_products("cpu", 1)) == {"b", "c"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 1}', b"\xff" * 9, b"[" * 5000])
def test_a_record_that_is_damaged_is_measured_anew(
    content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = machine_folder(record.this_machine(), make=True) / "products.json"
    path.write_bytes(content)
    kernels = Kernels()
    product_rates(["cpu"], {"a": kernels})
    assert kernels.prepared and set(load_products("cpu", torch.get_num_threads()))
    assert "products.json: not used" in caplog.text


def test_an_error_of_a_kernel_comes_through_and_leaves_nothing() -> None:
    def fail() -> int:
        raise MemoryError("no room for a product")

    with pytest.raises(MemoryError, match="no room"):
        product_rates(["cpu"], {"a": lambda nbytes: fail})
    assert not [t for t in threading.enumerate() if t.name.startswith("layer-streamer")]
    assert load_products("cpu", torch.get_num_threads()) == {}


def test_a_record_that_cannot_be_written_is_said_and_rates_are_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(record, "write_atomically", refuse)
    assert product_rates(["cpu"], {"a": Kernels()})["a"]
    assert "the disk is full" in caplog.text
