"""Measure what options cost a token that nobody drafted: engines that differ in them, in turn.

    python examples/make/make_checkpoint.py /tmp/q7 --shape qwen2.5-7b
    python docs/benchmarks/measure_options.py /tmp/q7 OUT [--budget 4GiB] [--only lookup ...]

Engines of the same checkpoint in one process, each with its own budget: one as it is, one that
looks its drafts up (lookup), and one whose results do not depend on what shares a pass
(reproducible). They take turns at a text of random tokens, which hold nothing to be found: weights
are random, and the temperature is 1. Appends a JSON line to OUT, and prints seconds a token beside
the plain engine's of the same turn.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from engine_runs import machine, open_engine

from layer_streamer.llm.engine import StreamingEngine

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lookup": {"lookup": True},
    "reproducible": {"reproducible": True},
}
CONTEXT, NEW = 512, 17
WARM_UP = 2


def token_seconds(engine: StreamingEngine, turn: int) -> tuple[float, int]:
    """Seconds a token behind a random prompt, and how many tokens were drafted for it."""
    draw = random.Random(turn)
    vocabulary = range(100, engine.config.vocab_size - 1000)
    prompt = [draw.choice(vocabulary) for _ in range(CONTEXT)]
    done = engine.generate(
        prompt, max_new_tokens=NEW, temperature=1.0, seed=turn, return_details=True
    )
    return done.decode_seconds / (len(done.ids) - 1), done.drafted


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a token by turn, of each engine."""
    names = ["plain", *(args.only or [name for name in OPTIONS if name != "plain"])]
    given = {"max_length": 2048, "max_batch": 1, "device_budget": args.budget}
    found: dict[str, list[float]] = {name: [] for name in names}
    drafted = dict.fromkeys(names, 0)
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(open_engine(args.path, args.device, **given, **OPTIONS[name]))
            for name in names
        }
        plans = {name: str(engine.plan) for name, engine in engines.items()}
        for turn in range(args.turns + WARM_UP):
            for name in names[:: 1 if turn % 2 else -1]:
                seconds, count = token_seconds(engines[name], turn)
                if turn >= WARM_UP:
                    found[name].append(seconds)
                    drafted[name] += count
    return {"budget": args.budget, "seconds": found, "drafted": drafted, "plans": plans}


def main() -> int:
    """Measure, note and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("path", type=Path, metavar="CHECKPOINT")
    add("out", type=Path, metavar="OUT")
    add("--budget", default="4GiB", help="device budget of each engine")
    add("--only", nargs="*", choices=[name for name in OPTIONS if name != "plain"])
    add("--turns", type=int, default=7, metavar="N")
    add("--device", default="cuda")
    args = parser.parse_args()
    record = measure(args)
    with open(args.out, "a") as file:
        file.write(json.dumps({**machine(args.path), **record}) + "\n")
    plain = record["seconds"]["plain"]
    for name, times in record["seconds"].items():
        pairs = sorted(a / b for a, b in zip(times, plain, strict=True))
        print(
            f"{name:<12} {median(pairs):.3f} x plain [{pairs[0]:.3f} .. {pairs[-1]:.3f}], "
            f"{median(times):.4f} s a token, {record['drafted'][name]} drafted"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
