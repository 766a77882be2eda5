"""Passes over two devices that work as late as waits permit: whole engines, interrupted at will."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import open_runner, tiny_checkpoint, tiny_model
from fake_device import FakeDevice, opened_as
from late_transfers import Interrupted, LateTransfers
from ordering import HANG_SECONDS

from layer_streamer.llm.kv.cache import KVCache
from layer_streamer.llm.kv.host_tiers import HostTiers
from layer_streamer.llm.on_device.side import DeviceSide
from layer_streamer.llm.passes.chunking import Chunking
from layer_streamer.llm.passes.runner import Runner

AWAY = (0, 1, 2, 3)
"""Of five layers, those with keys and values in host memory: two of each device."""
TEXTS = [[[5, 6, 7] * 9, [8], [9], [10, 11], [12]], [[20] * 30, [21], [22, 23], [24], [25]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    network = tiny_model("llama", num_hidden_layers=5, max_position_embeddings=256)
    return tiny_checkpoint(tmp_path_factory.mktemp("late"), network), network.config


@pytest.fixture(scope="module")
def expected(model: tuple[Path, Any]) -> list[torch.Tensor]:
    with open_runner(*model, tokens=1024, max_rows=2, chunking=Chunking(16)) as runner:
        return tell(runner, ())


def tell(runner: Runner, transfers: Sequence[LateTransfers]) -> list[torch.Tensor]:
    """The logits of two rows' passes, each begun anew until no interrupt comes."""
    rows = [runner.kv.rows.add(100) for _ in TEXTS]
    found = []
    for step in range(len(TEXTS[0])):
        entries = [(row, text[step]) for row, text in zip(rows, TEXTS, strict=True) if row]
        while True:
            try:
                found.append(runner.forward(entries))
                break
            except Interrupted:
                for some in transfers:
                    some.interrupts /= 2
        for some in transfers:
            some.interrupts = some.interrupts and 0.05
    return found


@contextmanager
def late(
    model: tuple[Path, Any], seed: int, missing: tuple[str, str] | None = None
) -> Iterator[tuple[Runner, list[LateTransfers]]]:
    """A runner over two late devices, of which the second leaves a wait out. Torch works at once,
    so what it works on is forced by what it would be ordered behind."""
    devices = FakeDevice.several(2, seed)
    lacking = (None, missing)
    transfers = [LateTransfers(devices[n], seed + n, lacking[n]) for n in range(2)]
    take, head, opened = DeviceSide.take, DeviceSide.head, KVCache.open

    def forced(side: DeviceSide, x_ND: torch.Tensor) -> torch.Tensor:
        devices[side.number].current_stream().synchronize()
        return take(side, x_ND)

    def forced_head(side: DeviceSide, *given: Any) -> torch.Tensor:
        devices[side.number].current_stream().synchronize()
        return head(side, *given)

    def forced_open(kv: KVCache, layer_idx: int) -> torch.Tensor:
        memory = opened(kv, layer_idx)
        devices[layer_idx % 2].current_stream().synchronize()
        return memory

    options = {
        "device": ["cpu", "cpu"], "host_layers": AWAY, "n_gpu": seed % 3, "n_cpu_pinned": 1,
        "tokens": 1024, "max_rows": 2, "chunking": Chunking(16), "read_threads": 2,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, opened_as(lambda number: devices[number]):
        patch.setattr(DeviceSide, "take", forced)
        patch.setattr(DeviceSide, "head", forced_head)
        patch.setattr(KVCache, "open", forced_open)
        with open_runner(*model, transfers=transfers, **options) as runner:
            guard = threading.Timer(HANG_SECONDS, runner.streamer.close)  # type: ignore[attr-defined]
            guard.start()
            try:
                yield runner, transfers
            finally:
                guard.cancel()
                devices[0].drain()
    assert devices[0].errors == []


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "seeds", [range(4), pytest.param(range(4, 100), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_two_late_devices_give_the_logits_of_one(
    model: tuple[Path, Any], expected: list[torch.Tensor], seeds: range
) -> None:
    for seed in seeds:
        with late(model, seed) as (runner, transfers):
            assert same(tell(runner, transfers), expected), seed


@pytest.mark.parametrize(
    "seeds", [range(4), pytest.param(range(4, 100), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_interrupts_anywhere_on_two_devices_leave_the_rows_as_they_were(
    model: tuple[Path, Any], expected: list[torch.Tensor], seeds: range
) -> None:
    for seed in seeds:
        with late(model, seed) as (runner, transfers):
            for some in transfers:
                some.interrupts = 0.05
            assert same(tell(runner, transfers), expected), seed


def test_a_second_device_whose_copies_do_not_wait_for_its_slots_gives_others(
    model: tuple[Path, Any], expected: list[torch.Tensor]
) -> None:
    """Mutation: the suite would see it."""

    def seen(seed: int) -> bool:
        with late(model, seed, ("copier", "drained")) as (runner, transfers):
            host = runner.kv.host
            assert isinstance(host, HostTiers)
            for slot in host.by_device[1]._slots:
                transfers[1].names[id(slot.drained)] = "drained"
            return not same(tell(runner, transfers), expected)

    assert any(seen(seed) for seed in range(200))
