"""What a user needs to know of this machine and of a model, in one screen, to paste into a report.

    layer-streamer doctor [MODEL] [--device-budget 6GiB]

Versions, devices and why one cannot be used, memory and what limits it, the disk; for a model where
each layer would live and why, the seconds a pass, and what would make it faster. Lines that begin
with ! need a look. Exit code 2: MODEL was named, and there is no plan of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .command import add_devices, add_streamer_options, streamer_options

OPTIONS = ("n_gpu", "device_budget", "host_budget", "layer_pattern")
"""Options of the streamer that are asked after here: of its memory, and what its layers are."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        type=Path,
        metavar="MODEL",
        help="a safetensors directory or file, or a GGUF file; its headers are read",
    )
    add_devices(parser)
    add_streamer_options(parser, OPTIONS)
    add("--json", action="store_true", help="one JSON document instead of the screen")


def run(args: argparse.Namespace) -> int:
    """Print the report; 2 if MODEL was named and there is no plan of it."""
    try:
        from ..doctor.report import Request, document, examine, screen
    except (ImportError, OSError) as error:
        raise ImportError(f"torch cannot be imported: {error}") from error
    report = examine(Request(args.model, streamer_options(args)))
    text = json.dumps(document(report)) if args.json else screen(report)
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    return 2 if report.failed else 0
