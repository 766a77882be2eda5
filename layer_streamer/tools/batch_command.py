"""Answer a file of requests, as OpenAI's batches are written, with a model whose layers stream.

    layer-streamer batch MODEL IN.jsonl OUT.jsonl
    layer-streamer batch MODEL IN.jsonl OUT-3.jsonl --shard 3/10

IN has a request a line ({"custom_id", "method", "url", "body"}), or a prompt as "layer-streamer
generate --prompts" takes it. OUT gets a line for each, as texts end; the same command goes on where
one was ended. Exit code 2 is an error, 130 is Ctrl-C.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import at_least, require_bodies, require_engine, say
from .engine_options import (
    GENERATION,
    add_choosing,
    add_engine,
    add_language_model,
    given,
    open_engine,
    read_model,
    save_timeline,
    template_options,
)

if TYPE_CHECKING:
    from ..llm.batching.job import Counts
    from ..llm.batching.lines import Shard
    from ..llm.batching.results import Results
    from ..llm.opening import Model
    from ..progress import ProgressBar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_language_model(parser)
    add = parser.add_argument
    add("source", type=Path, metavar="IN", help="requests or prompts, a line of JSON each")
    add("output", type=Path, metavar="OUT", help="where the answers go; resumed")
    add("--shard", default="1/1", metavar="K/N", help="the lines of the K-th of N machines")
    add("--raw", action="store_true", help="continue prompts that are texts, without chat template")
    group = parser.add_argument_group("answers, of lines that do not say so themselves")
    tokens_help = "of an answer at most (a prompt's: 128; of a request as a server has it)"
    add = group.add_argument
    add("--max-new-tokens", type=at_least(1), metavar="N", help=tokens_help)
    add_choosing(group)
    add_engine(parser)


def run(args: argparse.Namespace) -> None:
    """Read what describes the model, open the engine, answer what has no answer yet."""
    require_engine()
    require_bodies()
    from ..llm.batching.lines import Shard, lines_of
    from ..llm.batching.results import Results

    shard = _shard(args.shard, Shard)
    args.source.open("rb").close()  # its error, before anything is opened or made
    if args.output.exists() and args.output.samefile(args.source):
        raise ValueError(f"{args.output}: is the file of requests itself")
    with closing(Results(args.output)) as results:
        left = None
        if args.source.is_file():
            numbers = (number for number, _ in lines_of(args.source) if shard.has(number))
            left = sum(number not in results for number in numbers)
        if left == 0:
            say(f"every line has its answer: {args.output}")
        else:
            answer(args, shard, results, left)


def _shard(text: str, kind: type[Shard]) -> Shard:
    try:
        return kind.read(text)
    except ValueError as error:
        raise ValueError(f"--shard: {error}") from error


def answer(args: argparse.Namespace, shard: Shard, results: Results, left: int | None) -> None:
    """Open the engine and answer; ``left``: lines, if their number is known."""
    from ..llm.batching.asked import Manner
    from ..llm.batching.job import BatchJob
    from ..progress import ProgressBar

    model = read_model(args)
    _ = model.tokenizer  # the error of a model without one, once, not line by line
    manner = Manner(
        shard=shard,
        model=Path(args.model).name.removesuffix(".gguf"),
        options=given(args, GENERATION),
        template_options=template_options(args),
        raw=args.raw,
    )
    with open_engine(args, model, **room(args, model)) as engine:
        began = time.perf_counter()
        with ProgressBar(total=left, desc="batch", unit="line", disable=None) as bar:
            job = BatchJob(
                engine, args.source, results, manner,
                lambda counts: show(bar, counts, time.perf_counter() - began),
            )  # fmt: skip
            ended = "; it goes on when it is started again"
            try:
                job.run()
                ended = ""
            finally:
                bar.close()
                say(f"{summary(job.counts, time.perf_counter() - began)}: {args.output}{ended}")
        save_timeline(args, engine)


def room(args: argparse.Namespace, model: Model) -> dict[str, Any]:
    """What the engine is to hold, where nobody says."""
    import torch

    from ..llm.batching.room import many_rows

    dtype = getattr(torch, args.dtype) if args.dtype else None
    return many_rows(model, {**vars(args), "device": args.device or None, "dtype": dtype})


def show(bar: ProgressBar, counts: Counts, seconds: float) -> None:
    """The bar, as of now."""
    rate = counts.tokens / seconds if seconds else 0.0
    bar.set_postfix_str(f"{counts.rows} rows, {rate:.1f} tokens/s", refresh=False)
    bar.update(counts.answered - bar.n)


def summary(counts: Counts, seconds: float) -> str:
    """The closing line."""
    refused = f", {counts.refused} of them with an error" if counts.refused else ""
    rate = counts.tokens / seconds if seconds else 0.0
    return (
        f"{counts.answered} lines answered{refused}; "
        f"{counts.tokens} tokens in {seconds:.1f} s ({rate:.1f} tokens/s)"
    )
