"""The order of experts' copies and of what computes with them, over a device that works late."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_safetensors
from fake_device import FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from ordering import HANG_SECONDS, open_on

from layer_streamer import StreamerError
from layer_streamer.passes.expert_copies import ExpertCopies
from layer_streamer.passes.expert_store import ExpertStore
from layer_streamer.transport.fetcher import Fetcher

LAYERS, EXPERTS = 3, 7
NAMES = ("mlp.experts.down.weight", "mlp.experts.up.weight")


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {}
    for i in range(LAYERS):
        found[f"model.layers.{i}.norm.weight"] = torch.rand(33)
        for e in range(EXPERTS):
            for name in ("up", "down"):
                found[f"model.layers.{i}.mlp.experts.{e}.{name}.weight"] = torch.rand(9, 70)
    return found


TENSORS = tensors()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_safetensors(tmp_path_factory.mktemp("experts") / "model.safetensors", TENSORS)


class LaunchFailed(Exception):
    """What layer_fn raises after it launched work."""


class Mixture:
    """Launches work that looks, when it runs, at the experts that it asked for."""

    def __init__(self, device: FakeDevice, seed: int) -> None:
        self._device, self._random = device, random.Random(seed)
        self.streams = [device.default_stream, device.new_stream(), device.new_stream()]

    def run(self, streamer: Any, passes: int) -> None:
        store = streamer._parts.experts
        for number in range(passes):
            # torch deals streams out in turn: the caller may be given the one for copies.
            mine = [*self.streams, store.copies.stream] if number % 3 == 1 else self.streams
            fails_at = self._random.choice([None, None, 0, 2])
            with self._device.on(self._random.choice(mine)):
                try:
                    streamer.run_pass(0, lambda x, w, i, f=fails_at: self._layer(w, i, f))
                except LaunchFailed:
                    continue

    def _layer(self, weights: Any, layer_idx: int, fails_at: int | None) -> int:
        dice, experts = self._random, weights.experts
        asked = [dice.randrange(EXPERTS) for _ in range(dice.randint(0, 9))]
        if dice.random() < 0.4:
            some = experts.whole() if dice.random() < 0.2 else experts.rounds(asked)
            for part, slots in some:
                if dice.random() < 0.1:
                    experts.hint([dice.randrange(EXPERTS)], layer=dice.randrange(LAYERS))
                self._use(experts, layer_idx, part, slots)
                if dice.random() < 0.1:
                    break
            asked = asked[:4]
        for part in experts.parts(asked):
            wanted = dice.choices(part, k=len(part)) + part
            slots = experts.load(torch.tensor(wanted) if dice.random() < 0.5 else wanted)
            if dice.random() < 0.3:  # before this one is computed with
                soon = [dice.randrange(EXPERTS) for _ in range(dice.randint(0, 4))]
                experts.hint(soon, layer=dice.randrange(LAYERS))
            self._use(experts, layer_idx, wanted, slots)
        if layer_idx == fails_at:
            raise LaunchFailed
        return 0

    def _use(self, experts: Any, layer_idx: int, wanted: list[int], slots: torch.Tensor) -> None:
        for expert, slot in zip(wanted, slots.tolist(), strict=True):
            for name in NAMES:
                look = self._look(experts.bank(name)[slot], layer_idx, expert, name)
                self._device.launch(look)

    def _look(
        self, found: torch.Tensor, layer_idx: int, expert: int, name: str
    ) -> Callable[[], None]:
        key = f"model.layers.{layer_idx}.{name.replace('experts.', f'experts.{expert}.')}"

        def look() -> None:
            if not torch.equal(found, TENSORS[key]):
                self._device.errors.append(f"{key}: not its own bytes")

        return look


def find_errors(checkpoint: Path, seed: int, slots: int, *, maps: bool = True) -> list[str]:
    """What the work of some passes over a fake device saw wrong."""
    device = FakeDevice(seed)
    device.maps_files = maps  # type: ignore[misc]
    mixture = Mixture(device, seed)
    with device.on(random.Random(seed).choice(mixture.streams)):
        streamer = open_on(
            device, checkpoint, {"experts": "demand", "expert_slots": slots, "n_gpu": 1}
        )
    guard = threading.Timer(HANG_SECONDS, streamer.close)
    guard.start()
    try:
        with streamer:
            mixture.run(streamer, passes=5)
    finally:
        guard.cancel()
    device.drain()
    return device.errors


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1 << 32),
    slots=st.sampled_from([1, 2, 3, EXPERTS, EXPERTS + 2, LAYERS * EXPERTS]),
    maps=st.booleans(),
)
def test_work_launched_on_experts_only_ever_sees_their_own_bytes(
    checkpoint: Path, seed: int, slots: int, maps: bool
) -> None:
    assert find_errors(checkpoint, seed, slots, maps=maps) == []


WAITS = {
    "copies for what used the memory before": (ExpertCopies, "follow_allocation", True),
    "copies for the use of a slot": (ExpertCopies, "follow_use", True),
    "copies for those of the stream before": (ExpertCopies, "follow_stream", True),
    "the caller for copies": (ExpertCopies, "order_after_copies", True),
    "copies of what was read for the use of a slot": (ExpertCopies, "follow_use", False),
    "the caller for copies of what was read": (ExpertCopies, "order_after_copies", False),
    "reads for the copies out of where they go": (Fetcher, "wait_copied", False),
}


@pytest.mark.parametrize("wait", WAITS)
def test_each_wait_of_experts_is_needed(
    checkpoint: Path, wait: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, maps = WAITS[wait]
    monkeypatch.setattr(owner, name, lambda *_: None)

    def sees(seed: int) -> bool:
        try:
            return bool(find_errors(checkpoint, seed, 1 + seed % 4, maps=maps))
        except (StreamerError, RuntimeError, IndexError):
            return True

    assert any(map(sees, range(200))), "taken out, nothing is wrong"


@pytest.mark.parametrize("waits", [True, False])
def test_copies_of_a_load_that_was_interrupted_have_happened_before_page_locks_go(
    checkpoint: Path, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if not waits:
        monkeypatch.setattr(ExpertStore, "wait_copied", lambda store: None)
    device = FakeDevice(0, eager=0.0)
    streamer = open_on(device, checkpoint, {"experts": "demand", "expert_slots": 3})
    with monkeypatch.context() as patched:
        patched.setattr(ExpertCopies, "order_after_copies", interrupt)
        with pytest.raises(KeyboardInterrupt):
            streamer.run_pass(0, lambda x, w, i: w.experts.load([1, 4]))
    streamer.close()
    assert bool(device.errors) != waits
