"""Measure the engine with its keys and values in host memory, beside the limits in the same run.

    python examples/make_checkpoint.py /tmp/q7 --shape qwen2.5-7b
    python docs/benchmarks/measure_engine.py /tmp/q7 [--cap 4GiB] [--only context|batch]

Prints one JSON line for each of: ``context``, one row of 32,768 tokens, prefilled and continued;
and ``batch``, 64 rows of 512 tokens. Each runs in a process of its own, whose GPU memory is capped:
torch's allocator by set_per_process_memory_fraction, the rest (CUDA's context) by what is left.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

# The engine is no installed package.
sys.path[0] = str(Path(__file__).resolve().parents[2] / "examples")
from layer_streamer import parse_bytes  # noqa: E402
from llm.attention import fast_kernels  # noqa: E402
from llm.batch import pack  # noqa: E402
from llm.engine import StreamingEngine  # noqa: E402
from llm.kv_rows import Row  # noqa: E402
from llm.model import decoder_layer  # noqa: E402
from llm.weights import StepWeights  # noqa: E402

MIB = 1 << 20
COPY_NBYTES = 256 * MIB
SPARE = 96 * MIB
"""Of the cap: what libraries take beside the allocator once they compute."""


def main() -> int:
    """Run what was asked for; children do the measuring."""
    args = parse_args()
    if args.child is not None:
        measure = {"context": measure_context, "batch": measure_batch}[args.child]
        print(json.dumps(measure(args)), flush=True)
        return 0
    for name in [args.only] if args.only else ["context", "batch"]:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if result.returncode:
            return result.returncode
        found = json.loads(result.stdout.splitlines()[-1])
        print(json.dumps({"regime": name, **machine(args), **found}), flush=True)
    return 0


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("path", type=Path)
    add("--only", choices=("context", "batch"))
    add("--cap", default="4GiB", help="GPU memory of the process")
    add("--context", type=int, default=32768)
    add("--rows", type=int, default=64)
    add("--row-tokens", type=int, default=512)
    add("--passes", type=int, default=24, help="decode passes that are timed")
    add("--chunk", type=int, default=2048)
    add("--device", default="cuda")
    add("--kv-int8", action="store_true")
    add("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Where and when."""
    cuda = args.device != "cpu"
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "gpu": torch.cuda.get_device_name() if cuda else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "path": str(args.path),
    }


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


def open_engine(args: argparse.Namespace, capped: Capped, **limits: Any) -> StreamingEngine:
    """An engine with all keys and values in host memory, that no token ends."""
    engine = StreamingEngine(
        args.path,
        device=args.device,
        dtype=torch.bfloat16,
        kv="host",
        kv_int8=args.kv_int8,
        device_budget=capped.budget,
        prefill_chunk=args.chunk,
        **limits,
    )
    engine._stop_ids = frozenset  # type: ignore[method-assign]
    print(engine.plan, file=sys.stderr)
    return engine


def run(engine: StreamingEngine, prompts: Sequence[list[int]], passes: int) -> dict[str, Any]:
    """Prefill, then decode: seconds of each pass, and the bytes that it moved."""
    stamps, counts = [time.perf_counter()], len(prompts)
    for number, _ in enumerate(engine.events(prompts, max_new_tokens=passes, temperature=0)):
        if number % counts == counts - 1:  # the last row's event of a pass
            stamps.append(time.perf_counter())
    seconds = [after - before for before, after in pairwise(stamps)]
    report = engine.streamer.last_pass
    assert report is not None
    streamed = report.steps["copy"].bytes if "copy" in report.steps else 0
    return {"prefill": seconds[0], "decode": seconds[2:], "weight_bytes": streamed}


def kv_bytes(engine: StreamingEngine, lengths: Sequence[float]) -> float:
    """Keys and values that travel to the device in a pass over rows of these lengths."""
    host = engine._runner.kv.host
    assert host is not None
    return sum(lengths) * host.token_nbytes * len(engine.plan.host_layers)


class ComputeAlone:
    """The same functions on one layer's weights that stay on the device."""

    def __init__(self, engine: StreamingEngine) -> None:
        self._engine, self._runner = engine, engine._runner
        with torch.inference_mode():
            for layer_idx, weights in engine.streamer.sweep():
                if layer_idx == 0:
                    self._weights: Mapping[str, torch.Tensor] = {
                        name: tensor.clone() for name, tensor in weights.items()
                    }

    def seconds(self, lengths: Sequence[int], new: int, repeats: int) -> float:
        """A pass that appends ``new`` tokens to rows of these lengths: all layers, no head."""
        runner, config = self._runner, self._engine.config
        span, device = runner.kv.span(0), runner.kv.device
        size = max(lengths) + new
        rows = [Row(size, {span: (i * size, size)}, length=n) for i, n in enumerate(lengths)]
        shape = (size * len(rows), 2, config.num_kv_heads, config.head_dim)
        memory = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        batch = pack([(row, [1] * new) for row in rows], self._engine.plan.chunk, device)
        layer = self._engine.model.manifest.layers[0]
        weights = StepWeights(self._weights, layer, self._engine.model.names, runner._unpacker)
        stream = runner._stream_ND[: len(batch.ids)].zero_()
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


def measure_context(args: argparse.Namespace) -> dict[str, Any]:
    """One row that fills the context."""
    capped = Capped(parse_bytes("cap", args.cap), cuda=args.device != "cpu")
    link = Link(torch.device(args.device))
    link.measure()
    prompt = [1 + i % 1000 for i in range(args.context - args.passes - 1)]
    with open_engine(args, capped, max_length=args.context, max_batch=1) as engine:
        run(engine, [prompt[: args.chunk + 300]], 3)  # libraries
        found = run(engine, [prompt], args.passes + 1)
        host = engine._runner.kv.host
        assert host is not None
        late, taken = host.late_nbytes, capped.taken()
        alone = ComputeAlone(engine)
        compute = alone.seconds([0], len(prompt), repeats=2)
        decode_compute = alone.seconds([len(prompt)], 1, repeats=20)
        plan = str(engine.plan)
    link.measure()
    length = len(prompt) + args.passes / 2
    moved = found["weight_bytes"] + kv_bytes(engine, [length])
    weights_once = found["weight_bytes"] / link.rate
    return {
        "tokens": len(prompt),
        "prefill_seconds": found["prefill"],
        "compute_alone_seconds": compute,
        "weights_once_seconds": weights_once,
        "prefill_share": found["prefill"] / max(compute, weights_once),
        **decode_figures(found, moved, link, decode_compute),
        "late_bytes": late,
        "cap": parse_bytes("cap", args.cap),
        **taken,
        "plan": plan,
    }


def measure_batch(args: argparse.Namespace) -> dict[str, Any]:
    """Many rows that decode together."""
    capped = Capped(parse_bytes("cap", args.cap), cuda=args.device != "cpu")
    link = Link(torch.device(args.device))
    link.measure()
    length = args.row_tokens - args.passes - 1
    prompts = [[1 + (i + j) % 1000 for j in range(length)] for i in range(args.rows)]
    limits = {"max_length": args.row_tokens, "kv_tokens": args.rows * args.row_tokens}
    with open_engine(args, capped, max_batch=args.rows, **limits) as engine:
        run(engine, [prompt[:20] for prompt in prompts], 3)
        found = run(engine, prompts, args.passes + 1)
        taken = capped.taken()
        compute = ComputeAlone(engine).seconds([length] * args.rows, 1, repeats=20)
        plan = str(engine.plan)
    link.measure()
    moved = found["weight_bytes"] + kv_bytes(engine, [length + args.passes / 2] * args.rows)
    return {
        "rows": args.rows,
        "row_tokens": args.row_tokens,
        "prefill_seconds": found["prefill"],
        **decode_figures(found, moved, link, compute),
        "tokens_per_second": args.rows / median(found["decode"]),
        "cap": parse_bytes("cap", args.cap),
        **taken,
        "plan": plan,
    }


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


if __name__ == "__main__":
    sys.exit(main())
