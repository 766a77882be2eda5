"""Find the fastest settings for a checkpoint on this machine, and print them as a call to paste.

    layer-streamer tune MODEL [--engine | --modules] [--max-device-bytes 6GiB]

MODEL is a safetensors directory or file, or a GGUF file. With --engine, what is measured is the
language model engine, on a prompt and some tokens after it, and MODEL may be a repository on the
Hugging Face hub as well; with --modules, the model's own class of transformers. Else the compute is
a stand-in: each matrix of a layer times --tokens vectors; to tune your own, call LayerStreamerTuner
with a setup_fn. Only the call goes to stdout; progress goes to stderr. Exit code 2 is an error; 130
is Ctrl-C, after which the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..planning.options import SEARCHED
from .command import COMMAND_LINE, add_model, add_streamer_options, at_least, require_engine, say
from .engine_options import given

if TYPE_CHECKING:
    from .. import LayerStreamerTuner

OPTIONS = ("tokens", "n_runs", "sleep_seconds", "max_seconds", "max_device_bytes",
           "max_host_bytes", "strategy", "tolerance", "results_path")  # fmt: skip
FIXED = tuple(name for name in COMMAND_LINE if name not in SEARCHED)
OPENING = ("device", *FIXED, "tail")
"""What is opened with as it was named: part of the call that is printed."""
ENGINE = ("prompt_tokens", "new_tokens", "max_length")
STREAMERS = "streamer = LayerStreamer.from_checkpoint("
ENGINES = "engine = StreamingEngine("
MODULES = "model = layer_streamer.stream("
"""How the call begins that is printed."""
MARGIN = "a run is ended once it is slower than the best by this share; or none (0.1)"
TOLERANCE = "a race ends once no candidate can be better by more than this share (0.02)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_model(parser)
    add = parser.add_argument
    add("--device", metavar="D", help="such as cuda:0 or cpu")
    add("--max-device-bytes", metavar="BYTES", help='of each device: "6GiB"')
    add("--max-host-bytes", metavar="BYTES", help='of host memory: "16GiB"')
    add("--max-seconds", type=float, metavar="S", help="then the best so far is taken")
    add("--strategy", choices=("race", "grid"), help="race (the default) or all candidates")
    add("--cold", action="store_true", help="nothing in the page cache before each run")
    add("--tokens", type=int, metavar="N", help="vectors that each matrix is multiplied by (1)")
    add("--n-runs", type=int, metavar="N", help="of each candidate; the first is discarded (4)")
    add("--sleep-seconds", type=float, metavar="S", help="between runs (0)")
    add("--margin", type=_margin, default="0.1", metavar="X", help=MARGIN)
    add("--tolerance", type=float, metavar="X", help=TOLERANCE)
    add("--results", dest="results_path", metavar="FILE", help="where trials are kept")
    add("--report", type=Path, metavar="DIR", help="write a table and a picture there")
    add("--tail", action="append", metavar="NAME", help="of a tensor to stream after the layers")
    add_streamer_options(parser, FIXED)
    engine = parser.add_argument_group("a language model (docs/tuning.md)")
    add, one = engine.add_argument, at_least(1)
    what = engine.add_mutually_exclusive_group()
    what.add_argument("--engine", action="store_true", help="tune the engine: StreamingEngine")
    what.add_argument("--modules", action="store_true", help="tune the model's class: stream()")
    add("--prompt-tokens", type=one, metavar="N", help="of the prompt that is measured (512)")
    add("--new-tokens", type=one, metavar="N", help="after it (8); more: decoding weighs more")
    add("--max-length", type=one, metavar="N", help="most tokens of a prompt and its answer")
    values = parser.add_argument_group(
        "values to try", "lists, such as 1,2,4 or none,2; what is not named gets what suits here"
    )
    for name in SEARCHED:
        numbers = COMMAND_LINE[name].metavar == "N"
        kind = partial(_counts, COMMAND_LINE[name].read) if numbers else _words
        values.add_argument(f"--{name.replace('_', '-')}-values", type=kind, metavar="V,V,...")


def run(args: argparse.Namespace) -> None:
    """Tune; after Ctrl-C, say what is known by then."""
    from .. import LayerStreamerTuner

    options = options_of(args)
    if args.engine:
        require_engine()
        from ..llm.hub import find_model

        tuner = LayerStreamerTuner.for_engine(find_model(args.model), **options)
    elif args.modules:
        from ..modules.hub import local_folder

        tuner = LayerStreamerTuner.for_module(local_folder(args.model), **options)
    else:
        tuner = LayerStreamerTuner.from_checkpoint(args.model, **options)
    try:
        tune(tuner, args)
    except KeyboardInterrupt:
        say_best_so_far(tuner)
        raise


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of the tuner; those that were not named keep its defaults."""
    values = tuple(f"{name}_values" for name in SEARCHED)
    named = given(args, (*OPENING, *OPTIONS, *ENGINE, *values))
    for name in ENGINE:
        if name in named and not (args.engine or (args.modules and name != "max_length")):
            other = "" if name == "max_length" else " or --modules"
            raise ValueError(f"--{name.replace('_', '-')}: only with --engine{other}")
    return named | {"margin": args.margin, "cache": "cold" if args.cold else "warm"}


def tune(tuner: LayerStreamerTuner, args: argparse.Namespace) -> None:
    """Tune, write the report, print the call."""
    tuner.tune()
    best = tuner.best
    assert best is not None
    if args.report is not None:
        try:
            for path in tuner.report(args.report):
                say(str(path))
        except ImportError as error:
            say(f"warning: {error}")
    opening = given(args, (*OPENING, "max_length"))
    call = ENGINES if args.engine else MODULES if args.modules else STREAMERS
    print(format_call(args.model, {**opening, **best.settings}, call), flush=True)


def format_call(model: str, options: Mapping[str, Any], call: str = STREAMERS) -> str:
    """The call that opens a streamer, an engine or a model with these options, as Python."""
    lines = [f"    {name}={_quote(value)}," for name, value in options.items()]
    return "\n".join([call, f"    {_quote(model)},", *lines, ")"])


def say_best_so_far(tuner: LayerStreamerTuner) -> None:
    """After Ctrl-C, what is known by now."""
    best = tuner.best
    if best is None:
        return
    settings = ", ".join(f"{name}={_quote(value)}" for name, value in best.settings.items())
    say(f"\nbest so far: {best.seconds:.4f} s a run: {settings}")


def _quote(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _counts(read: Callable[[str], Any], text: str) -> list[Any]:
    try:
        return [None if word is None else read(word) for word in _words(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be numbers, or none: 1,2,none") from None


def _words(text: str) -> list[Any]:
    words = [word.strip() for word in text.split(",")]
    return [None if word.lower() == "none" else word for word in words]


def _margin(text: str) -> float | None:
    try:
        return None if text.lower() == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number, or none") from None
