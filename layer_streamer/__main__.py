"""``python -m layer_streamer``: tools for people.

The table is for the reader; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import os
import sys

from .errors import ConfigError, StreamerError
from .formats import read_manifest
from .inspect import describe, document


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 2 after an error (one line on stderr), 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m layer_streamer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="what a checkpoint holds")
    inspect.add_argument("path", help="a safetensors directory or file, or a GGUF file")
    inspect.add_argument("--layer-pattern", metavar="P", help="a layer's prefix, with {i}")
    args = parser.parse_args(argv)
    try:
        manifest = read_manifest(args.path, args.layer_pattern)
        print(describe(manifest))
        print(document(manifest), flush=True)
    except (StreamerError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has gone. Python would flush stdout once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
