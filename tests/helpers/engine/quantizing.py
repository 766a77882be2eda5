"""Quantized tiny models for the tests of quantize.py, and what they hold."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from zoo import reference

from layer_streamer.llm.opening import Model
from layer_streamer.llm.quantize.codes import decode, unpack_codes
from layer_streamer.llm.quantize.moments import Watched
from layer_streamer.llm.quantize.texts import TextPass, float_unpacker, open_streamer
from layer_streamer.llm.quantize.unfinished import INDEX
from layer_streamer.tools import cli

CPU = torch.device("cpu")


def run(*arguments: object) -> int:
    """The script's exit code, on the CPU."""
    return cli.main(["quantize", *(str(argument) for argument in arguments), "--device", "cpu"])


def contents(directory: Path) -> dict[str, bytes]:
    """Name and bytes of every file."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model, as its index says."""
    index = json.loads((directory / INDEX).read_text())["weight_map"]
    files = {name: load_file(directory / name) for name in set(index.values())}
    found = {key: files[name][key] for key, name in index.items()}
    assert sum(map(len, files.values())) == len(found)
    return found


def weights(directory: Path, bits: int) -> dict[str, torch.Tensor]:
    """The floats that a model stands for, in float32, by the names that transformers has."""
    stored = tensors(directory)
    found = {name: tensor.float() for name, tensor in stored.items() if "weight_" not in name}
    for name, words in stored.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            rows, width = stored[f"{module}.weight_shape"].tolist()
            codes = unpack_codes(words, bits, width)
            assert codes.shape == (rows, width)
            found[f"{module}.weight"] = decode(codes, stored[f"{module}.weight_scale"])
    return found


def save(directory: Path, model: Any, dtype: torch.dtype = torch.float32) -> Path:
    """The model as a safetensors directory."""
    model.to(dtype).save_pretrained(directory)
    return directory


def load(directory: Path) -> Any:
    """transformers' model, decompressed, in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    reference(model, list(range(3, 9)), 5)  # the first pass is what decompresses
    return model


def read(path: Path) -> Model:
    """What describes a model."""
    return Model.read(path, lambda _: None)


def importance_of(model: Model, ids: list[int]) -> list[dict[str, torch.Tensor]]:
    """By layer and module."""
    found = []
    with open_streamer(model, CPU) as streamer, torch.inference_mode():
        unpacker = float_unpacker(model, CPU)
        text = TextPass(model, streamer, unpacker, ids)
        x_ND = text.embed()
        for layer_idx, tensors in streamer.sweep():
            layer = model.manifest.layers[layer_idx]
            watched = Watched(tensors, layer, model.names, unpacker)
            text.layer(x_ND, watched)
            found.append(dict(watched.importance()))
    return found


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C when the n-th file has been written, and not yet been given its name."""
    left = number
    fsync = os.fsync

    def sync(file: int) -> None:
        nonlocal left
        fsync(file)
        left -= 1
        if left == 0:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "fsync", sync)
