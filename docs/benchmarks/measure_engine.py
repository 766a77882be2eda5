"""Measure the engine with its keys and values in host memory, beside the limits in the same run.

    python examples/make/make_checkpoint.py /tmp/q7 --shape qwen2.5-7b
    python docs/benchmarks/measure_engine.py /tmp/q7 [--cap 4GiB] [--only context|batch]

Prints one JSON line for each of: ``context``, one row of 32,768 tokens, prefilled and continued;
and ``batch``, 64 rows of 512 tokens. Each runs in a process of its own, whose GPU memory is capped:
torch's allocator by set_per_process_memory_fraction, the rest (CUDA's context) by what is left.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine_runs import (
    Capped,
    ComputeAlone,
    Link,
    decode_figures,
    machine,
    open_engine,
    run,
)

from layer_streamer import parse_bytes
from layer_streamer.llm.engine import StreamingEngine


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
        print(json.dumps({"regime": name, **machine(args.path), **found}), flush=True)
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
    add("--prefills", type=int, default=5, help="that are timed, after the first one")
    add("--chunk", type=int, default=2048)
    add("--device", default="cuda")
    add("--kv-int8", action="store_true")
    add("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def open_capped(args: argparse.Namespace, capped: Capped, **limits: Any) -> StreamingEngine:
    """With all keys and values in host memory."""
    return open_engine(
        args.path,
        args.device,
        kv="host",
        kv_int8=args.kv_int8,
        device_budget=capped.budget,
        prefill_chunk=args.chunk,
        **limits,
    )


def kv_bytes(engine: StreamingEngine, lengths: Sequence[float]) -> float:
    """Keys and values that travel to the device in a pass over rows of these lengths."""
    host = engine._runner.kv.host
    assert host is not None
    return sum(lengths) * host.token_nbytes * len(engine.plan.host_layers)


def measure_context(args: argparse.Namespace) -> dict[str, Any]:
    """One row that fills the context."""
    capped = Capped(parse_bytes("cap", args.cap), cuda=args.device != "cpu")
    link = Link(torch.device(args.device))
    link.measure()
    prompt = [1 + i % 1000 for i in range(args.context - args.passes - 1)]
    with open_capped(args, capped, max_length=args.context, max_batch=1) as engine:
        first = run(engine, [prompt], 3)["prefill"]  # loads libraries, kernel by kernel
        prefills = [run(engine, [prompt], 1)["prefill"] for _ in range(args.prefills - 1)]
        found = run(engine, [prompt], args.passes + 1)
        prefills.append(found["prefill"])
        host = engine._runner.kv.host
        assert host is not None
        late, taken = host.late_nbytes, capped.taken()
        alone = ComputeAlone(engine)
        # As long as a prefill: a GPU that has just begun to work runs at a higher clock.
        compute = alone.seconds([0], len(prompt), repeats=engine.config.num_layers)
        decode_compute = alone.seconds([len(prompt)], 1, repeats=20)
        plan = str(engine.plan)
    link.measure()
    length = len(prompt) + args.passes / 2
    moved = found["weight_bytes"] + kv_bytes(engine, [length])
    weights_once = found["weight_bytes"] / link.rate
    return {
        "tokens": len(prompt),
        "first_prefill_seconds": first,
        "prefill_seconds": median(prefills),
        "prefill_all": prefills,
        "compute_alone_seconds": compute,
        "weights_once_seconds": weights_once,
        "prefill_share": median(prefills) / max(compute, weights_once),
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
    with open_capped(args, capped, max_batch=args.rows, **limits) as engine:
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


if __name__ == "__main__":
    sys.exit(main())
