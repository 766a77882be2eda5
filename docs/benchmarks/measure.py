"""Measure every regime of the benchmark page, each beside its limit in the same run.

    python examples/make/make_checkpoint.py /tmp/q7 --shape qwen2.5-7b
    python docs/benchmarks/measure.py /tmp/q7 results.jsonl [--only NAME ...]

Appends one JSON line a regime; docs/benchmarks/tables.py makes the page's tables from them.
Each regime runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from layer_streamer import LayerStreamer
from layer_streamer.measuring.bench import Bench, run_bench
from layer_streamer.measuring.rawspeed import Load, synchronize

GIB = 1 << 30
TINY_LAYERS, TINY_NBYTES = 1000, 64 << 10


def bench(**options: Any) -> Callable[[Path], dict[str, Any]]:
    """A regime that ``python -m layer_streamer bench`` would measure with the same options."""
    names = {"passes", "tokens", "cold"}
    plain = Bench(**{name: options.pop(name) for name in names & set(options)})

    def measure(path: Path) -> dict[str, Any]:
        opened = run_bench(lambda: LayerStreamer.from_checkpoint(path, **options), plain)
        print(opened)
        return {"bench": vars_of(plain), "options": options, **opened.document()}

    return measure


def devices(count: int) -> list[str]:
    """The first GPUs."""
    return [f"cuda:{i}" for i in range(count)]


def vars_of(plain: Bench) -> dict[str, Any]:
    return {"passes": plain.passes, "tokens": plain.tokens, "cold": plain.cold}


def measure_beside_python(path: Path, tokens: int) -> dict[str, Any]:
    """A pass while another thread runs pure Python for as long as the pass takes alone."""
    with LayerStreamer.from_checkpoint(path) as streamer:
        run = passes_of(streamer, Load(tokens))
        run()
        streaming = [timed(run) for _ in range(9)]
        loops = calibrate(median(streaming))
        python = [timed(lambda: spin(loops)) for _ in range(5)]
        both = []
        for _ in range(9):
            run()
            thread = threading.Thread(target=spin, args=(loops,))
            begin = time.perf_counter()
            thread.start()
            run()
            thread.join()
            both.append(time.perf_counter() - begin)
    limit = max(median(python), median(streaming))
    return {
        "streaming": streaming,
        "python": python,
        "both": both,
        "share_of_limit": limit / median(both),
        "limit_seconds": limit,
        "seconds_per_pass": median(both),
    }


def spin(loops: int) -> int:
    """Pure Python that never gives the interpreter's lock back by itself."""
    total = 0
    for i in range(loops):
        total += i & 3
    return total


def calibrate(seconds: float) -> int:
    """Loops of :func:`spin` that take that long alone."""
    loops = 1_000_000
    elapsed = median(timed(lambda: spin(loops)) for _ in range(5))
    return int(loops * seconds / elapsed)


def measure_many_passes(path: Path) -> dict[str, Any]:
    """300 passes in a row: times, and memory after each."""
    with LayerStreamer.from_checkpoint(path) as streamer:
        run = passes_of(streamer, Load(1))
        for _ in range(3):
            run()
        seconds, device_bytes, host_bytes = [], [], []
        for _ in range(300):
            seconds.append(timed(run))
            device_bytes.append(torch.cuda.memory_reserved() if torch.cuda.is_available() else 0)
            host_bytes.append(psutil.Process().memory_info().rss)
    ordered = sorted(seconds)
    middle = median(seconds)
    return {
        "seconds_per_pass": middle,
        "spread": (ordered[-1] - ordered[0]) / middle,
        "spread_98": (ordered[-4] - ordered[3]) / middle,
        "device_growth": device_bytes[-1] - device_bytes[0],
        "host_growth": host_bytes[-1] - host_bytes[0],
    }


def measure_tiny_layers(path: Path) -> dict[str, Any]:
    """1,000 layers of 64 KiB on the CPU, beside one loop that reads the same bytes."""
    with tempfile.TemporaryDirectory() as folder:
        file = write_tiny(Path(folder) / "model.safetensors")
        loop, passes = [], []
        with LayerStreamer.from_checkpoint(folder, device="cpu", read_mode="buffered") as streamer:
            run = passes_of(streamer, Load(0))
            for _ in range(3):
                run()
            for _ in range(9):
                loop.append(timed(lambda: read_plainly(file)))
                passes.append(timed(run))
    each = (median(passes) - median(loop)) / TINY_LAYERS
    return {"loop": loop, "passes": passes, "microseconds_a_layer": each * 1e6}


def write_tiny(path: Path) -> Path:
    """A checkpoint of TINY_LAYERS layers of one tensor."""
    header = {
        f"model.layers.{i}.w": {
            "dtype": "U8",
            "shape": [TINY_NBYTES],
            "data_offsets": [i * TINY_NBYTES, (i + 1) * TINY_NBYTES],
        }
        for i in range(TINY_LAYERS)
    }
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(os.urandom(TINY_NBYTES) * TINY_LAYERS)
    return path


def read_plainly(path: Path) -> None:
    """The layers' bytes into one buffer, a layer at a time."""
    buffer = memoryview(bytearray(TINY_NBYTES))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        first = os.fstat(descriptor).st_size - TINY_LAYERS * TINY_NBYTES
        for i in range(TINY_LAYERS):
            os.preadv(descriptor, [buffer], first + i * TINY_NBYTES)
    finally:
        os.close(descriptor)


def passes_of(streamer: LayerStreamer, load: Load) -> Callable[[], None]:
    """One pass of the load, to the end of its work on the devices."""
    x = torch.zeros(1, device=streamer.device)

    def run() -> None:
        streamer.run_pass(x, load)
        for device in streamer.devices:
            synchronize(device)

    return run


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


REGIMES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "mapped": bench(passes=9),
    "arena": bench(passes=9, host_budget="100GiB", read_mode="direct"),
    "cold": bench(passes=7, cold=True, host_budget="64MiB", read_mode="direct"),
    "cold, pools": bench(passes=7, cold=True, n_cpu_pinned=4, read_mode="direct"),
    "half the model in host memory": bench(host_budget="6.1GiB"),
    **{f"device budget {n} GiB": bench(device_budget=n * GIB) for n in (1, 2, 4, 8, 13, 16)},
    "4,096 tokens": bench(tokens=4096, passes=9),
    "beside pure Python": partial(measure_beside_python, tokens=0),
    "beside pure Python, with compute": partial(measure_beside_python, tokens=1),
    "1,000 tiny layers": measure_tiny_layers,
    "300 passes": measure_many_passes,
    "page cache, ring": bench(n_cpu_pinned=0),
    "page cache, pools": bench(n_cpu_pinned=4, read_threads=16),
    **{f"{n} GPUs": bench(passes=9, device=devices(n)) for n in (1, 2, 4)},
}


def describe_machine() -> dict[str, Any]:
    """Where and on what this was measured."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "gpus": gpus,
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("COMMIT") or commit.stdout.strip(),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> int:
    """Measure the regimes in processes of their own; or, with --one, one of them here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(REGIMES), metavar="NAME")
    parser.add_argument("--one", choices=list(REGIMES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        record = {"regime": args.one, "machine": describe_machine()} | REGIMES[args.one](args.path)
        with open(args.out, "a") as file:
            file.write(json.dumps(record) + "\n")
        return 0
    for name in args.only or REGIMES:
        print(f"== {name}", flush=True)
        command = [sys.executable, __file__, str(args.path), str(args.out), "--one", name]
        subprocess.run(command, check=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
