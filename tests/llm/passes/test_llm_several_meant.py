"""Passes over a CPU and a device without numbers: torch refuses operands of two devices, as it does
those of two GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapters_made import adapted
from assets import tiny_checkpoint, tiny_model
from packed_models import write_packed

from layer_streamer import Manifest, read_manifest
from layer_streamer.llm.adapters.reading import read_adapter
from layer_streamer.llm.drafts.opening import FEW
from layer_streamer.llm.drafts.own_weights import own_weights, round_layers
from layer_streamer.llm.drafts.tree import NOTHING, Tree
from layer_streamer.llm.kv.cache import KVCache, KVLayout
from layer_streamer.llm.kv.moves import Move
from layer_streamer.llm.metadata import load_config
from layer_streamer.llm.models.names import weight_names
from layer_streamer.llm.on_device.side import DeviceSide
from layer_streamer.llm.passes.batch import Batch
from layer_streamer.llm.passes.chunking import Chunking
from layer_streamer.llm.passes.pooling import vectors
from layer_streamer.llm.passes.runner import Runner
from layer_streamer.llm.weights.scale_check import ScaleCheck

TWO = (torch.device("cpu"), torch.device("meta"))
PIECES = 3
"""Of the output head."""


class Meant:
    """Layers of a checkpoint on both, and so many pieces of its head; none: it is loaded."""

    def __init__(self, manifest: Manifest, head: str, pieces: int) -> None:
        self.manifest, self._head = manifest, head
        self.device, self.devices = TWO[0], TWO
        self.experts_stay, self.most_on_device = False, 0
        self.num_steps, self._pieces = manifest.num_layers + pieces, pieces
        self.loaded: list[tuple[str, torch.device]] = []
        self.plan = SimpleNamespace(tiers=("disk",) * self.num_steps, expert_slots=0)

    def load_static(self, name: str, device: torch.device | None = None) -> torch.Tensor:
        self.loaded.append((name, device or TWO[0]))
        return torch.ones(self.manifest.static[name].shape, device=device or TWO[0])

    def host_tensor(self, name: str) -> torch.Tensor:
        return torch.ones(self.manifest.static[name].shape, device="cpu")

    def run_pass(self, x: Any, layer_fn: Any, *, on_host: bool = True) -> Any:
        rows, width = self.manifest.static[self._head].shape
        for step in range(self.num_steps):
            shapes = {self._head: ((rows // max(self._pieces, 1), width), torch.float32)}
            if step < self.manifest.num_layers:
                specs = self.manifest.layers[step].tensors.items()
                shapes = {key: (spec.shape, spec.dtype) for key, spec in specs}
            tensors = {
                key: torch.ones(shape, dtype=dtype, device=TWO[step % 2])
                for key, (shape, dtype) in shapes.items()
            }
            x = layer_fn(x, tensors, step)
        return x


@contextmanager
def meant(path: Path, pieces: int = PIECES, adapter: Path | None = None) -> Iterator[Runner]:
    """A runner over both. What comes back from the device without numbers is zeros."""
    config, manifest = load_config(path), read_manifest(path)
    names = weight_names(manifest, config)
    if adapter is not None:
        names = replace(names, adapter=read_adapter(adapter, names, config)[0])
    take, head, to = DeviceSide.take, DeviceSide.head, torch.Tensor.to

    def back(some: torch.Tensor) -> torch.Tensor:
        return torch.zeros(some.shape, dtype=some.dtype, device="cpu") if some.is_meta else some

    def sent(some: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        return to(back(some) if TWO[0] in given else some, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", sent)
        patch.setattr(ScaleCheck, "see", lambda *given: None)
        patch.setattr(DeviceSide, "head", lambda side, *given: back(head(side, *given)))
        patch.setattr(DeviceSide, "take", lambda side, x: take(side, x if side.number else back(x)))
        kv = KVCache(config, KVLayout(tokens=1024, max_rows=4, dtype=torch.float32), TWO)
        chunking, layers = Chunking(tokens=16, group_rows=True), Meant(manifest, names.head, pieces)
        given: Any = layers
        yield Runner(given, config, names, kv, dtype=torch.float32, chunking=chunking)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    window = {"sliding_window": 20, "use_sliding_window": True, "max_window_layers": 2}
    network = tiny_model("qwen2", num_hidden_layers=5, vocab_size=510, **window)
    return tiny_checkpoint(tmp_path_factory.mktemp("meant"), network)


def run(runner: Runner) -> None:
    """Prompts in chunks, rows that decode together, a draft that is a tree, and what it leaves."""
    rows = [row for row in (runner.kv.rows.add(200) for _ in range(3)) if row is not None]
    for counts in ((40, 3, 17), (1, 1, 1), (1, 20, 1)):
        entries = [(row, [7] * n) for row, n in zip(rows, counts, strict=True)]
        logits = runner.forward(entries)
        assert logits.shape == (3, 510) and logits.device == TWO[0]
    first, second, third = rows
    asked, drafts = [(first, [4, 5, 6, 7]), (second, [8])], [Tree((5, 6, 7), (-1, 0, 0)), NOTHING]
    assert runner.forward(asked, drafts=drafts).shape == (5, 510)
    runner.kv.move([Move(first, first.length - 3, (first.length - 1,))])
    assert runner.forward([(third, [1, 2])], every_position=True).shape == (2, 510)


def test_nothing_is_computed_of_tensors_of_two_devices(model: Path) -> None:
    with meant(model) as runner:
        run(runner)
        assert [side.device for side in runner.sides] == list(TWO)
        assert {memory.device for memory in runner.kv._memory.values()} == set(TWO)


def test_rounded_layers_draft_where_their_keys_and_values_are(model: Path) -> None:
    with meant(model, pieces=0) as runner:
        run(runner)
        layers: Any = runner.streamer
        own = own_weights(layers.manifest, runner.names, torch.float32)
        held = round_layers(layers, runner.names, own, torch.float32)
        given = (runner.config, own.names, runner.kv)
        draft = Runner(held, *given, dtype=torch.float32, chunking=Chunking(FEW))
        for i, tensors in enumerate(held._tensors):
            assert {tensor.device for tensor in tensors.values()} == {TWO[i % 2]}
            assert sum(tensor.nbytes for tensor in tensors.values()) == own.nbytes[i]
        row = next(iter(runner.kv.rows))
        assert draft.forward([(row, [5, 6, 7])]).device == TWO[0]
        head = {device for name, device in layers.loaded if name == runner.names.head}
        assert head == {TWO[0]}, "one has it"


@pytest.mark.parametrize("packing", ["ct4-g32", pytest.param("ct8-g32", marks=pytest.mark.slow)])
def test_nor_of_packed_weights_beside_an_adapter(tmp_path: Path, packing: str) -> None:
    network = tiny_model("qwen2", hidden_size=128, intermediate_size=128, vocab_size=510)
    adapted(network, tmp_path / "adapter")
    path = write_packed(tmp_path / "base", network, packing)
    with meant(path, adapter=tmp_path / "adapter") as runner:
        run(runner)
        first, second = (side._names.adapter for side in runner.sides)
        assert first is not None and second is not None
        for there, adapter in zip(TWO, (first, second), strict=True):
            pairs = [pair for layer in adapter.layers for pair in layer.values()]
            assert {pair.up.parts["weight"].device for pair in pairs} == {there}
        (found,) = vectors(runner, [[5, 6, 7]])
        assert found.shape == (128,)


@pytest.mark.parametrize("left_out", ["positions", "attention"])
def test_what_is_another_devices_would_be_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    """Mutation: torch would say so."""
    with meant(model) as runner:
        if left_out == "positions":
            monkeypatch.setattr(Batch, "on", lambda batch, device: batch)
        else:
            first = runner.sides[0]
            monkeypatch.setattr(runner.sides[1], "rotation", first.rotation)
            monkeypatch.setattr(runner.sides[1], "_norm", first._norm)
        with pytest.raises(RuntimeError, match=r"device|meta"):
            run(runner)
