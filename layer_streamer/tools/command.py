"""What the commands share: arguments, and how results are printed. Imports nothing large."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, NoReturn

from ..errors import printable
from ..planning.options import OPTIONS


class Parser(argparse.ArgumentParser):
    """Raises ValueError, in one line, for arguments that make no sense."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def at_least(least: int) -> Callable[[str], int]:
    """What argparse calls with an argument that is a whole number from there on."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}: must be at least {least}")
        return value

    return number


COMMAND_LINE = {name: o.kind for name, o in OPTIONS.items() if o.kind and o.kind.metavar}
"""Options of a streamer that are given as they are; a device is named by ``add_devices``."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """The checkpoint that a command is about."""
    help_text = "a safetensors directory or file, or a GGUF file"
    parser.add_argument("model", metavar="MODEL", help=help_text)


def add_devices(parser: argparse.ArgumentParser) -> None:
    """Devices, of which there may be several."""
    help_text = "such as cuda:0, or cuda:0,cuda:1; may be repeated (default: the GPU, else the CPU)"
    parser.add_argument("--device", action="extend", type=device_names, metavar="D", help=help_text)


def device_names(text: str) -> list[str]:
    """Of devices, with commas between them."""
    return [name.strip() for name in text.split(",")]


def add_streamer_options(
    parser: argparse.ArgumentParser, names: Iterable[str] = COMMAND_LINE
) -> None:
    """What a streamer can be asked for: a group of the help."""
    group = parser.add_argument_group("the streamer (docs/concepts.md)")
    for name in names:
        option, kind = OPTIONS[name], COMMAND_LINE[name]
        meaning = option.meaning.replace("`", "").replace("%", "%%")
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind.read,
            metavar=kind.metavar,
            help=meaning if option.words == "None" else f"{meaning} ({option.words})",
        )


def streamer_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those that were named, as keywords."""
    given = {name: getattr(args, name, None) for name in (*COMMAND_LINE, "device")}
    return {name: value for name, value in given.items() if value is not None}


def add_json(parser: argparse.ArgumentParser) -> None:
    """How results are to be printed: see :func:`publish`."""
    help_text = "print one JSON document, and nothing else"
    parser.add_argument("--json", action="store_true", help=help_text)


def publish(args: argparse.Namespace, text: str, document: str) -> None:
    """A text for people, and for programs a JSON document: the last line of stdout.

    Alone with ``--json``; not at all where stdout is a terminal.
    """
    if not args.json:
        print(shown(text))
    if args.json or not sys.stdout.isatty():
        print(document)
    sys.stdout.flush()


def say(message: str) -> None:
    """A line on stderr: results alone go to stdout."""
    if sys.stderr is not None:  # as where it was closed; print() would take stdout
        with suppress(OSError, ValueError):  # nobody reads it: no reason to end
            print(shown(message), file=sys.stderr, flush=True)


def shown(text: str) -> str:
    """The lines of a text, with what a terminal would act on in them escaped."""
    return "\n".join(map(printable, text.split("\n")))


def require_server() -> None:
    """ImportError, with what to install, if what a server cannot do without is missing."""
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(name) is None:
            raise ImportError(f"{name} is not installed (pip install 'layer-streamer[serve]')")


def require_engine() -> None:
    """ImportError, with what to install, if what the engine cannot do without is missing."""
    for name in ("transformers", "tokenizers", "jinja2"):
        if find_spec(name) is None:
            raise ImportError(f"{name} is not installed (pip install 'layer-streamer[llm]')")


def require_bodies() -> None:
    """ImportError, likewise, for what reads requests as OpenAI's clients write them."""
    if find_spec("pydantic") is None:
        raise ImportError("pydantic is not installed (pip install 'layer-streamer[serve]')")
