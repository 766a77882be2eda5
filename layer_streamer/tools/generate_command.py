"""Generate text with a language model whose layers stream through bounded memory.

    layer-streamer generate MODEL --prompt "What is the capital of France?"
    layer-streamer generate MODEL --prompts questions.jsonl --output answers.jsonl

Only the answer goes to stdout; what the model thinks before, progress and the closing summary go to
stderr. Exit code 2 is an error, 130 is Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import say
from .engine_options import (
    GENERATION,
    add_answering,
    add_engine,
    add_language_model,
    given,
    open_engine,
    read_model,
    save_timeline,
    template_options,
)
from .module_answers import answer_with_modules, modules_answer
from .voice import Voice

if TYPE_CHECKING:
    from ..llm.engine import StreamingEngine
    from ..llm.opening import Model
    from ..llm.reading.reader import Reader

MAX_NEW_TOKENS = 128
CONSTRAINTS = ("schema", "regex", "grammar")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_language_model(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="what to answer; - reads it from stdin")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="answer each line (JSON)")
    add = parser.add_argument
    add("--output", type=Path, metavar="FILE", help="where the answers to --prompts go; resumed")
    add("--raw", action="store_true", help="continue the prompt as it is, without chat template")
    add_answering(parser, MAX_NEW_TOKENS)
    like = parser.add_argument_group("what answers are like (docs/llm.md)")
    add = like.add_mutually_exclusive_group().add_argument
    add("--schema", type=text_of, metavar="FILE", help="JSON as this JSON schema says")
    add("--regex", metavar="R", help="matched by this regular expression from end to end")
    add("--grammar", type=text_of, metavar="FILE", help="of this grammar, in Lark or GBNF")
    add_engine(parser)


def text_of(name: str) -> str:
    """What is in a file."""
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{name}: {error}") from error


def run(args: argparse.Namespace) -> None:
    """Read what describes the model, open the engine, do what was asked."""
    if args.output is not None and args.prompts is None:
        raise ValueError("--output: belongs to --prompts")
    if args.modules:
        if args.prompt is None:
            raise ValueError("--modules: answers one --prompt")
        for name in given(args, CONSTRAINTS):
            raise ValueError(f"--{name}: the engine's, which --modules does without")
        answer_with_modules(args, as_prompt(read_prompt(args.prompt), args), voice_of(args))
        return
    model = read_model_or_tell(args)
    prompt, room = None, dict[str, Any]()
    if args.prompt is not None:
        prompt = read_prompt(args.prompt)
        room["max_length"] = room_for(model, prompt, args)
    with open_engine(args, model, **room) as engine:
        if prompt is not None:
            answer(engine, prompt, args)
        else:
            answer_file(engine, args)
        save_timeline(args, engine)


def read_model_or_tell(args: argparse.Namespace) -> Model:
    """What describes the model; the error of one that --modules would answer for says so."""
    from ..llm.errors import UnsupportedModelError

    try:
        return read_model(args)
    except UnsupportedModelError as error:
        if not modules_answer(args):
            raise
        raise UnsupportedModelError(
            f"{error}: not by the engine, but --modules answers by the model's own class"
        ) from error


def read_prompt(prompt: str) -> str:
    """The prompt itself, or stdin for "-", without the newline that ends a line."""
    if prompt != "-":
        return prompt
    return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")


def as_prompt(text: str, args: argparse.Namespace) -> Any:
    """A text to be continued, or a user's message."""
    return text if args.raw else [{"role": "user", "content": text}]


def voice_of(args: argparse.Namespace) -> Voice:
    """What tells the text."""
    return Voice(thinks=not args.hide_thinking)


def reader_of(tokenizer: Any, args: argparse.Namespace) -> Reader:
    """What reads the text that was asked for."""
    from ..llm.reading.reader import Reader

    return Reader(tokenizer, given(args, (*GENERATION, *CONSTRAINTS)), raw=args.raw)


def room_for(model: Model, text: str, args: argparse.Namespace) -> int:
    """Tokens of the prompt and its answer, as far as the model's context goes."""
    from ..llm.errors import one_line_errors
    from ..llm.text.prompts import PromptEncoder

    encoder = PromptEncoder(lambda: model.tokenizer, model.config.vocab_size, lambda _: None)
    with one_line_errors("the tokenizer cannot take the prompt"):
        ids = encoder.encode(as_prompt(text, args), template_options(args))
        ids = reader_of(model.tokenizer, args).begin(ids)
    room: int = len(ids) + args.max_new_tokens
    return min(room, model.config.max_positions)


def answer(engine: StreamingEngine, text: str, args: argparse.Namespace) -> None:
    """Generate, each token's text told as soon as it is known."""
    from ..llm.memory.totals import Totals
    from ..progress import ProgressBar

    reader, voice = reader_of(engine.tokenizer, args), voice_of(args)
    ids = reader.begin(engine.encode(as_prompt(text, args), template_options(args)))
    read = reader.text(ids)
    totals, layers = Totals(prompt_tokens=len(ids)), engine.config.num_layers
    with ProgressBar(total=layers, desc="prompt", unit="layer", leave=False, disable=None) as bar:
        events = engine.events([ids], on_layer=lambda _: bar.update(), **reader.options)
        began = time.perf_counter()
        for request, piece in events:
            bar.close()
            totals.add_pass(engine.streamer, time.perf_counter() - began, request)
            voice.tell(read.push(piece))
            began = time.perf_counter()
    voice.tell(read.finish())
    voice.end()
    say("\n" + totals.summary(engine.streamer))


def answer_file(engine: StreamingEngine, args: argparse.Namespace) -> None:
    """A line of JSON for each line of prompts, to stdout or appended to a file."""
    from ..llm.text.prompt_file import PromptFile, open_results, write_record

    _ = engine.tokenizer  # the error of a model without one, once, not line by line
    prompts = PromptFile(
        engine, raw=args.raw, template_options=template_options(args), complain=say
    )
    file, done = (sys.stdout.buffer, 0) if args.output is None else open_results(args.output)
    with nullcontext(file) if args.output is None else closing(file):
        for found in prompts.run(args.prompts, done, given(args, (*GENERATION, *CONSTRAINTS))):
            write_record(file, found)
