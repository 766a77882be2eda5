"""What the commands that open the language model engine share."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import (
    add_streamer_options,
    at_least,
    device_names,
    require_engine,
    say,
    streamer_options,
)

if TYPE_CHECKING:
    from ..llm.engine import StreamingEngine
    from ..llm.opening import Model

DTYPES = ("float32", "bfloat16", "float16")
DTYPE_HELP = "default: float32 on a CPU, bfloat16 on a GPU (float16 or float32 on an older one)"
ENGINE = (
    "max_length", "kv", "kv_int8", "kv_tokens", "max_batch", "prefill_chunk", "lookup", "draft",
    "reproducible", "adapter",
)  # fmt: skip
OF_OPENAI = ("presence_penalty", "frequency_penalty", "logit_bias")
"""Options of answers that transformers does without."""
GENERATION = (
    "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", *OF_OPENAI,
    "seed", "stop", "skip_special_tokens",
)  # fmt: skip


def add_language_model(parser: argparse.ArgumentParser) -> None:
    """The model that is opened."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a GGUF file, a directory with safetensors, or a repository on the Hugging Face hub "
        "(for GGUF owner/name:file-or-quantization), which is downloaded",
    )


def add_answering(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """How answers are made: groups of the help."""
    group = parser.add_argument_group("answers")
    add = group.add_argument
    add("--modules", action="store_true", help="by the model's own class, of transformers")
    tokens_help = f"of an answer at most (default: {max_new_tokens})"
    hide_help = "do not show what a model thinks before it answers, which goes to stderr"
    add("--hide-thinking", action="store_true", help=hide_help)
    add("--max-new-tokens", type=at_least(1), default=max_new_tokens, metavar="N", help=tokens_help)
    add_choosing(group)


def add_choosing(group: argparse._ArgumentGroup) -> None:
    """How prompts are written and tokens chosen."""
    add = group.add_argument
    add("--no-think", action="store_true", help="for a chat template that knows enable_thinking")
    add("--temperature", type=float, metavar="T", help="0: greedy; default: the model's own, or 0")
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="among the likeliest that together have P")
    add("--min-p", type=float, metavar="P", help="among those with P of the likeliest one's share")
    add("--repetition-penalty", type=float, metavar="R", help="above 1: repeat less")
    add("--presence-penalty", type=float, metavar="P", help="above 0: say new things (-2 to 2)")
    add("--frequency-penalty", type=float, metavar="P", help="above 0: repeat less (-2 to 2)")
    bias_help = "of a token, -100 (never) to 100; may be repeated"
    add("--logit-bias", type=token_bias, action="append", metavar="ID=B", help=bias_help)
    add("--seed", type=int, metavar="S", help="the same seed gives the same text")
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    special = "show special tokens, which are left out"
    add(
        "--show-special",
        action="store_false",
        default=None,
        dest="skip_special_tokens",
        help=special,
    )


def token_bias(text: str) -> tuple[str, float]:
    """What argparse calls with a token id and what is added to its logit."""
    token, _, bias = text.partition("=")
    return token, float(bias)


def add_engine(parser: argparse.ArgumentParser, *, here: bool = True) -> None:
    """How the engine is opened: groups of the help. ``here``: it is one, in this process, which can
    be looked at."""
    group = parser.add_argument_group("the engine (docs/llm.md)")
    add, one = group.add_argument, at_least(1)
    device_help = "a torch device, or several: cuda:0,cuda:1; default: the GPU if there is one"
    add("--device", metavar="D", help=device_help)
    add("--dtype", choices=DTYPES, help=DTYPE_HELP)
    add("--max-length", type=one, metavar="N", help="most tokens of a prompt and its answer")
    add("--kv", metavar="TIER", help="keys and values: auto (default), device or host")
    add("--kv-int8", action="store_true", default=None, help="those in host memory in eight bits")
    add("--kv-tokens", type=one, metavar="N", help="tokens of all rows together (--max-length)")
    add("--max-batch", type=one, metavar="N", help="rows at a time (8)")
    add("--prefill-chunk", type=one, metavar="N", help="tokens through a layer at a time (2048)")
    lookup_help = "several tokens a pass where the text repeats what was there before"
    add("--lookup", action="store_true", default=None, help=lookup_help)
    draft_help = "a small model with the same tokenizer, or self: several tokens a pass"
    add("--draft", metavar="MODEL", help=draft_help)
    same_help = "the same text to the bit, with and without drafts, alone and in a batch"
    add("--reproducible", action="store_true", default=None, help=same_help)
    add("--adapter", metavar="FOLDER", help="a LoRA of the model, as finetune and peft write it")
    if here:
        add("--plan", action="store_true", help="say first where everything will be")
        trace_help = "put on record which experts are asked for (layer-streamer experts)"
        add("--experts-trace", type=Path, metavar="FILE", help=trace_help)
        add("--timeline", type=Path, metavar="FILE", help="save the last pass for ui.perfetto.dev")
    add_streamer_options(parser)


def given(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """The options that were named on the command line."""
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def template_options(args: argparse.Namespace) -> dict[str, Any]:
    """For the model's chat template."""
    return {"enable_thinking": False} if args.no_think else {}


def stay_offline(args: argparse.Namespace) -> None:
    """Where the model is here, ask nothing of the hub: all is in the model's own files."""
    if Path(args.model).expanduser().exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def read_model(args: argparse.Namespace) -> Model:
    """What describes the model; ValueError, ImportError, in one line."""
    require_engine()
    stay_offline(args)
    from ..llm.opening import Model

    logging.getLogger("transformers").setLevel(logging.ERROR)
    return Model.read(args.model, say, getattr(args, "layer_pattern", None))


def open_engine(args: argparse.Namespace, model: Model, **defaults: Any) -> StreamingEngine:
    """The engine that the arguments ask for; ``defaults`` are for what they do not name."""
    import torch

    from ..llm.engine import StreamingEngine

    device = args.device or None
    for name in device_names(device or "cpu"):
        try:
            torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"--device {name}: not a torch device") from error
    dtype = getattr(torch, args.dtype) if args.dtype else None
    options = defaults | streamer_options(args) | given(args, ENGINE)
    options.pop("layer_pattern", None)  # the model's, which has been read
    engine = StreamingEngine(model, notify=say, **{**options, "device": device, "dtype": dtype})
    try:
        if args.plan:
            say(str(engine.plan))
        if args.experts_trace is not None:
            engine.record_experts(args.experts_trace)
    except BaseException:
        engine.close()
        raise
    return engine


def save_timeline(args: argparse.Namespace, engine: StreamingEngine) -> None:
    """That of the last pass, if it was asked for."""
    if args.timeline is not None and engine.streamer.last_pass is not None:
        engine.streamer.last_pass.save_timeline(args.timeline)
