"""What a checkpoint holds: its layers, their tensors and bytes.

    layer-streamer inspect MODEL

Only headers are read.
"""

from __future__ import annotations

import argparse

from .command import add_json, add_model, publish


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_model(parser)
    parser.add_argument("--layer-pattern", metavar="P", help="a layer's prefix, with {i}")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """The table and the document, to stdout."""
    from ..checkpoint.formats import read_manifest
    from ..checkpoint.summary import describe, document

    manifest = read_manifest(args.model, args.layer_pattern)
    publish(args, describe(manifest), document(manifest))
