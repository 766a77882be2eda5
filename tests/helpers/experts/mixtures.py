"""Checkpoints with experts, in each layout, and what their experts are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from checkpoints import random_tensor, tensor_bytes, write_safetensors
from fake_device import FakeDevice
from support import open_checkpoint

from layer_streamer import LayerStreamer
from layer_streamer.devices.device import CpuDevice

LAYERS, EXPERTS = 3, 7
UP, DOWN = (11, 34), (34, 11)

Experts = dict[tuple[int, int, str], torch.Tensor]
"""By layer, expert and bank."""


def alone(directory: Path) -> Experts:
    """Each expert's tensors by themselves, in two files, one of them packed beside scales."""
    found, files = Experts(), [dict[str, torch.Tensor](), dict[str, torch.Tensor]()]
    for i in range(LAYERS):
        files[0][f"model.layers.{i}.norm.weight"] = random_tensor((34,), seed=i)
        for e in range(EXPERTS):
            for name, shape, dtype in (
                ("up.weight_packed", UP, torch.int32),
                ("up.weight_scale", (3, 5), torch.bfloat16),
                ("down.weight", DOWN, torch.float16),
            ):
                tensor = random_tensor(shape, dtype, seed=1 + len(found))
                found[i, e, f"mlp.experts.{name}"] = tensor
                files[(i + e) % 2][f"model.layers.{i}.mlp.experts.{e}.{name}"] = tensor
    for number, tensors in enumerate(files, 1):
        write_safetensors(directory / f"model-0000{number}-of-00002.safetensors", tensors)
    return found


def stacked(directory: Path) -> Experts:
    """Stacked, with biases."""
    found, tensors = Experts(), dict[str, torch.Tensor]()
    for i in range(LAYERS):
        tensors[f"model.layers.{i}.mlp.router.weight"] = random_tensor((EXPERTS, 34), seed=i)
        for name, shape in (("up_proj", UP), ("up_proj_bias", (11,)), ("down_proj", DOWN)):
            whole = random_tensor((EXPERTS, *shape), torch.bfloat16, seed=1 + len(tensors))
            tensors[f"model.layers.{i}.mlp.experts.{name}"] = whole
            found |= {(i, e, f"mlp.experts.{name}"): whole[e] for e in range(EXPERTS)}
    write_safetensors(directory / "model.safetensors", tensors)
    return found


def unlike(directory: Path) -> Experts:
    """Of two kinds: the first layer has wider ones; the last has none."""
    found, tensors = Experts(), dict[str, torch.Tensor]()
    for i in range(LAYERS):
        tensors[f"model.layers.{i}.norm.weight"] = random_tensor((34,), seed=i)
        for e in range(EXPERTS if i < LAYERS - 1 else 0):
            tensor = random_tensor((5, 40 if i else 64), seed=1 + len(found))
            found[i, e, "mlp.experts.up.weight"] = tensor
            tensors[f"model.layers.{i}.mlp.experts.{e}.up.weight"] = tensor
    write_safetensors(directory / "model.safetensors", tensors)
    return found


LAYOUTS = {"alone": alone, "stacked": stacked, "unlike": unlike}


def reading() -> FakeDevice:
    """A device that cannot copy from mapped files."""
    device = FakeDevice(1)
    device.maps_files = False  # type: ignore[misc]
    return device


DEVICES = {"cpu": CpuDevice, "mapped": lambda: FakeDevice(1), "read": reading}


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and tensor_bytes(one) == tensor_bytes(other)


def opened(path: Path, kind: str = "cpu", slots: int | None = 3, **options: Any) -> LayerStreamer:
    given = {"experts": "demand", "expert_slots": slots, "read_threads": 2} | options
    return open_checkpoint(DEVICES[kind](), path, **given)


def check(streamer: LayerStreamer, expected: Experts, asked: Sequence[Sequence[int]]) -> None:
    """One pass that asks each layer for some experts, and compares their bytes."""
    device: Any = streamer._devices[0]
    for layer_idx, weights in streamer.sweep():
        experts = weights.experts  # type: ignore[attr-defined]
        if experts is None:
            continue
        for part in experts.parts(asked[layer_idx]):
            slots = experts.load(part).tolist()
            if isinstance(device, FakeDevice):
                device.drain()
            for expert, slot in zip(part, slots, strict=True):
                for name in experts.names:
                    wanted = expected[layer_idx, expert, name]
                    found = experts.bank(name)[slot].cpu()
                    assert found.dtype == wanted.dtype and same_bytes(found, wanted)
