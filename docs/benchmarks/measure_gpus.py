"""Measure the engine's decoding over several GPUs beside that over the first of them.

    python examples/make/make_checkpoint.py /tmp/q7 --shape qwen2.5-7b
    python docs/benchmarks/measure_gpus.py /tmp/q7 OUT --cases equal --device-budget 4GiB
    python examples/make/make_checkpoint.py /tmp/q32 --shape qwen2.5-32b --format Q4_K
    python docs/benchmarks/measure_gpus.py /tmp/q32 OUT --device-budget 8GiB
        [--cases equal,each] [--device cuda:0,cuda:1] [--rows 1,8] [--turns 3] [--context 512]

``equal``: all GPUs together keep as many bytes of layers for good as one does, which has this
budget at most, so that they have more links and nothing else. ``each``: every one has the budget.
The two take turns, each time in a process of its own; seconds of a pass are medians of all of a
side's passes.
A JSON line of each case and number of rows is appended to OUT: with the plans, what the links bring
alone and at once, and every pass's seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine_runs import COPY_NBYTES, machine, open_engine, prompt_of, run

from layer_streamer import parse_bytes
from layer_streamer.llm.memory.memory_plan import MemoryPlan
from layer_streamer.llm.memory.wishes import Wishes
from layer_streamer.llm.opening import Limits, Model, place, plan_memory

CASES = ("equal", "each")
STEP = 16 << 20
"""Bytes by which budgets are told apart."""
REPEATS = 24


def main() -> int:
    """Run what was asked for; children do the measuring."""
    args = parse_args()
    if args.child is not None:
        asked = json.loads(args.child)
        print(json.dumps(measure_links(asked) if args.links else measure(args, asked)), flush=True)
        return 0
    devices = args.device.split(",")
    links = child([*sys.argv[1:], "--links"], devices)
    for case in args.cases.split(","):
        for rows in map(int, args.rows.split(",")):
            record = compare(args, case, rows, devices)
            record |= {"links": links, **machine(args.path)}
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            print(summary(record), flush=True)
    return 0


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("path", type=Path)
    add("out", type=Path)
    add("--cases", default=",".join(CASES), metavar="C,C", help="equal, each")
    add("--device", default="cuda:0,cuda:1", metavar="D,D")
    add("--device-budget", default="8GiB", help="of the one, and of each where each has it")
    add("--rows", default="1", metavar="N,N", help="that decode together")
    add("--turns", type=int, default=3, metavar="N", help="of each side")
    add("--passes", type=int, default=16, metavar="N", help="of a turn")
    add("--context", type=int, default=512, metavar="N", help="tokens of a row's prompt")
    add("--child", help=argparse.SUPPRESS)
    add("--links", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def child(arguments: Sequence[str], asked: Any) -> Any:
    """What a process of its own has measured. CalledProcessError if it fails."""
    command = [sys.executable, __file__, *arguments, "--child", json.dumps(asked)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def compare(
    args: argparse.Namespace, case: str, rows: int, devices: Sequence[str]
) -> dict[str, Any]:
    """One device and all of them, in turn."""
    budget = parse_bytes("device_budget", args.device_budget)
    one, several = {"devices": devices[:1], "rows": rows, "budget": budget}, {"rows": rows}
    several |= {"devices": devices, "budget": budget}
    if case == "equal":
        one["budget"], several["budget"] = equal_budgets(args, one, devices)
    found: dict[str, list[dict[str, Any]]] = {"one": [], "several": []}
    for _ in range(args.turns):
        for name, asked in (("one", one), ("several", several)):
            found[name].append(child(sys.argv[1:], asked))
    record: dict[str, Any] = {"kind": "gpus", "case": case, "rows": rows, "devices": devices}
    for name, asked in (("one", one), ("several", several)):
        turns = found[name]
        every = [seconds for turn in turns for seconds in turn["decode"]]
        record[name] = {
            "seconds": median(every), "all": every, "budget": asked["budget"],
            "prefill": median(turn["prefill"] for turn in turns),
            **{key: turns[0][key] for key in ("resident", "copied", "layers", "plan")},
        }  # fmt: skip
    record["times"] = record["one"]["seconds"] / record["several"]["seconds"]
    return record


def measure(args: argparse.Namespace, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Decoding of one engine."""
    rows = asked["rows"]
    with open_engine(args.path, asked["devices"], **options_of(args, asked)) as engine:
        prompts = [[1 + row, *prompt_of(args.context - 1)] for row in range(rows)]
        done = run(engine, prompts, args.passes + 2)
        streamer = engine.streamer.plan
        return {
            "decode": done["decode"],
            "prefill": done["prefill"],
            "resident": resident(engine.plan),
            "copied": list(streamer.placement.copy_bytes),
            "layers": streamer.tiers.count("device"),
            "plan": str(engine.plan),
        }


def options_of(args: argparse.Namespace, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Of the engine, and of its plan."""
    length = args.context + args.passes + 8
    return {
        "max_length": length,
        "kv_tokens": length * asked["rows"],
        "max_batch": asked["rows"],
        "device_budget": asked["budget"],
    }


def equal_budgets(
    args: argparse.Namespace, one: Mapping[str, Any], devices: Sequence[str]
) -> tuple[int, int]:
    """Of the one, and of each where there are several: the largest up to the one's own with which
    these keep no more bytes of layers than it, and then it no more than these."""
    model = Model.read(args.path, lambda text: None)

    def kept(names: Sequence[str], budget: int) -> int | None:
        options = options_of(args, {**one, "budget": budget})
        limits = Limits(*(options.pop(name) for name in ("max_length", "kv_tokens", "max_batch")))
        placed, dtype = place(model, names, torch.bfloat16, {})
        try:
            plan, _ = plan_memory(model, limits, Wishes(options=placed, **options), dtype)
        except ValueError:
            return None  # nothing works with so little
        return resident(plan)

    most = kept(one["devices"], one["budget"])
    if most is None:
        raise ValueError(f"--device-budget {args.device_budget}: too small for one device")
    found = []
    for names in (devices, one["devices"]):
        low, high = 0, one["budget"] // STEP  # in STEPs: what is kept grows with them
        while low < high:
            middle = (low + high + 1) // 2
            some = kept(names, middle * STEP)
            low, high = (middle, high) if some is None or some <= most else (low, middle - 1)
        reached = kept(names, low * STEP)
        if reached is None:
            raise ValueError(f"--device-budget {args.device_budget}: too small for them together")
        found.append(low * STEP)
        most = reached
    return found[1], found[0]


def resident(plan: MemoryPlan) -> int:
    """Bytes of layers that stay on devices."""
    steps = zip(plan.streamer.sizes, plan.streamer.tiers, strict=True)
    return sum(size.device_nbytes for size, tier in steps if tier == "device")


def measure_links(devices: Sequence[str]) -> dict[str, Any]:
    """Bytes a second from page-locked memory to each device alone, and to all at once."""
    if not devices[0].startswith("cuda"):
        return {}
    host = torch.empty(COPY_NBYTES, dtype=torch.uint8, pin_memory=True)
    there = [torch.empty_like(host, device=name, pin_memory=False) for name in devices]

    def rate(chosen: Sequence[torch.Tensor]) -> float:
        began = time.perf_counter()
        for _ in range(REPEATS):
            for to in chosen:
                to.copy_(host, non_blocking=True)
        for to in chosen:
            torch.cuda.synchronize(to.device)
        return REPEATS * len(chosen) * COPY_NBYTES / (time.perf_counter() - began)

    rate(there)
    return {"alone": [rate([to]) for to in there], "together": rate(there)}


def summary(record: Mapping[str, Any]) -> str:
    """A line for people."""
    one, several = record["one"], record["several"]
    return (
        f"{record['case']}, {record['rows']} rows: {one['seconds']:.4f} s on one "
        f"({one['resident'] / 1e9:.2f} GB kept), {several['seconds']:.4f} s on "
        f"{len(record['devices'])} ({several['resident'] / 1e9:.2f} GB kept): "
        f"{record['times']:.2f} times as fast"
    )


if __name__ == "__main__":
    sys.exit(main())
