"""``python -m layer_streamer``: tools for people.

The table is for the reader; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import os
import sys

from ..errors import ConfigError, StreamerError
from .bench_command import register as register_bench
from .inspect_command import register as register_inspect
from .probe_command import register as register_probe

COMMANDS = (register_inspect, register_probe, register_bench)
"""Each adds the parser of a command or two, with the function that does the work as ``run``."""


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 2 after an error (one line on stderr), 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m layer_streamer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for register in COMMANDS:
        register(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (StreamerError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has gone. Python would flush stdout once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
