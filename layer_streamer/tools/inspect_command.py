"""``python -m layer_streamer inspect``: what a checkpoint holds."""

from __future__ import annotations

import argparse
from typing import Any

from ..checkpoint.formats import read_manifest
from ..checkpoint.summary import describe, document


def register(commands: Any) -> None:
    """Add the command to ``commands``, argparse's subparsers."""
    parser = commands.add_parser("inspect", help="what a checkpoint holds")
    parser.add_argument("path", help="a safetensors directory or file, or a GGUF file")
    parser.add_argument("--layer-pattern", metavar="P", help="a layer's prefix, with {i}")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """The table and the document, to stdout."""
    manifest = read_manifest(args.path, args.layer_pattern)
    print(describe(manifest))
    print(document(manifest), flush=True)
