"""Measure what it costs to look whether logits are numbers, in passes that decode.

    python docs/benchmarks/measure_finite.py MODEL [--rows 1,8] [--rounds 15]

MODEL is held on the device whole, so that passes are as short as they become; a checkpoint for it:
``examples/make/make_checkpoint.py OUT --shape qwen2.5-7b --format ct4``. For each count of rows,
greedy and sampled, rounds with the look and without it take turns in one process. Prints a line of
JSON for each: medians of a pass in seconds, and their ratio. Exit code 1 if one is above 1.01.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine_runs import machine, open_engine, prompt_of

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.text import following
from layer_streamer.llm.text.sampling import Choice, Sampler, choose_tokens

MOST = 1.01
PROMPT = 64
LEFT_OUT = 2
"""Passes of a round before those that are timed: the prompt's, and the first of another kind."""
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "seed": 1},
}


def choose_unlooked(logits_RV: torch.Tensor, samplers: Sequence[Sampler]) -> list[Choice]:
    """The same tokens, and nothing else."""
    if all(sampler.takes_likeliest for sampler in samplers):
        return [int(i) for i in logits_RV.argmax(-1).tolist()]
    rows = zip(logits_RV, samplers, strict=True)
    return [int(i) for i in torch.stack([s.choose(row) for row, s in rows]).tolist()]


def main() -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("path", type=Path, metavar="MODEL")
    add("--rows", default="1,8", metavar="N,N")
    add("--rounds", type=int, default=15, metavar="N", help="of each, in turns")
    add("--passes", type=int, default=48, metavar="N", help="that are timed in a round")
    add("--device", default="cuda")
    args = parser.parse_args()
    rows, length = [int(n) for n in args.rows.split(",")], PROMPT + args.passes + LEFT_OUT
    worst = 0.0
    with open_engine(
        args.path, args.device, max_length=length, kv_tokens=length * max(rows),
        max_batch=max(rows), kv="device", device_budget="auto",
    ) as engine:  # fmt: skip
        for count in rows:
            for name, options in KINDS.items():
                found = compare(engine, count, args, options)
                worst = max(worst, found["ratio"])
                kind = {"rows": count, "kind": name, "captured": engine.plan.captures}
                print(json.dumps({**machine(args.path), **kind, **found}), flush=True)
    return int(worst > MOST)


def compare(
    engine: StreamingEngine, rows: int, args: argparse.Namespace, options: dict[str, Any]
) -> dict[str, Any]:
    """Both in turns, each first as often as second; one round before them is left out."""
    ways: dict[str, Callable[..., list[Choice]]] = {
        "looked": choose_tokens,
        "unlooked": choose_unlooked,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds + 1):
        for name in list(ways) if number % 2 else reversed(ways):
            following.choose_tokens = ways[name]  # type: ignore[attr-defined]
            try:
                times = decode(engine, rows, args.passes, options)
            finally:
                following.choose_tokens = choose_tokens  # type: ignore[attr-defined]
            if number:
                seconds[name].append(median(times))
    looked, unlooked = (median(seconds[name]) for name in ways)
    return {
        "ratio": looked / unlooked,
        "looked_seconds": looked,
        "unlooked_seconds": unlooked,
        "rounds": seconds,
    }


def decode(engine: StreamingEngine, rows: int, passes: int, options: dict[str, Any]) -> list[float]:
    """Seconds of each pass in which every row takes one token."""
    prompts, stamps = [prompt_of(PROMPT)] * rows, list[float]()
    engine.scheduler.places.forget()
    events = engine.events(prompts, max_new_tokens=passes + LEFT_OUT, **options)
    for number, _ in enumerate(events):
        if number % rows == rows - 1:
            stamps.append(time.perf_counter())
    return [after - before for before, after in pairwise(stamps)][LEFT_OUT - 1 :]


if __name__ == "__main__":
    sys.exit(main())
