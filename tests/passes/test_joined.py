"""Tensors made of several of the checkpoint's, laid end to end: exact on every route."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_safetensors
from routes import default_params, make_devices, open_route
from support import FailingDisk, Witness, raw

from layer_streamer import LayerStreamer, Manifest, ReadError, TensorSpec, read_manifest

NUM_LAYERS, EXPERTS = 9, 3


def write_experts(path: Path) -> dict[str, torch.Tensor]:
    """Layers of experts, of odd sizes: no expert's tensors are adjacent."""
    made = torch.Generator().manual_seed(5)
    tensors = {}
    for i in range(NUM_LAYERS):
        head = f"model.layers.{i}."
        for part in ("w1", "w2", "w3"):
            for e in range(EXPERTS):
                shape = (45, 37 + i % 2)
                tensors[f"{head}{e}.{part}"] = torch.randn(shape, generator=made).bfloat16()
        tensors[head + "norm"] = torch.randn(9, generator=made)
    write_safetensors(path / "model.safetensors", tensors, padding=3)
    return tensors


def join(specs: list[TensorSpec], name: str) -> TensorSpec:
    """One tensor of equal ones, stacked."""
    shape = (len(specs), *specs[0].shape)
    nbytes = sum(spec.nbytes for spec in specs)
    return replace(specs[0], name=name, shape=shape, nbytes=nbytes, pieces=tuple(specs))


def joined(path: Path) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """A manifest of fused experts, and what its tensors are."""
    tensors = write_experts(path)
    manifest, layers, expected = read_manifest(path), [], {}
    for layer in manifest.layers:
        head, specs = f"model.layers.{layer.layer_idx}.", layer.tensors
        order = {
            "gate_up": [f"{e}.{part}" for e in range(EXPERTS) for part in ("w1", "w3")],
            "down": [f"{e}.w2" for e in reversed(range(EXPERTS))],
        }
        fused = {key: join([specs[n] for n in names], key) for key, names in order.items()}
        layers.append(replace(layer, tensors={"norm": specs["norm"], **fused}))
        expected[head + "norm"] = tensors[head + "norm"]
        for key, names in order.items():
            expected[head + key] = torch.stack([tensors[head + name] for name in names])
    return replace(manifest, layers=tuple(layers)), expected


@pytest.mark.parametrize("name", default_params())
def test_joined_tensors_are_exact_whatever_way_they_take(tmp_path: Path, name: str) -> None:
    manifest, expected = joined(tmp_path)
    devices = make_devices(name)
    with open_route(name, manifest, devices) as streamer:  # type: ignore[arg-type]
        witness = Witness(devices, expected)
        for _ in range(3):
            streamer.run_pass(None, witness)
        for device in devices if isinstance(devices, list) else [devices]:
            if hasattr(device, "drain"):
                device.drain()
        witness.check()


@pytest.mark.parametrize("budget", [None, "1GiB"])
def test_joined_tensors_are_cast_as_all_others(tmp_path: Path, budget: Any) -> None:
    manifest, expected = joined(tmp_path)
    with LayerStreamer.from_checkpoint(
        manifest, device="cpu", dtype=torch.float32, device_budget=budget
    ) as streamer:
        for i, weights in streamer.sweep():
            for key, tensor in weights.items():
                stored = expected[f"model.layers.{i}.{key}"]
                assert torch.equal(tensor, stored.float())


def test_a_read_error_in_a_piece_names_the_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, _ = joined(tmp_path)
    piece = manifest.layers[2].tensors["gate_up"].pieces[3]
    disk = FailingDisk(piece.offset, 5)
    monkeypatch.setattr("os.preadv", disk)
    with LayerStreamer.from_checkpoint(
        manifest, device="cpu", read_mode="buffered", read_chunk=4096
    ) as streamer:
        disk.times = 1000
        with pytest.raises(ReadError, match=r"layer 2, tensor 'model.layers.2"):
            streamer.run_pass(None, lambda x, weights, i: x)


def test_a_static_tensor_may_be_joined(tmp_path: Path) -> None:
    manifest, expected = joined(tmp_path)
    fused = manifest.layers[0].tensors["gate_up"]
    manifest = replace(manifest, static={"gate_up": fused})
    with LayerStreamer.from_checkpoint(manifest, device="cpu") as streamer:
        for tensor in (streamer.load_static("gate_up"), streamer.host_tensor("gate_up")):
            assert torch.equal(raw(tensor), raw(expected["model.layers.0.gate_up"]))
