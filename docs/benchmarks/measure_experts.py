"""Measure a mixture of experts on a GPU: whole layers, experts on demand, and all of them there.

    python examples/make/make_checkpoint.py /tmp/q30 --shape qwen3-30b-a3b --format ct4
    python examples/make/make_checkpoint.py /tmp/q3 --shape qwen3-a3b --format ct4
    python docs/benchmarks/measure_experts.py /tmp/q30 OUT [--cap 8GiB] [--exponent 1.0] \
        [--dense /tmp/q3]

Weights are random, and so would be which experts a token chooses. So the router's product is
computed, and others are put in its place: of experts that are drawn without putting back, by Zipf's
law, in an order that each layer has of its own. Four
processes: experts on demand and whole layers, with GPU memory capped, and all experts in slots
without a cap, which is what a pass takes if nothing is missing; and copies of experts alone, by
size and number, beside the link. Of decoding the median seconds a token, the hits, what Belady's
choice would have hit, and the bytes that were missing; of a prompt its pass.

Appends a JSON line for each process to OUT, and prints rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from engine_runs import MIB, Capped, Link, machine, open_engine, prompt_of, run, wait
from zipf_router import Zipf

from layer_streamer import copy_pieces, parse_bytes
from layer_streamer.experts.hits import count_hits, most_hits
from layer_streamer.experts.policies import make_policy
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.models import feed_forward
from layer_streamer.llm.passes import captured_mixture
from layer_streamer.streamer import store_of

CONTEXT, NEW, WARM = 128, 128, 64
WAYS = ("demand", "all", "whole")
SIZES = (600_000, 1_800_000, 2_700_000, 13_200_000)
"""Of a matrix of Qwen3.6-35B-A3B, an expert of it, of Qwen3-30B-A3B and of gpt-oss, in 4 bits."""


def decode(engine: StreamingEngine, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a token, once slots have filled, and what became of experts meanwhile."""
    config, experts = engine.config, engine.config.experts
    assert experts is not None
    device = torch.device(args.device)
    sizes = config.num_layers, experts.count, experts.per_token
    zipf = Zipf(*sizes, args.exponent, max(args.prompt, CONTEXT), device)
    feed_forward.choose = captured_mixture.choose = zipf  # type: ignore[assignment]
    reports, looked, noting = list[Any](), list[float](), engine._runner.forward

    def forward(*given: Any, **named: Any) -> torch.Tensor:
        # Of the pass before, which has ended: a look at the present one would wait for it.
        began = time.perf_counter()
        reports.append(engine.streamer.last_experts)
        looked.append(time.perf_counter() - began)
        return noting(*given, **named)

    engine._runner.forward = forward  # type: ignore[method-assign]
    link = Link(engine.streamer.device)
    link.measure()
    warm, new = (8, 8) if args.child == "whole" else (WARM, NEW)
    found = run(engine, [prompt_of(CONTEXT)], warm + new + 1)
    link.measure()
    steps = zipf.steps(zipf.turn - warm - new + 1, warm + new)
    # Nothing else goes on while this script looks.
    own = looked[-len(found["decode"]) :]
    seconds = [whole - look for whole, look in zip(found["decode"], own, strict=True)][warm:]
    reports = [*reports, engine.streamer.last_experts][-new:]
    # Experts come in none of the streamer's steps: of these a token uses some.
    used = found["used_bytes"] + config.num_layers * experts.per_token * expert_nbytes(engine)
    record = {"decode": seconds, "looked": own[warm:], "link": link.rates, "used_bytes": used}
    if reports[0] is None or args.child == "all":
        return record
    slots = sum({id(p): len(p) for p in engine.streamer._opened().experts.pools.values()}.values())
    asked, hits = sum(r.asked for r in reports), sum(r.hits for r in reports)
    return record | {
        "slots": slots, "asked": asked, "hits": hits,
        "missed_bytes": sum(r.copied_bytes for r in reports) / len(reports),
        "of_trace": {
            "asked": sum(map(len, steps)), "steps": len(steps),
            "segmented": count_hits(steps, slots, make_policy("segmented", slots, 1)),
            "belady": most_hits(steps, slots),
        },
    }  # fmt: skip


def expert_nbytes(engine: StreamingEngine) -> int:
    """Of one; 0: they come with their layers."""
    store = store_of(engine.streamer)
    return 0 if store is None else next(iter(store.layers.values())).expert_nbytes


def prompt(engine: StreamingEngine, count: int, turns: int) -> dict[str, list[float]]:
    """Seconds of a pass over a prompt that begins as none before, and the bytes of experts that
    were missing."""
    found, missed = list[float](), list[float]()
    for turn in range(turns + 1):
        engine.scheduler.places.forget()
        began = time.perf_counter()
        for _ in engine.events(
            [[turn + 1, *prompt_of(count - 1)]], max_new_tokens=1, temperature=0
        ):
            found.append(time.perf_counter() - began)
        report = engine.streamer.last_experts
        missed.append(0 if report is None else report.copied_bytes)
    return {"prompt": found[1:], "prompt_bytes": missed[1:]}


def copies(device: torch.device) -> list[dict[str, float]]:
    """Bytes a second of experts' copies in one call, by their size and number."""
    if device.type == "cpu":
        return []
    home = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    there, stream = torch.empty_like(home, device=device), torch.cuda.Stream(device)
    link, found, dice = Link(device), [], np.random.default_rng(0)
    for size in SIZES:
        for count in (1, 2, 3, 4, 8, 24):
            places = np.sort(dice.choice((1 << 30) // size, count, replace=False)) * size
            nbytes = np.full(count, size)
            once = partial(copy_pieces, there, places, home, places[::-1].copy(), nbytes, stream)
            once()
            wait(device)
            seconds, on_device = [], []
            for _ in range(20):
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                began = time.perf_counter()
                first.record(stream)
                once()
                last.record(stream)
                stream.synchronize()
                seconds.append(time.perf_counter() - began)
                on_device.append(first.elapsed_time(last) / 1000)
            row = {"size": size, "count": count, "seconds": median(seconds)}
            kernel = by_kernel(there, home, places, size, stream)
            found.append(row | {"on_device": median(on_device), "by_kernel": kernel})
    link.measure()
    for row in found:
        nbytes = row["size"] * row["count"] / link.rate
        row |= {"share": nbytes / row["on_device"], "kernel_share": nbytes / row["by_kernel"]}
    return found


def by_kernel(
    there: torch.Tensor, home: torch.Tensor, places: Any, size: int, stream: torch.cuda.Stream
) -> float:
    """Seconds of the same bytes where a kernel reads them, in a CUDA graph as the engine has it."""
    from layer_streamer.devices import slot_kernels  # and with it Triton

    count, device = len(places), there.device
    sources = torch.from_numpy(places + home.data_ptr()).to(device).view(-1, 1)
    chunks = torch.tensor(slot_kernels.cut([size], 8), dtype=torch.int32, device=device)
    pieces = slot_kernels.Pieces(sources, torch.tensor([[0, size]], device=device), chunks, 8)
    told = [count, count, *(number for i in range(count) for number in (i, i))]
    told_N = torch.tensor(told, dtype=torch.int32, device=device)
    graph, seconds = torch.cuda.CUDAGraph(), []
    with torch.cuda.stream(stream):
        slot_kernels.fill(pieces, told_N, there, size)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            slot_kernels.fill(pieces, told_N, there, size)
        for _ in range(20):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            graph.replay()
            last.record()
            stream.synchronize()
            seconds.append(first.elapsed_time(last) / 1000)
    return median(seconds)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One process."""
    device = torch.device(args.device)
    if args.child == "copies":
        return {"way": "copies", "copies": copies(device)}
    if args.child == "dense":
        with open_engine(
            args.dense, args.device, device_budget=args.all, max_length=512, max_batch=1
        ) as engine:
            return {"way": "dense", **run(engine, [prompt_of(CONTEXT)], WARM + NEW)}
    capped = args.child != "all"
    memory = Capped(parse_bytes("cap", args.cap), cuda=capped and device.type == "cuda")
    budget: Any = memory.budget if capped else args.all
    options = {"experts": "whole" if args.child == "whole" else "demand"}
    with open_engine(
        args.path, args.device, device_budget=budget, max_length=args.prompt + 256,
        max_batch=1, **options,
    ) as engine:  # fmt: skip
        record = {"way": args.child, "plan": str(engine.plan), **decode(engine, args)}
        record |= prompt(engine, args.prompt, args.turns)
    return record | (memory.taken() if capped else {})


def describe(found: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Rows for people."""
    for row in found["copies"]["copies"]:
        print(
            f"{row['count']:>3} experts of {row['size'] / 1e6:5.1f} MB at once: "
            f"{row['share']:.3f} of the link, {row['on_device'] * 1e3:.3f} ms; until the host "
            f"knows, {row['seconds'] * 1e3:.3f}; read by a kernel {row['kernel_share']:.3f}"
        )
    demand, there, whole = (found[way] for way in WAYS)
    seconds, compute = median(demand["decode"]), median(there["decode"])
    bound = demand["missed_bytes"] / max(demand["link"]) + compute
    trace, layers = demand["of_trace"], median(whole["decode"])
    print(
        f"on demand: {1 / seconds:.1f} tokens/s, {seconds / bound:.3f} x (missing bytes over the "
        f"link + a pass with all there, {compute:.4f} s), {layers / seconds:.1f} x whole layers "
        f"({1 / layers:.2f} tokens/s)"
    )
    hits, asked = trace["segmented"] / trace["asked"], demand["asked"]
    print(
        f"{demand['slots']} slots: hits {demand['hits'] / asked:.3f} of the last {NEW} tokens, "
        f"{demand['missed_bytes'] / MIB:.1f} MiB a token missing; of the whole trace {hits:.3f}, "
        f"Belady's {trace['belady'] / trace['asked']:.3f}"
    )
    if "dense" in found:
        dense = found["dense"]
        share = median(dense["decode"]) / dense["used_bytes"] * there["used_bytes"]
        print(
            f"all there: {compute * 1e3:.2f} ms for {there['used_bytes'] / 1e9:.2f} GB, "
            f"{compute / share:.2f} x a dense pass that is captured, byte for byte"
        )
    for way in WAYS:
        print(f"prompt of {args.prompt}, {way}: {median(found[way]['prompt']):.4f} s")
    link = median(demand["prompt_bytes"]) / max(demand["link"])
    share = median(demand["prompt"]) / max(link, median(there["prompt"]))
    print(f"on demand {share:.3f} x the longer of its missing bytes ({link:.4f} s) and all there")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure each way in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("path", type=Path, metavar="CHECKPOINT")
    add("out", type=Path, metavar="OUT")
    add("--cap", default="8GiB", help="GPU memory of the processes that are held to it")
    add("--all", default="auto", help="device budget that holds all experts")
    add("--dense", type=Path, metavar="CHECKPOINT", help="of which a pass reads as many bytes")
    add("--exponent", type=float, default=1.0, help="of Zipf's law; 0: all alike")
    add("--prompt", type=int, default=2048)
    add("--turns", type=int, default=5, metavar="N")
    add("--device", default="cuda")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child is not None:
        print(json.dumps(measure(args)), flush=True)
        return 0
    found = {}
    for way in (*WAYS, "copies", *(["dense"] if args.dense else [])):
        command = [sys.executable, __file__, *sys.argv[1:], "--child", way]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[way] = json.loads(result.stdout.splitlines()[-1])
        with open(args.out, "a") as file:
            record = {**machine(args.path), "cap": args.cap, "exponent": args.exponent}
            file.write(json.dumps(record | found[way]) + "\n")
    describe(found, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
