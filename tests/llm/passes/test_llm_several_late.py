"""Passes over devices that work as late as waits permit: whole engines, interrupted at will."""

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

from layer_streamer.llm.drafts.tree import ROOT, Tree
from layer_streamer.llm.kv.cache import KVCache
from layer_streamer.llm.kv.host_tiers import HostTiers
from layer_streamer.llm.kv.moves import Move
from layer_streamer.llm.on_device.side import DeviceSide
from layer_streamer.llm.passes.chunking import Chunking
from layer_streamer.llm.passes.runner import Runner

AWAY = (0, 1, 2, 3)
"""Of five layers, those with keys and values in host memory: two of each of two devices."""
TEXTS = [[[5, 6, 7] * 9, [8], [9], [10, 11], [12]], [[20] * 30, [21], [22, 23], [24], [25]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    network = tiny_model("llama", num_hidden_layers=5, max_position_embeddings=256)
    return tiny_checkpoint(tmp_path_factory.mktemp("late"), network), network.config


@pytest.fixture(scope="module")
def expected(model: tuple[Path, Any]) -> list[torch.Tensor]:
    with open_runner(*model, tokens=1024, max_rows=2, chunking=Chunking(16)) as runner:
        return tell(runner, ())


TREE = Tree((41, 42, 43), (ROOT, 0, 0))
"""A draft in every second pass, of which the first and the last token follow."""


def tell(runner: Runner, transfers: Sequence[LateTransfers]) -> list[torch.Tensor]:
    """The logits of two rows' passes, each begun anew until no interrupt comes."""
    rows = [row for row in (runner.kv.rows.add(100) for _ in TEXTS) if row is not None]
    found = []
    for step in range(len(TEXTS[0])):
        entries = [(row, text[step]) for row, text in zip(rows, TEXTS, strict=True)]
        drafts = [TREE] * len(rows) if step % 2 else None
        if drafts:
            entries = [(row, [*ids, *TREE.tokens]) for row, ids in entries]
        chances = [some.interrupts for some in transfers]
        while True:
            try:
                found.append(runner.forward(entries, drafts=drafts))
                break
            except Interrupted:
                for some in transfers:
                    some.interrupts /= 2
        for some in transfers:
            some.interrupts = 0
        if drafts:
            runner.kv.move([Move(row, row.length - 2, (row.length - 1,)) for row in rows])
            for row in rows:
                runner.kv.rows.truncate(row, row.length - 1)
        for some, chance in zip(transfers, chances, strict=True):
            some.interrupts = chance
    return found


@contextmanager
def late(
    model: tuple[Path, Any], seed: int, missing: tuple[str, str] | None = None, count: int = 2
) -> Iterator[tuple[Runner, list[LateTransfers]]]:
    """A runner over late devices, of which the second leaves a wait out. Torch works at once, so
    what it works on is forced by what it would be ordered behind."""
    devices = FakeDevice.several(count, seed)
    lacking = (None, missing, None)
    transfers = [LateTransfers(devices[n], seed + n, lacking[n]) for n in range(count)]
    take, head, opened = DeviceSide.take, DeviceSide.head, KVCache.open

    def forced(side: DeviceSide, x_ND: torch.Tensor) -> torch.Tensor:
        devices[side.number].current_stream().synchronize()
        return take(side, x_ND)

    def forced_head(side: DeviceSide, *given: Any) -> torch.Tensor:
        devices[side.number].current_stream().synchronize()
        return head(side, *given)

    def forced_open(kv: KVCache, layer_idx: int) -> torch.Tensor:
        memory = opened(kv, layer_idx)
        devices[layer_idx % count].current_stream().synchronize()
        return memory

    options = {
        "device": ["cpu"] * count, "host_layers": AWAY, "n_gpu": seed % 3, "n_cpu_pinned": 1,
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


SEEDS = [
    pytest.param(2, range(4), id="two"),
    pytest.param(2, range(4, 100), id="two, many", marks=pytest.mark.slow),
    pytest.param(3, range(50), id="three", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("count", "seeds"), SEEDS)
def test_late_devices_give_the_logits_of_one(
    model: tuple[Path, Any], expected: list[torch.Tensor], count: int, seeds: range
) -> None:
    for seed in seeds:
        with late(model, seed, count=count) as (runner, transfers):
            assert same(tell(runner, transfers), expected), seed


@pytest.mark.parametrize(("count", "seeds"), SEEDS)
def test_interrupts_anywhere_on_late_devices_leave_the_rows_as_they_were(
    model: tuple[Path, Any], expected: list[torch.Tensor], count: int, seeds: range
) -> None:
    for seed in seeds:
        with late(model, seed, count=count) as (runner, transfers):
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
