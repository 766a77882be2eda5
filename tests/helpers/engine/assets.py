"""Real and tiny models that tests run on."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fetch_model import fetch
from one_sequence import OneSequence
from paths import ROOT
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from layer_streamer import LayerStreamer, read_manifest
from layer_streamer.llm.kv.cache import KVCache, KVLayout
from layer_streamer.llm.metadata import metadata_directory
from layer_streamer.llm.models.config import ModelConfig, model_config
from layer_streamer.llm.models.names import weight_names
from layer_streamer.llm.on_host.side import HostSide
from layer_streamer.llm.passes.chunking import Chunking
from layer_streamer.llm.passes.runner import Runner
from layer_streamer.llm.text.tokenizer import chat_ids, raw_ids

GOLDEN = json.loads((ROOT / "tests/data/smollm2.json").read_text())

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
"""A model of which each pass takes milliseconds; its head is larger than a layer."""


@functools.cache
def smollm2() -> Path:
    """The real model's GGUF file, downloaded once a machine; FetchError if it cannot be had."""
    return fetch()


@functools.cache
def smollm2_metadata() -> Path:
    """Directory of the real model's config and tokenizer."""
    return metadata_directory(read_manifest(smollm2()), lambda text: print(text, file=sys.stderr))


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Two threads on two busy cores wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def tiny_model(model_type: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A tiny transformers model with every parameter random: norms and biases that start as
    ones and zeros would hide that an engine leaves them out."""
    kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    config_class, model_class = kinds[model_type]
    torch.manual_seed(seed)
    model = model_class(config_class(**(TINY | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(-1.0, 1.0)
                parameter += 1.0 if name.endswith("norm.weight") else 0.0
            else:
                parameter.normal_(0.0, 0.2)
    return model


def tiny_checkpoint(directory: Path, model: Any) -> Path:
    """The model as a safetensors directory."""
    model.save_pretrained(directory)
    return directory


@contextmanager
def open_runner(
    path: Path,
    config: ModelConfig | Any,
    *,
    tokens: int = 64,
    max_rows: int = 1,
    dtype: torch.dtype = torch.float32,
    host_layers: Sequence[int] = (),
    computed: Sequence[int] = (),
    int8: bool = False,
    chunking: Chunking | None = None,
    transfers: Any = None,
    **options: Any,
) -> Iterator[Runner]:
    """A runner over a checkpoint; ``config`` is the engine's or a transformers one. Keys and values
    of ``host_layers`` are in host memory, and those of layers that are ``computed`` there."""
    if not isinstance(config, ModelConfig):
        config = model_config(config)
    names = weight_names(read_manifest(path), config)
    options = {"device": "cpu", "host_layers": computed} | options
    named = options["device"]
    devices = [torch.device(name) for name in ([named] if isinstance(named, str) else named)]
    layout = KVLayout(
        tokens=tokens,
        max_rows=max_rows,
        dtype=dtype,
        host_layers=sorted({*host_layers, *computed}),
        int8=int8,
    )
    kv = KVCache(config, layout, devices, transfers)
    on_copy = kv.host.prefetch if kv.host is not None else None
    runner = None
    try:
        with LayerStreamer.from_checkpoint(
            path, dtype=names.cast(devices[0], dtype), tail=[names.head], on_copy=on_copy, **options
        ) as streamer:
            kv.allocate([slots.count for slots in streamer.plan.placement.device_slots])
            runner = Runner(streamer, config, names, kv, dtype=dtype, chunking=chunking)
            if streamer.plan.host_layers:
                runner.host = HostSide(runner, streamer)
                # By the tokens alone: what is measured on a busy machine decides nothing.
                runner.host.choice.there = lambda tokens: tokens <= 8  # type: ignore[method-assign]
            yield runner
    finally:
        if runner is not None:
            runner.close()
        kv.close()


@contextmanager
def open_engine(
    path: Path, config: ModelConfig | Any, *, max_positions: int = 64, **options: Any
) -> Iterator[OneSequence]:
    """One sequence on a runner over a checkpoint."""
    with open_runner(path, config, tokens=max_positions, **options) as runner:
        yield OneSequence(runner)


def reference_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """transformers' logits after every token: (len(ids), vocab_size)."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over largest magnitude."""
    return float((found - expected).abs().max() / expected.abs().max())


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite a checkpoint's tensors after ``edit(tensors)`` has changed them."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


AGREED = [
    key
    for key, value in GOLDEN.items()
    if isinstance(value, dict) and value.get("llama.cpp") == "identical text"
]


def prompt_ids(tokenizer: Any, key: str) -> list[int]:
    """Tokens of one of the golden prompts."""
    kind, _, text = key.partition(":")
    return (raw_ids if kind == "raw" else chat_ids)(tokenizer, text)
