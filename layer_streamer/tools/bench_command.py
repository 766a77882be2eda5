"""Measured passes of a checkpoint, beside what the hardware needs for them.

    layer-streamer bench MODEL --device-budget 6GiB

The compute is a stand-in: each matrix of a layer times --tokens vectors (none for packed weights).
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING

from .command import (
    add_devices,
    add_json,
    add_model,
    add_streamer_options,
    publish,
    say,
    streamer_options,
)

if TYPE_CHECKING:
    from ..measuring.bench import Bench, Outcome

MOST_PACKED = 0.5
"""Share of the layers' bytes above which it is worth a line."""
PASSES = "timed passes (5); in place of those beside which the limit drifted, up to 2 N more"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_model(parser)
    add_devices(parser)
    parser.add_argument("--passes", type=int, default=5, metavar="N", help=PASSES)
    parser.add_argument(
        "--tokens", type=int, default=1, metavar="N", help="vectors that each matrix meets (1)"
    )
    parser.add_argument(
        "--cold", action="store_true", help="each pass begins with nothing prefetched"
    )
    add_json(parser)
    add_streamer_options(parser)


def run(args: argparse.Namespace) -> None:
    """Measure, and print the table and its JSON."""
    from ..measuring.bench import Bench

    bench = Bench(passes=args.passes, tokens=args.tokens, cold=args.cold)
    outcome = measure(args, bench)
    document = {"path": args.model, **asdict(bench), **outcome.document()}
    publish(args, str(outcome), json.dumps(document))


def measure(args: argparse.Namespace, bench: Bench) -> Outcome:
    """Run it, with a bar over the measurements."""
    from ..checkpoint.formats import read_manifest
    from ..measuring.bench import run_bench
    from ..measuring.rawspeed import packed_share
    from ..progress import ProgressBar
    from ..streamer import LayerStreamer

    options = streamer_options(args)
    manifest = read_manifest(args.model, options.pop("layer_pattern", None))
    if bench.tokens and (share := packed_share(manifest)) > MOST_PACKED:
        say(f"{share:.0%} of the layers' bytes are packed: nothing is computed with them here")
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

        return run_bench(lambda: LayerStreamer.from_checkpoint(manifest, **options), bench, show)
