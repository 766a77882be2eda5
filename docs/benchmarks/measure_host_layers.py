"""Measure layers that are computed in host memory while others stream, beside streaming all.

    python examples/make/make_checkpoint.py /tmp/q7 --shape qwen2.5-7b
    python docs/benchmarks/measure_host_layers.py /tmp/q7 out.jsonl [--numbers 10,12,14]
        [--tokens 1,8,64] [--only pass|engine] [--device-budget 8GiB]
        [--host-budget auto] [--context 512]

Appends a JSON line for each number of layers ("2+3+6+7" names them), in a process of its own, and
count of tokens: of ``pass``, the streamer with a layer function of plain torch (the products of
attention and feed-forward block, in bfloat16); of ``engine``, its decoding. "auto" is what the last
probe of this machine says, of ``engine`` what the engine has measured of its own products. Passes
that stream all and passes that compute these layers in host memory take turns in the same streamer,
some of one, some of the other: the first of each turn, for which prefetch starts over, is left out.
Seconds are medians.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from engine_runs import machine, open_engine, prompt_of, run, wait

from layer_streamer import LayerStreamer, Manifest, read_manifest
from layer_streamer.llm.on_host.crew import Crew
from layer_streamer.machine.threads import most_torch_threads

KINDS = ("pass", "engine")
EPS = 1e-6
TURNS = 3
DEVICE_BUDGET = "4GiB"
"""Of an engine, or all that there is room for would stay on a large device."""


def main() -> int:
    """Run what was asked for; children do the measuring."""
    args = parse_args()
    if args.child is not None:
        kind, _, number = args.child.partition(":")
        measure = {"pass": measure_passes, "engine": measure_engine}[kind]
        found = measure(args, which(number))
        for one in found:
            record = {"kind": kind, "asked": number, **one, **machine(args.path)}
            print(json.dumps(record), flush=True)
        return 0
    for kind in [args.only] if args.only else KINDS:
        for number in args.numbers.split(","):
            command = [sys.executable, __file__, *sys.argv[1:], "--child", f"{kind}:{number}"]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if result.returncode:
                return result.returncode
            with args.out.open("a", encoding="utf-8") as file:
                file.write(result.stdout)
            for line in result.stdout.splitlines():
                print(summary(json.loads(line)), flush=True)
    return 0


def which(asked: str) -> int | str | list[int]:
    """``host_layers`` by its name."""
    if "+" in asked:
        return [int(number) for number in asked.split("+")]
    return int(asked) if asked.isdecimal() else asked


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("path", type=Path)
    add("out", type=Path)
    add("--numbers", default="14", metavar="N,N", help="of layers in host memory; or auto")
    add("--tokens", default="1,8,64", metavar="N,N", help="of a pass (of the streamer)")
    add("--only", choices=KINDS)
    add("--passes", type=int, default=9, metavar="N", help="of a turn")
    add("--context", type=int, default=512, metavar="N", help="tokens of the engine's prompt")
    add("--device-budget", help="of streamer (default: slots alone), or engine (4GiB)")
    add("--host-budget", help="likewise: layers are not mapped, but in memory of their own")
    add(
        "--threads",
        type=int,
        help="torch's, and those that compute (one core is left; an engine tries)",
    )
    add("--device", default="cuda")
    add("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_passes(args: argparse.Namespace, number: int | str | list[int]) -> list[dict[str, Any]]:
    """Of the streamer."""
    torch.set_num_threads(args.threads or most_torch_threads())
    found, device = list[dict[str, Any]](), torch.device(args.device)
    options = {"device": device, "device_budget": args.device_budget, "host_layers": number}
    if args.host_budget:
        options |= {"host_budget": args.host_budget, "read_mode": "direct"}
    manifest = read_manifest(args.path)
    with LayerStreamer.from_checkpoint(manifest, **options) as streamer, torch.inference_mode():
        print(streamer.plan, file=sys.stderr)
        for tokens in map(int, args.tokens.split(",")):
            x_TD = torch.randn(tokens, hidden_size(manifest), device=device, dtype=torch.float32)
            x_TD = x_TD.to(torch.bfloat16)
            seconds: dict[bool, list[float]] = {False: [], True: []}
            steps: dict[str, Any] = {}
            for on_host in [False, True] * TURNS:
                for turn in range(args.passes + 1):
                    begin = time.perf_counter()
                    streamer.run_pass(x_TD, layer, on_host=on_host)
                    wait(device)
                    if turn:
                        seconds[on_host].append(time.perf_counter() - begin)
                report = streamer.last_pass
                assert report is not None
                steps[str(on_host)] = {
                    name: {"bytes": step.bytes, "busy": step.busy_seconds}
                    for name, step in report.steps.items()
                }
            own = {"tokens": tokens, "threads": torch.get_num_threads(), "steps": steps}
            found.append({**own, **figures(seconds), "layers": streamer.plan.host_layers})
    return found


def measure_engine(args: argparse.Namespace, number: int | str | list[int]) -> list[dict[str, Any]]:
    """Of the engine: seconds of a pass that takes one token."""
    options: dict[str, Any] = {"host_layers": number, "max_length": args.context + args.passes + 8}
    options["device_budget"] = args.device_budget or DEVICE_BUDGET
    if args.host_budget:
        options |= {"host_budget": args.host_budget, "read_mode": "direct"}
    with open_engine(args.path, args.device, max_batch=1, **options) as engine:
        host, steps = engine._runner.host, {}
        if args.threads:
            torch.set_num_threads(args.threads)
            if host is not None:
                host.threads = args.threads
                host.crews = defaultdict(partial(Crew, args.threads, shares=(1.0,)))
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for on_host in [False, True] * TURNS:
            if host is not None:  # all passes of a kind, whatever they take
                host.choice.there = lambda tokens, there=on_host: there  # type: ignore[method-assign]
            done = run(engine, [prompt_of(args.context)], args.passes + 2)
            seconds[on_host] += done["decode"]
            report = engine.streamer.last_pass
            assert report is not None
            steps[str(on_host)] = {
                name: {"bytes": step.bytes, "busy": step.busy_seconds}
                for name, step in report.steps.items()
            }
        there, tiers = engine.streamer.plan.host_layers, engine.streamer.plan.tiers
        own = {"tokens": 1, "threads": torch.get_num_threads(), "steps": steps}
        own |= {"resident": tiers.count("device"), "plan": str(engine.plan)}
        own["crew"] = None if host is None else host.crews[1].number
        return [{**own, **figures(seconds), "layers": there, "context": args.context}]


def figures(seconds: Mapping[bool, list[float]]) -> dict[str, Any]:
    """Medians, and all that they are of."""
    streamed, there = (median(seconds[on_host]) for on_host in (False, True))
    every = {"streamed_all": seconds[False], "there_all": seconds[True]}
    return {"streamed": streamed, "there": there, "share": there / streamed, **every}


def hidden_size(manifest: Manifest) -> int:
    """Of a token."""
    return int(manifest.layers[0].tensors["input_layernorm.weight"].shape[0])


def layer(x_TD: torch.Tensor, weights: Mapping[str, torch.Tensor], layer_idx: int) -> torch.Tensor:
    """The products of a layer of Qwen2 or LLaMA, where its weights are; nothing is attended to."""

    def project(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"])

    normed_TD = F.rms_norm(x_TD, x_TD.shape[1:], weights["input_layernorm.weight"], EPS)
    q_TD, k_TD, v_TD = (project(normed_TD, f"self_attn.{name}_proj") for name in "qkv")
    mixed_TD = q_TD + (k_TD.mean() + v_TD.mean())
    x_TD = x_TD + project(mixed_TD, "self_attn.o_proj")
    normed_TD = F.rms_norm(x_TD, x_TD.shape[1:], weights["post_attention_layernorm.weight"], EPS)
    gate_TF, up_TF = (project(normed_TD, f"mlp.{name}_proj") for name in ("gate", "up"))
    return x_TD + project(F.silu(gate_TF) * up_TF, "mlp.down_proj")


def summary(record: Mapping[str, Any]) -> str:
    """A line for people."""
    host, copy = (record["steps"]["True"].get(name) for name in ("host", "copy"))
    parts = [
        f"{name} {step['busy']:.4f} s, {step['bytes'] / step['busy'] / 1e9:.1f} GB/s"
        for name, step in (("host", host), ("copy", copy))
        if step and step["busy"]
    ]
    return (
        f"{record['kind']} {record['tokens']} tokens, {len(record['layers'])} layers there: "
        f"{record['there']:.4f} s, streamed {record['streamed']:.4f} s, {record['share']:.3f} "
        f"({'; '.join(parts)})"
    )


if __name__ == "__main__":
    sys.exit(main())
