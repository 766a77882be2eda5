"""Generate text with a language model whose layers stream through bounded memory.

    layer-streamer generate MODEL --prompt "What is the capital of France?"
    layer-streamer generate MODEL --chat
    layer-streamer generate MODEL --prompts questions.jsonl --output answers.jsonl

MODEL is a GGUF file, a directory with safetensors, or the name of a Hugging Face repository (for
GGUF owner/name:file-or-quantization), which is downloaded. Only the generated text goes to stdout;
progress and the closing summary go to stderr. Exit code 2 is an error, 130 is Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import Parser, library_errors

if TYPE_CHECKING:  # torch takes seconds to import: main imports it where Ctrl-C is caught
    from ..llm.engine import StreamingEngine
    from ..llm.opening import Model

DTYPES = ("float32", "bfloat16", "float16")
POOLS = ("n_gpu", "n_cpu_pinned", "n_cpu")
ENGINE = (
    *POOLS, "device_budget", "host_budget", "read_mode", "max_length", "kv", "kv_int8", "kv_tokens",
    "max_batch", "prefill_chunk",
)  # fmt: skip
"""Options that go to the engine as they are, if they are given."""
GENERATION = (
    "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop"
)  # fmt: skip
"""Options that go to the generation."""


def main(argv: list[str] | None = None) -> int:
    """Exit code of the program: 0, 2 after an error, 130 after Ctrl-C."""
    try:
        args = parse_args(argv)
        with library_errors():
            run(args)
    except KeyboardInterrupt:
        say("")
        return 130
    except BrokenPipeError:
        # The reader has gone. Python would flush stdout once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, ImportError) as error:
        say(f"error: {' '.join(str(error).split())}")
        return 2
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; ValueError for one that makes no sense."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a path, or the name of a Hugging Face repository")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="what to answer; - reads it from stdin")
    what.add_argument("--chat", action="store_true", help="answer line after line of stdin")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="answer each line (JSON)")
    add("--output", type=Path, metavar="FILE", help="where the answers to --prompts go; resumed")
    add("--raw", action="store_true", help="continue the prompt as it is, without chat template")
    add("--no-think", action="store_true", help="for a chat template that knows enable_thinking")
    add("--max-new-tokens", type=_at_least(1), default=128, metavar="N", help="default: 128")
    _add_sampling(add)
    dtype_help = "default: float32 on a CPU, bfloat16 on a GPU (float16 or float32 on an older one)"
    add("--dtype", choices=DTYPES, help=dtype_help)
    add("--device", metavar="D", help="a torch device; default: the GPU if there is one")
    for pool in POOLS:
        flag, place = "--" + pool.replace("_", "-"), pool[2:].replace("_", "-")
        add(flag, type=_at_least(0), metavar="N", help=f"layers held ahead in the {place} pool")
    add("--device-budget", metavar="BYTES", help='memory of the device to use: "6GiB", "auto"')
    add("--host-budget", metavar="BYTES", help="the same of host memory")
    add("--read-mode", metavar="MODE", help="auto (default), buffered, direct or mapped")
    _add_memory(add)
    add("--plan", action="store_true", help="say first where everything will be")
    add("--timeline", type=Path, metavar="FILE", help="save the last pass for ui.perfetto.dev")
    args = parser.parse_args(argv)
    if args.output is not None and args.prompts is None:
        parser.error("--output: belongs to --prompts")
    return args


def _add_sampling(add: Callable[..., Any]) -> None:
    add("--temperature", type=float, metavar="T", help="0: greedy; default: the model's own, or 0")
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="among the likeliest that together have P")
    add("--min-p", type=float, metavar="P", help="among those with P of the likeliest one's share")
    add("--repetition-penalty", type=float, metavar="R", help="above 1: repeat less")
    add("--seed", type=int, metavar="S", help="the same seed gives the same text")
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")


def _add_memory(add: Callable[..., Any]) -> None:
    one = _at_least(1)
    add("--max-length", type=one, metavar="N", help="most tokens of a prompt and its answer")
    add("--kv", metavar="TIER", help="keys and values: auto (default), device or host")
    add("--kv-int8", action="store_true", default=None, help="those in host memory in eight bits")
    add("--kv-tokens", type=one, metavar="N", help="tokens of all rows together (--max-length)")
    add("--max-batch", type=one, metavar="N", help="rows of --prompts at a time (8)")
    add("--prefill-chunk", type=one, metavar="N", help="tokens through a layer at a time (2048)")


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}: must be at least {least}")
        return value

    return number


def run(args: argparse.Namespace) -> None:
    """Read what describes the model, open the engine, do what was asked."""
    if Path(args.model).expanduser().exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the model's own files
    import torch

    from ..llm.engine import StreamingEngine
    from ..llm.kv.threads import leave_a_core
    from ..llm.opening import Model

    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        torch.device(args.device or "cpu")
    except RuntimeError as error:
        raise ValueError(f"--device {args.device}: not a torch device") from error
    model = Model.read(args.model, say)
    options = given(args, ENGINE)
    prompt = None
    if args.prompt is not None:
        prompt = read_prompt(args.prompt)
        options.setdefault("max_length", room_for(model, prompt, args))
    dtype = getattr(torch, args.dtype) if args.dtype else None
    leave_a_core()
    with StreamingEngine(model, device=args.device, dtype=dtype, notify=say, **options) as engine:
        if args.plan:
            say(str(engine.plan))
        if prompt is not None:
            answer(engine, prompt, args)
        elif args.chat:
            chat(engine, args)
        else:
            answer_file(engine, args)
        if args.timeline is not None and engine.streamer.last_pass is not None:
            engine.streamer.last_pass.save_timeline(args.timeline)


def given(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """The options that were named on the command line."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def read_prompt(prompt: str) -> str:
    """The prompt itself, or stdin for "-", without the newline that ends a line."""
    if prompt != "-":
        return prompt
    return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")


def as_prompt(text: str, args: argparse.Namespace) -> Any:
    """A text to be continued, or a user's message."""
    return text if args.raw else [{"role": "user", "content": text}]


def template_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"enable_thinking": False} if args.no_think else {}


def room_for(model: Model, text: str, args: argparse.Namespace) -> int:
    """Tokens of the prompt and its answer, as far as the model's context goes."""
    from ..llm.text.prompts import PromptEncoder

    encoder = PromptEncoder(lambda: model.tokenizer, model.config.vocab_size, lambda _: None)
    ids = encoder.encode(as_prompt(text, args), template_options(args))
    room: int = len(ids) + args.max_new_tokens
    return min(room, model.config.max_positions)


def answer(engine: StreamingEngine, text: str, args: argparse.Namespace) -> None:
    """Generate, each token's text on stdout as soon as it is known."""
    from tqdm import tqdm

    from ..llm.memory.totals import Totals

    ids = engine.encode(as_prompt(text, args), template_options(args))
    totals, layers = Totals(prompt_tokens=len(ids)), engine.config.num_layers
    with tqdm(total=layers, desc="prompt", unit="layer", leave=False, disable=None) as bar:
        options = given(args, GENERATION)
        events = engine.events([ids], on_layer=lambda _: bar.update(), **options)
        began = time.perf_counter()
        for _, piece in events:
            bar.close()
            totals.add_pass(engine.streamer, time.perf_counter() - began)
            write(piece)
            began = time.perf_counter()
    say("\n" + totals.summary(engine.streamer))


def chat(engine: StreamingEngine, args: argparse.Namespace) -> None:
    """Answer what is typed, until the end of the input."""
    from ..llm.text.chat import Chat, read_lines, run_chat

    options = given(args, GENERATION) | {"chat_template_kwargs": template_options(args)}
    mark = "> " if sys.stdin.isatty() else ""
    run_chat(Chat(engine, write, options), read_lines(lambda: input(mark)), say)


def answer_file(engine: StreamingEngine, args: argparse.Namespace) -> None:
    """A line of JSON for each line of prompts, to stdout or appended to a file."""
    from ..llm.text.prompt_file import PromptFile, open_results, write_record

    prompts = PromptFile(
        engine, raw=args.raw, template_options=template_options(args), complain=say
    )
    file, done = (sys.stdout.buffer, 0) if args.output is None else open_results(args.output)
    with nullcontext(file) if args.output is None else closing(file):
        for found in prompts.run(args.prompts, done, given(args, GENERATION)):
            write_record(file, found)


def write(text: str) -> None:
    """Text to stdout at once, as UTF-8 whatever the locale."""
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    sys.stdout.buffer.flush()


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
