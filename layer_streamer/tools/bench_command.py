"""``plan`` and ``bench``: what a streamer would do with a checkpoint, and what it does."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..assembly import draw_plan
from ..checkpoint.formats import read_manifest
from ..devices.accelerator import open_devices
from ..errors import ConfigError
from ..measuring.bench import Bench, run_bench
from ..planning.settings import Settings
from ..progress import ProgressBar
from ..streamer import LayerStreamer


def register(commands: Any) -> None:
    """Add both commands to ``commands``, argparse's subparsers."""
    plan = commands.add_parser("plan", help="where each layer would live; the predicted seconds")
    _add_settings(plan)
    plan.add_argument("--read-rate", type=float, metavar="GB/S", help="of the disk")
    plan.add_argument("--copy-rate", type=float, metavar="GB/S", help="of each device's link")
    plan.set_defaults(run=run_plan)
    bench = commands.add_parser("bench", help="measured passes, beside what the hardware needs")
    _add_settings(bench)
    bench.add_argument(
        "--passes",
        type=int,
        default=5,
        metavar="N",
        help="timed passes (5); in place of those beside which the limit drifted, up to 2 N more",
    )
    bench.add_argument(
        "--tokens",
        type=int,
        default=1,
        metavar="N",
        help="vectors that each matrix is multiplied by (1)",
    )
    bench.add_argument(
        "--cold", action="store_true", help="each pass begins with nothing prefetched"
    )
    bench.set_defaults(run=run_bench_command)


def run_plan(args: argparse.Namespace) -> None:
    """Print the plan of a streamer that is not opened, and its JSON."""
    settings = Settings(**_options(args))
    plan = draw_plan(
        read_manifest(args.path), open_devices(settings.device), settings, _rates(args)
    )
    print(f"{args.path}: {len(plan.tiers)} layers")
    print(plan)
    print(json.dumps(plan.document()), flush=True)


def run_bench_command(args: argparse.Namespace) -> None:
    """Measure, and print the table and its JSON."""
    bench = Bench(passes=args.passes, tokens=args.tokens, cold=args.cold)
    options = _options(args)
    bars = list[ProgressBar]()
    with ExitStack() as stack:

        def show(name: str, total: int | None) -> None:
            # Called when a measurement begins: those before it are done.
            if bars:
                bars[0].update()
            else:
                bars.append(stack.enter_context(ProgressBar(unit="measurement", leave=False)))
            bars[0].total = total
            bars[0].set_description_str(name)

        outcome = run_bench(
            lambda: LayerStreamer.from_checkpoint(args.path, **options), bench, show
        )
    print(outcome)
    print(json.dumps({"path": str(args.path), **asdict(bench), **outcome.document()}), flush=True)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", type=Path, help="a safetensors directory or file, or a GGUF file")
    add("--device", action="append", metavar="D", help="such as cuda:0; may be repeated")
    add("--n-gpu", type=int, metavar="N", help="layers held ahead on each device (2)")
    add("--n-cpu-pinned", type=_count, metavar="N", help="in pinned host memory, or none (4)")
    add("--n-cpu", type=_count, metavar="N", help="in pageable host memory, or none (none)")
    add("--device-budget", metavar="BYTES", help='of each device: "6GiB", "auto"')
    add("--host-budget", metavar="BYTES", help='of host memory: "16GiB", "auto"')
    add("--reserve-bytes", metavar="BYTES", help="what of the device budget is yours")
    add("--read-mode", metavar="MODE", help="auto, buffered, direct, mapped")
    add("--read-threads", type=int, metavar="N")
    add("--read-chunk", type=int, metavar="BYTES")


def _count(text: str) -> int:
    """Layers of a pool; none at all is 0, as None would be an option that was not named."""
    return 0 if text.lower() == "none" else int(text)


def _rates(args: argparse.Namespace) -> dict[str, float]:
    """The rates that were named, bytes a second. Raises ConfigError."""
    given = {}
    for name in ("read", "copy"):
        rate = vars(args)[f"{name}_rate"]
        if rate is None:
            continue
        if not 0 < rate < math.inf:
            raise ConfigError(f"--{name}-rate={rate}: must be above 0 (GB/s), and finite")
        given[name] = rate * 1e9
    return given


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were named; argparse leaves None where one was not."""
    names = (
        "n_gpu", "n_cpu_pinned", "n_cpu", "device_budget", "host_budget", "reserve_bytes",
        "read_mode", "read_threads", "read_chunk",
    )  # fmt: skip
    given: Mapping[str, Any] = vars(args)
    named = {name: given[name] for name in names if given[name] is not None}
    if args.device:
        named["device"] = args.device
    return named
