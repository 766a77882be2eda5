"""What the engine's measuring scripts share: capped memory, the link's rate, timed passes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from measure import describe_machine

from layer_streamer.llm import engine as engine_module
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.kv.blocks import BLOCK, round_up
from layer_streamer.llm.kv.rows import Row
from layer_streamer.llm.models.model import decoder_layer
from layer_streamer.llm.passes.attention import fast_kernels
from layer_streamer.llm.passes.batch import pack
from layer_streamer.llm.weights.weights import StepWeights

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
COPY_NBYTES = 256 * MIB
SPARE = 96 * MIB
"""Of a cap: what libraries take beside the allocator once they compute."""


def machine(path: Path) -> dict[str, Any]:
    """Where, when, and of which checkpoint."""
    return {**describe_machine(), "path": str(path)}


class Capped:
    """The memory of this process on the GPU: a cap, and how much was taken."""

    def __init__(self, cap: int, *, cuda: bool) -> None:
        self.budget, self._cuda = cap, cuda
        if not cuda:
            return
        self._before = driver_used()
        work = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
        (work @ work).sum().item()  # the context, and the libraries that every engine loads
        self.context = driver_used() - self._before - torch.cuda.memory_reserved()
        self.budget = cap - self.context - SPARE
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(self.budget / total)

    def taken(self) -> dict[str, int]:
        """Peaks, bytes."""
        if not self._cuda:
            return {}
        return {
            "allocator_peak_reserved": torch.cuda.max_memory_reserved(),
            "allocator_peak_allocated": torch.cuda.max_memory_allocated(),
            "driver_bytes": driver_used() - self._before,
            "context_bytes": self.context,
        }


def driver_used() -> int:
    """Bytes of GPU 0 that are taken, as the driver sees it. The GPU must be ours alone."""
    command = ["nvidia-smi", "-i", "0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * MIB


class Link:
    """Copies from page-locked host memory to the device, back to back."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._host = torch.empty(COPY_NBYTES, dtype=torch.uint8, pin_memory=cuda)
        self._device = device
        self.rates: list[float] = []

    def measure(self) -> None:
        """Note the rate of now, bytes a second."""
        there = torch.empty(COPY_NBYTES, dtype=torch.uint8, device=self._device)
        there.copy_(self._host, non_blocking=True)
        wait(self._device)
        began = time.perf_counter()
        for _ in range(24):
            there.copy_(self._host, non_blocking=True)
        wait(self._device)
        self.rates.append(24 * COPY_NBYTES / (time.perf_counter() - began))
        del there
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def rate(self) -> float:
        return max(self.rates)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def open_engine(path: Path, device: str, **options: Any) -> StreamingEngine:
    """An engine in bfloat16 that no token ends, and of which ids alone are had."""
    engine = StreamingEngine(path, device=device, dtype=torch.bfloat16, **options)
    engine._stop_ids = frozenset()
    engine._has_text = lambda needed=False: False  # type: ignore[method-assign]
    print(engine.plan, file=sys.stderr)
    return engine


def open_with_head(path: Path, device: str, **options: Any) -> StreamingEngine:
    """The same with the output head on the device, which otherwise is streamed in pieces."""
    planned = engine_module.place  # type: ignore[attr-defined]

    def place(*given: Any, **named: Any) -> Any:
        return planned(*given, **(named | {"loads_head": True}))

    engine_module.place = place  # type: ignore[attr-defined, assignment]
    try:
        return open_engine(path, device, **options)
    finally:
        engine_module.place = planned  # type: ignore[attr-defined]


def prompt_of(count: int) -> list[int]:
    """So many token ids."""
    return [1 + i % 1000 for i in range(count)]


def run(engine: StreamingEngine, prompts: Sequence[list[int]], passes: int) -> dict[str, Any]:
    """Prefill, then decode: seconds of each pass, and the bytes that the last one moved and used.

    The first decode pass is left out: it follows a pass of another kind.
    """
    counts = len(prompts)
    engine.scheduler.places.forget()  # or prompts of an earlier run would be there
    stamps = [time.perf_counter()]
    for number, _ in enumerate(engine.events(prompts, max_new_tokens=passes, temperature=0)):
        if number % counts == counts - 1:  # the last row's event of a pass
            stamps.append(time.perf_counter())
    seconds = [after - before for before, after in pairwise(stamps)]
    report = engine.streamer.last_pass
    assert report is not None
    copy = report.steps.get("copy")
    return {
        "prefill": seconds[0],
        "decode": seconds[2:],
        "weight_bytes": copy.bytes if copy is not None else 0,
        "used_bytes": report.steps["compute"].bytes,
    }


def prompt_seconds(engine: StreamingEngine, prompts: Sequence[list[int]]) -> list[float]:
    """Of each prompt's one pass, back to back: there is room for one row at a time."""
    engine.scheduler.places.forget()
    stamps = [time.perf_counter()]
    for _ in engine.events(prompts, max_new_tokens=1, temperature=0):
        stamps.append(time.perf_counter())
    return [after - before for before, after in pairwise(stamps)]


def tiers(engine: StreamingEngine) -> dict[str, int]:
    """How many steps of a pass live where."""
    return dict(Counter(engine.streamer.plan.tiers))


class PlainWeights(StepWeights):
    """A step's weights whose matrices are unpacked once, for good: what bfloat16 alone takes."""

    def __init__(self, packed: StepWeights) -> None:
        for name, value in vars(packed).items():
            setattr(self, name, value)
        self._plain: dict[str, torch.Tensor] = {}

    def linear(self, x_TD: torch.Tensor, module: str) -> torch.Tensor:
        if module not in self._plain:
            packed = self._matrices[module].packed(self._tensors)
            blocks = [block.clone() for _, _, block in self._unpacker.blocks(packed)]
            self._plain[module] = torch.cat(blocks)
        bias = self._tensors.get(f"{self._names.modules[module]}.bias")
        return F.linear(x_TD, self._plain[module], bias)


class ComputeAlone:
    """The same functions on one layer's weights that stay on the device.

    ``plain``: with packed matrices unpacked beforehand.
    """

    def __init__(self, engine: StreamingEngine, *, plain: bool = False) -> None:
        self._engine, self._runner, self._plain = engine, engine._runner, plain
        with torch.inference_mode():
            for layer_idx, weights in engine.streamer.sweep(on_host=False):
                if layer_idx == 0:
                    self._weights: Mapping[str, torch.Tensor] = {
                        name: tensor.clone() for name, tensor in weights.items()
                    }

    def seconds(self, lengths: Sequence[int], new: int, repeats: int) -> float:
        """A pass that appends ``new`` tokens to rows of these lengths: all layers, no head."""
        runner, config = self._runner, self._engine.config
        span, device = runner.kv.span(0), runner.kv.device
        size = max(lengths) + new
        each = round_up(size) // BLOCK
        rows = [
            Row(size, {span: tuple(range(i * each, (i + 1) * each))}, length=n)
            for i, n in enumerate(lengths)
        ]
        shape = (each * BLOCK * len(rows), 2, config.num_kv_heads, config.head_dim)
        memory = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        batch = pack([(row, [1] * new) for row in rows], self._engine.plan.chunk, device)
        layer = self._engine.model.manifest.layers[0]
        weights = StepWeights(self._weights, layer, self._engine.model.names, runner._unpacker)
        if self._plain:
            weights = PlainWeights(weights)
        # Zeros, and rows that are all alike, would need less power, and let the GPU clock higher.
        stream = runner._stream_ND[: len(batch.ids)].normal_()
        attentions = [runner.attention(chunk) for chunk in batch.chunks]
        tables = [runner.rotation(chunk, 0) for chunk in batch.chunks]

        def one_layer() -> None:
            for chunk, attention, table in zip(batch.chunks, attentions, tables, strict=True):
                x = stream[chunk.first : chunk.first + chunk.count]
                look = attends(attention, span, memory)
                x.copy_(decoder_layer(x, weights, config, table, look))

        with torch.inference_mode(), fast_kernels(device):
            one_layer()
            wait(device)
            began = time.perf_counter()
            for _ in range(repeats):
                one_layer()
            wait(device)
        return (time.perf_counter() - began) / repeats * config.num_layers


def attends(attention: Any, span: Any, memory: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda layer_idx, *qkv: attention(layer_idx, span, memory, qkv)


def decode_figures(
    found: Mapping[str, Any], moved: float, link: Link, compute: float
) -> dict[str, Any]:
    """A decode pass beside what the link, or the GPU, needs for it."""
    seconds, limit = median(found["decode"]), max(moved / link.rate, compute)
    return {
        "decode_seconds": seconds,
        "decode_all": found["decode"],
        "weight_bytes": found["weight_bytes"],
        "kv_bytes": moved - found["weight_bytes"],
        "link_bytes_per_second": link.rates,
        "link_seconds": moved / link.rate,
        "decode_compute_seconds": compute,
        "decode_share": seconds / limit,
    }
