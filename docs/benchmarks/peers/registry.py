"""The peers by name: what each is, and which function opens it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .session import Asked, SkipError, timed

SMALLER = (1.0, 0.8, 0.6, 0.4)
"""Shares of the budget for weights, of those that may take more than they are asked to."""


@dataclass(frozen=True)
class Peer:
    """One way to run a model."""

    title: str
    opens: str
    """Module and function, in this folder: it gives a session, or all figures."""
    package: str
    """As pip calls it."""
    imports: tuple[str, ...] = ()
    """What is imported before the clock starts. What cannot be is not installed."""
    shares: tuple[float, ...] = (1.0,)
    """Tried one after the other, while memory of the device runs out."""
    capped: bool = True
    """False: not held to the limit, as all of the model is resident."""


OURS = "layer-streamer"
HF = ("transformers",)
PEERS = {
    OURS: Peer(
        "layer-streamer, engine", "engines:layer_streamer_engine", OURS, ("layer_streamer.llm",)
    ),
    f"{OURS}-model": Peer(
        "layer-streamer, stream(model)", "models:layer_streamer_model", OURS,
        (*HF, "layer_streamer"),
    ),
    f"{OURS}-pass": Peer(
        "layer-streamer, run_pass", "layers:layer_streamer_pass", OURS, (*HF, "layer_streamer")
    ),
    "transformers": Peer(
        "transformers, all resident", "models:transformers_resident", "transformers", HF,
        capped=False,
    ),
    "accelerate-map": Peer(
        "accelerate, device_map", "models:accelerate_map", "accelerate", (*HF, "accelerate"),
        SMALLER,
    ),
    "accelerate-cpu": Peer(
        "accelerate, cpu_offload", "models:accelerate_cpu", "accelerate", (*HF, "accelerate")
    ),
    "accelerate-disk": Peer(
        "accelerate, disk_offload", "models:accelerate_disk", "accelerate", (*HF, "accelerate")
    ),
    "diffusers-leaf": Peer(
        "diffusers, groups of leaves", "models:diffusers_leaf", "diffusers",
        (*HF, "diffusers.hooks"),
    ),
    "diffusers-block": Peer(
        "diffusers, groups of blocks", "models:diffusers_block", "diffusers",
        (*HF, "diffusers.hooks"),
    ),
    "airllm": Peer("AirLLM", "models:airllm", "airllm", (*HF, "airllm")),
    "flextensor": Peer(
        "FlexTensor", "models:flextensor", "flextensor", (*HF, "flextensor"), SMALLER
    ),
    "llm-layer-prefetch": Peer(
        "llm-layer-prefetch", "layers:llm_layer_prefetch", "llm-layer-prefetch", HF
    ),
    "llama-bench": Peer("llama.cpp, llama-bench", "llama_cpp:llama_bench", "", ("gguf",)),
    "xllamacpp": Peer(
        "llama.cpp, xllamacpp", "llama_cpp:xllamacpp", "xllamacpp", ("xllamacpp",)
    ),
    "vllm": Peer("vLLM, cpu_offload_gb", "engines:vllm", "vllm", ("vllm",), SMALLER),
    "exllamav3": Peer(
        "exllamav3, all resident", "engines:exllamav3", "exllamav3", ("exllamav3",), capped=False
    ),
}  # fmt: skip


def measure(name: str, asked: Asked) -> dict[str, Any]:
    """Open this peer here, and measure it: a row without what is seen from outside."""
    import time

    from .memory import pss

    peer = PEERS[name]
    try:
        found = installed(name, peer)
        module, _, function = peer.opens.partition(":")
        opens = getattr(importlib.import_module(f".{module}", __package__), function)
        begin = time.perf_counter()
        opened = opens(asked)
        if isinstance(opened, dict):
            return found | {"status": "measured", **opened}
        found["open_seconds"] = time.perf_counter() - begin
        found |= {"status": "measured", **timed(opened, asked), "host_pss": pss()}
    except SkipError as error:
        return {"status": "skipped", "reason": str(error)}
    return found | device_peaks(asked)


def installed(name: str, peer: Peer) -> dict[str, Any]:
    """Its version. SkipError if it is not installed."""
    if not peer.package:
        return {}
    try:
        found = {"version": version(peer.package)}
    except PackageNotFoundError:
        if name.startswith(OURS):  # from a checkout
            found = {}
        else:
            raise SkipError(f"{peer.package} is not installed") from None
    for module in peer.imports:
        importlib.import_module(module)
    return found


def device_peaks(asked: Asked) -> dict[str, Any]:
    """As torch counts them."""
    if not asked.cuda:
        return {}
    import torch

    return {
        "torch_reserved": torch.cuda.max_memory_reserved(asked.device),
        "torch_allocated": torch.cuda.max_memory_allocated(asked.device),
    }
