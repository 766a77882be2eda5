"""The command ``layer-streamer``, or ``python -m layer_streamer``.

A module of this folder named ``x_command`` is the command ``x``: ``add_arguments(parser)`` and
``run(args)``, which may return an exit code. It is imported when it is asked for, and imports torch
when it runs.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from .command import Parser
from .faults import exit_code

GROUPS = {
    "Language models": {
        "chat": "talk with a model",
        "generate": "answer a prompt, or a file of prompts",
        "serve": "answer clients of OpenAI's API, and a browser",
        "batch": "answer a file of requests, as OpenAI's batches are written",
        "quantize": "make a model of 4 or 8 bits a weight",
        "finetune": "train an adapter (LoRA) over a model that does not fit",
    },
    "Checkpoints": {
        "inspect": "layers, tensors and their bytes",
        "plan": "where each layer would live; the predicted seconds a pass",
        "experts": "what slots for a mixture's experts would spare, by a saved trace",
        "bench": "measured passes, beside what the hardware needs",
        "tune": "the fastest settings for this machine",
    },
    "This machine": {
        "doctor": "what it has, what would run where and why, what would make it faster",
        "probe": "measure the limits of disk, memory and links, and keep them",
        "kernels": "measure the GPU kernels of packed weights",
    },
}
COMMANDS = {name: text for group in GROUPS.values() for name, text in group.items()}
HELP = ("-h", "--help", "help")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 after an error (one line on stderr), 130 after Ctrl-C or SIGTERM."""
    arguments = sys.argv[1:] if argv is None else argv
    return exit_code(lambda: _run(arguments))


def _run(argv: Sequence[str]) -> int | None:
    if not argv or argv[0] in (*HELP, "--version"):
        print(f"layer-streamer {__version__}" if argv[:1] == ["--version"] else overview())
        return 0 if argv else 2
    name = argv[0]
    if name not in COMMANDS:
        raise ValueError(unknown(name))
    command = import_module(f".{name}_command", __package__)
    parser = Parser(
        prog=f"layer-streamer {name}",
        usage=argparse.SUPPRESS,  # the description begins with an example
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="say more, on stderr")
    args = parser.parse_args(argv[1:])
    logging.basicConfig(
        format="%(message)s", level=logging.INFO if args.verbose else logging.WARNING
    )
    code: int | None = command.run(args)
    return code


def overview() -> str:
    """What ``layer-streamer --help`` prints."""
    lines = ["usage: layer-streamer COMMAND ...", ""]
    lines += ["Run models that are larger than the memory of your device: their layers stream."]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<10}{text}" for name, text in commands.items())]
    lines += ["", "layer-streamer COMMAND --help says more; --version says which this is."]
    return "\n".join(lines)


def unknown(name: str) -> str:
    """What to say of a command that is none."""
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    return f"there is no command {name!r}{hint} (see layer-streamer --help)"
