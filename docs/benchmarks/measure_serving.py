"""Measure rows that decode together on a GPU, and what a long prompt that arrives does to them.

    python examples/make/make_checkpoint.py /tmp/q7c --shape qwen2.5-7b --format ct4
    python docs/benchmarks/measure_serving.py /tmp/q7c OUT [--cap 4GiB] [--rows 1,4,16,64]

One process whose GPU memory is capped; keys and values are in host memory. For each number of rows
of 512 tokens: the median pass in which all of them decode, beside what the link, or the GPU, needs
for it. Then, with the most rows decoding, a prompt of 16,384 tokens is submitted, twice: the
first time the scheduler has yet to find out how many tokens are free. Appends a JSON line to OUT,
and prints rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine_runs import Capped, ComputeAlone, Link, decode_figures, machine, open_engine, run

from layer_streamer import parse_bytes
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.request import Request
from layer_streamer.llm.scheduling.events import Events
from layer_streamer.llm.text.sampling import Sampler

PASSES, ARRIVALS, PLAIN = 24, 2, 12


def prompts_of(rows: int, length: int, first: int) -> list[list[int]]:
    """None of which begin alike."""
    return [[first + i, *(1 + (i + j) % 1000 for j in range(length - 1))] for i in range(rows)]


def decode(engine: StreamingEngine, rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """Passes of so many rows that decode."""
    link = Link(engine.streamer.device)
    link.measure()
    length = args.row_tokens - PASSES - 1
    found = run(engine, prompts_of(rows, length, 1100), PASSES + 1)
    link.measure()
    compute = ComputeAlone(engine).seconds([length] * rows, 1, repeats=20)
    host = engine._runner.kv.host
    kv = 0 if host is None else host.token_nbytes * len(engine.plan.host_layers)
    moved = found["weight_bytes"] + kv * rows * (length + PASSES / 2)
    figures = decode_figures(found, moved, link, compute)
    return {"rows": rows, "tokens_per_second": rows / figures["decode_seconds"], **figures}


def arrive(engine: StreamingEngine, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of passes, by what they took: without a prompt, and with the long one's parts."""
    scheduler, events = engine.scheduler, Events()
    rows, length = max(args.rows), 64
    for ids in prompts_of(rows, length, 3000):
        places = args.row_tokens
        scheduler.submit(Request(0, ids, places - length, Sampler(), None, places), events)
    found = []
    for number in range(ARRIVALS):
        plain = [step(engine) for _ in range(PLAIN)]
        assert len(scheduler.running) == rows, "texts have ended"
        ids = [5000 + number, *(1 + i % 1000 for i in range(args.prompt - 1))]
        long = Request(0, ids, 1, Sampler(), None, args.prompt + 1)
        scheduler.submit(long, events)
        began, with_prompt, parts = time.perf_counter(), list[float](), list[int]()
        while not long.new_ids and long.error is None:
            before = 0 if long.row is None else long.row.length
            with_prompt.append(step(engine))
            parts.append((0 if long.row is None else long.row.length) - before)
        found.append({
            "plain": plain, "with_prompt": with_prompt, "parts": parts,
            "first_token": time.perf_counter() - began, "error": repr(long.error),
        })  # fmt: skip
    for request in list(scheduler.running):
        scheduler.cancel(request)
    return found


def step(engine: StreamingEngine) -> float:
    """Seconds of one pass."""
    began = time.perf_counter()
    engine.scheduler.step()
    return time.perf_counter() - began


def describe(record: dict[str, Any], prompt: int) -> None:
    """Rows for people."""
    for found in record["decode"]:
        print(
            f"{found['rows']:>3} rows: {found['tokens_per_second']:7.1f} tokens/s, "
            f"{found['decode_seconds']:.4f} s a pass, {found['decode_share']:.3f} x limit"
        )
    for found in record["arrivals"]:
        plain = median(found["plain"])
        ratios = sorted(seconds / plain for seconds in found["with_prompt"])
        print(
            f"a prompt of {prompt}: {len(ratios)} passes, {found['first_token']:.2f} s; of a pass "
            f"without ({plain:.4f} s) median {median(ratios):.3f}, most {ratios[-1]:.3f}, above "
            f"1.3: {sum(ratio > 1.3 for ratio in ratios)}; error {found['error']}"
        )


def main() -> int:
    """Measure, note and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("path", type=Path, metavar="CHECKPOINT")
    add("out", type=Path, metavar="OUT")
    add("--cap", default="4GiB", help="GPU memory of the process")
    add("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 16, 64])
    add("--row-tokens", type=int, default=512)
    add("--prompt", type=int, default=16384)
    add("--device", default="cuda")
    args = parser.parse_args()
    capped = Capped(parse_bytes("cap", args.cap), cuda=args.device != "cpu")
    rows = max(args.rows)
    limits = {
        "max_length": args.prompt + 1, "max_batch": rows + 1,
        "kv_tokens": rows * args.row_tokens + args.prompt + 256,
    }  # fmt: skip
    with open_engine(
        args.path, args.device, kv="host", device_budget=capped.budget, **limits
    ) as engine:
        if engine.streamer.device.type == "cuda":
            torch.cuda.synchronize()
        decode(engine, args.rows[0], args)  # has kernels compiled
        record = {
            "cap": args.cap, "plan": str(engine.plan),
            "decode": [decode(engine, count, args) for count in args.rows],
            "arrivals": arrive(engine, args),
        }  # fmt: skip
    with open(args.out, "a") as file:
        file.write(json.dumps({**machine(args.path), **record, **capped.taken()}) + "\n")
    describe(record, args.prompt)
    return 0


if __name__ == "__main__":
    sys.exit(main())
