"""Measure packed weights in the engine, one token a pass and a prompt, beside the limits.

    python docs/benchmarks/measure_packed.py DIR [--formats ct4,ct8,q4_k] [--only streamed]

Makes DIR/ct4, DIR/ct8 and DIR/q4_k.gguf, random weights in the shape of a 7B model, where they are
not there yet. Prints one JSON line for each format of:

* ``streamed``: a token a pass, all layers from host memory; twice: with the head streamed, and with
  the head on the device. Beside the link's time for the bytes.
* ``prefill``: a prompt of 2,048 tokens, weights streamed, beside the longer of the link's time and
  the layers' compute in bfloat16, from matrices that are unpacked and stay on the device.
* ``resident``: the whole 4-bit model in a process capped at 6 GiB, 4,096 tokens of context, beside
  the time in which the device copies as many bytes as a pass reads. With --trace FILE, FILE gets
  what took the time of five passes.

Each in a process of its own. A table ends it, on stderr; exit code 1 if one of them failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine_runs import (
    ROOT,
    Capped,
    ComputeAlone,
    Link,
    machine,
    open_engine,
    open_with_head,
    prompt_of,
    prompt_seconds,
    run,
    tiers,
)

from layer_streamer import parse_bytes
from layer_streamer.llm.kernel_timing import copy_rate

sys.path.insert(0, str(ROOT / "examples" / "make"))
from made import FORMATS, is_file
from shapes import SHAPES

RESIDENT_FORMAT = "ct4"
PROMPT = 64
"""Tokens before those that are decoded with streamed weights."""
WARM_PASSES = 4
PREFILLS = 5
RESIDENT_CHUNK = 1024
"""Tokens of a prompt at a time, where the budget leaves little beside the model."""
TRACED = 5
"""Passes in a trace."""
ROWS = 15
"""Of each of its tables."""
COLUMNS = ("ratio", "format", "regime", "head", "s a pass", "limit, s", "bound", "tokens/s", "GB")


def main() -> int:
    """Make the checkpoints, let children measure, and print what they found."""
    args = parse_args()
    if args.child is not None:
        for found in MEASURES[args.child](args, path_of(args.dir, args.formats[0])):
            print(json.dumps(found), flush=True)
        return 0
    measured, failed = list[dict[str, Any]](), False
    for kind in args.formats:
        make(args, kind)
        for regime in [args.only] if args.only else MEASURES:
            if regime == "resident" and kind != RESIDENT_FORMAT:
                continue
            command = [sys.executable, __file__, *sys.argv[1:], "--formats", kind]
            command += ["--child", regime]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            place = machine(path_of(args.dir, kind))
            for line in result.stdout.splitlines():
                measured.append({"regime": regime, "format": kind, **place, **json.loads(line)})
                print(json.dumps(measured[-1]), flush=True)
            if result.returncode:
                failed = True
                print(f"{kind} {regime}: exit code {result.returncode}", file=sys.stderr)
    print_table(measured)
    return int(failed)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("dir", type=Path, metavar="DIR")
    add("--shape", default="qwen2.5-7b", choices=list(SHAPES))
    add("--layers", type=int, metavar="N", help="instead of the shape's own")
    add("--formats", default="ct4,ct8,q4_k", metavar="F,F", help=f"of {', '.join(FORMATS)}")
    add("--only", choices=list(MEASURES))
    add("--passes", type=int, default=24, metavar="N", help="decode passes that are timed")
    add("--prompt", type=int, default=2048, metavar="N", help="tokens of prefill's prompt")
    add("--context", type=int, default=4096, metavar="N", help="tokens of the resident model")
    add("--cap", default="6GiB", help="GPU memory of the resident model's process")
    add("--trace", type=Path, metavar="FILE", help="where the resident passes' time went, as text")
    add("--device", default="cuda")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.formats = args.formats.split(",")
    for kind in args.formats:
        if kind not in FORMATS:
            parser.error(f"--formats: {kind!r} is none of {', '.join(FORMATS)}")
    if args.passes < 1 or args.context < args.passes + 32 or args.prompt < 1:
        parser.error("--passes and --prompt: at least 1; --context: 32 more than --passes")
    return args


def path_of(directory: Path, kind: str) -> Path:
    """Where the checkpoint of a format is."""
    return directory / (f"{kind}.gguf" if is_file(kind) else kind)


def make(args: argparse.Namespace, kind: str) -> None:
    """A random checkpoint, unless it is there."""
    path = path_of(args.dir, kind)
    if path.exists():
        return
    args.dir.mkdir(parents=True, exist_ok=True)
    script = str(ROOT / "examples" / "make" / "make_checkpoint.py")
    command = [sys.executable, script, str(path), "--shape", args.shape, "--format", kind]
    if args.layers is not None:
        command += ["--layers", str(args.layers)]
    subprocess.run(command, stdout=sys.stderr, check=True)


def streamed(args: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
    """Decoding with streamed layers: the head streamed as well, then resident."""
    link, found = Link(torch.device(args.device)), []
    limits: dict[str, Any] = {
        "max_length": PROMPT + args.passes + WARM_PASSES,
        "max_batch": 1,
        "kv": "device",
    }
    for head, opened in (("streamed", open_engine), ("resident", open_with_head)):
        link.measure()
        with opened(path, args.device, **limits) as engine:
            run(engine, [prompt_of(PROMPT)], WARM_PASSES)
            one = run(engine, [prompt_of(PROMPT)], args.passes + 2)
            report = engine.streamer.last_pass
            assert report is not None
            one["stalled"] = {name: step.stalled_seconds for name, step in report.steps.items()}
            one["compute"] = ComputeAlone(engine).seconds([PROMPT], 1, repeats=10)
            found.append(one | {"head": head, "tiers": tiers(engine)})
    link.measure()
    return [streamed_figures(one, link) for one in found]


def streamed_figures(found: dict[str, Any], link: Link) -> dict[str, Any]:
    seconds, limit = median(found["decode"]), found["weight_bytes"] / link.rate
    return {
        "head": found["head"],
        "ratio": seconds / limit if limit else None,
        "seconds": seconds,
        "limit_seconds": limit,
        "bound": "link",
        "tokens_per_second": 1 / seconds,
        "bytes": found["weight_bytes"],
        "decode_all": found["decode"],
        "link_bytes_per_second": link.rates,
        "layers_compute_seconds": found["compute"],
        "stalled_seconds": found["stalled"],
        "tiers": found["tiers"],
    }


def prefill(args: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
    """Prompts one after the other, each a pass."""
    link = Link(torch.device(args.device))
    link.measure()
    limits: dict[str, Any] = {"max_length": args.prompt + 1, "max_batch": 1, "kv": "device"}
    with open_engine(path, args.device, **limits) as engine:
        own = range(2000, 2002 + PREFILLS)  # so that no two begin alike
        prompts = [[first, *prompt_of(args.prompt - 1)] for first in own]
        seconds = prompt_seconds(engine, prompts)[2:]
        report = engine.streamer.last_pass
        assert report is not None
        nbytes = report.steps["copy"].bytes if "copy" in report.steps else 0
        unpacked = ComputeAlone(engine, plain=True).seconds([0], args.prompt, repeats=3)
        packed = ComputeAlone(engine).seconds([0], args.prompt, repeats=3)
        chunk, where = engine.plan.chunk, tiers(engine)
    link.measure()
    moving = nbytes / link.rate
    limit, one = max(unpacked, moving), median(seconds)
    return [
        {
            "ratio": one / limit,
            "seconds": one,
            "limit_seconds": limit,
            "bound": "link" if moving > unpacked else "compute",
            "tokens_per_second": args.prompt / one,
            "bytes": nbytes,
            "prompt_tokens": args.prompt,
            "chunk_tokens": chunk,
            "prefill_all": seconds,
            "link_bytes_per_second": link.rates,
            "link_seconds": moving,
            "compute_bf16_seconds": unpacked,
            "compute_unpacking_seconds": packed,
            "tiers": where,
        }
    ]


def resident(args: argparse.Namespace, path: Path) -> Iterator[dict[str, Any]]:
    """Decoding at the end of the context, with nothing to stream."""
    cuda = args.device != "cpu"
    capped = Capped(parse_bytes("cap", args.cap), cuda=cuda)
    rate = device_rate(torch.device(args.device)) if cuda else None
    length = args.context - args.passes - 3
    prompt = prompt_of(length)
    limits: dict[str, Any] = {"max_length": args.context, "max_batch": 1, "kv": "device"}
    limits |= {"device_budget": capped.budget, "prefill_chunk": RESIDENT_CHUNK}
    with open_engine(path, args.device, **limits) as engine:
        run(engine, [prompt[: RESIDENT_CHUNK + 300]], WARM_PASSES)
        found = run(engine, [prompt], args.passes + 2)
        taken, config = capped.taken(), engine.config
        token_nbytes = 2 * config.num_kv_heads * config.head_dim * 2 * config.num_layers
        kv_nbytes = token_nbytes * (length + args.passes // 2)
        seconds, nbytes = median(found["decode"]), found["used_bytes"] + kv_nbytes
        limit = None if rate is None else nbytes / rate
        yield {
            "ratio": None if limit is None else seconds / limit,
            "seconds": seconds,
            "limit_seconds": limit,
            "bound": "device memory",
            "tokens_per_second": 1 / seconds,
            "bytes": nbytes,
            "weight_bytes": found["used_bytes"],
            "kv_bytes": kv_nbytes,
            "streamed_bytes": found["weight_bytes"],
            "prompt_tokens": length,
            "prefill_seconds": found["prefill"],
            "decode_all": found["decode"],
            "layers_compute_seconds": ComputeAlone(engine).seconds([length], 1, repeats=10),
            "copy_bytes_per_second": rate,
            "cap": parse_bytes("cap", args.cap),
            **taken,
            "tiers": tiers(engine),
        }
        if args.trace is not None:
            from engine_trace import trace

            args.trace.write_text(trace(engine, prompt[:-TRACED], TRACED, ROWS))


def device_rate(device: torch.device) -> float:
    """The rate of copies within the device's memory, which is left as it was."""
    rate = copy_rate(device, 10)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return rate


def print_table(measured: Sequence[dict[str, Any]]) -> None:
    """The figures that are asked about, the ratio to the limit first."""
    rows = [COLUMNS]
    for one in measured:
        ratio, limit = one["ratio"], one["limit_seconds"]
        rows.append(
            (
                "-" if ratio is None else f"{ratio:.3f}",
                one["format"],
                one["regime"],
                one.get("head", "-"),
                f"{one['seconds']:.4f}",
                "-" if limit is None else f"{limit:.4f}",
                one["bound"],
                f"{one['tokens_per_second']:.1f}",
                f"{one['bytes'] / 1e9:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip(), file=sys.stderr)


MEASURES: dict[str, Callable[[argparse.Namespace, Path], Iterable[dict[str, Any]]]] = {
    "streamed": streamed,
    "prefill": prefill,
    "resident": resident,
}

if __name__ == "__main__":
    sys.exit(main())
