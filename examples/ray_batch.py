"""Answer the rows of a file on a cluster of Ray, each machine with the model on its own disk.

    python examples/ray_batch.py MODEL IN.jsonl OUT.jsonl --actors 2
    python examples/ray_batch.py MODEL IN.parquet OUT.parquet --address auto --num-gpus 1

A row has a prompt (a question, or with --raw a text to be continued; token ids) or messages. OUT
has the rows of IN, in order, and beside what a row had its text, finish_reason, prompt_tokens,
new_tokens and error ("" but for a row that has failed, alone). OUT is there when all rows are
answered; until then OUT.part has answers, and the same command goes on from there. Both are files
of the machine where this runs. Exit code 2 is an error, 130 is Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before Ray is imported: nothing is reported

try:
    from layer_streamer import StreamerError
    from layer_streamer.tools import engine_options as engine
    from layer_streamer.tools.command import Parser, at_least, require_engine, say, streamer_options
    from layer_streamer.tools.faults import exit_code
except ImportError as error:
    sys.exit(f"error: {error} (pip install 'layer-streamer[ray]', or pip install -e '.[ray]')")

if TYPE_CHECKING:
    from layer_streamer.llm.batching.row_files import Piece, RowFile

ADDED = {"text": str, "finish_reason": str, "prompt_tokens": int, "new_tokens": int, "error": str}
BATCH = 256
"""Rows that share the passes."""
READERS = 2
"""Tasks that read IN ahead of the actors, a batch each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the script takes."""
    engine.add_language_model(parser)
    one, add = at_least(1), parser.add_argument
    add("source", type=Path, metavar="IN", help="rows: .jsonl or .parquet")
    add("output", type=Path, metavar="OUT", help="rows and answers: .jsonl or .parquet; resumed")
    add("--prompt-column", default="prompt", metavar="NAME", help="prompts (prompt)")
    add("--messages-column", default="messages", metavar="NAME", help="messages (messages)")
    add("--raw", action="store_true", help="continue prompts that are texts, without chat template")
    group = parser.add_argument_group("the cluster")
    add = group.add_argument
    add("--address", metavar="A", help="of a cluster; auto: this machine's (default: none, alone)")
    add("--actors", type=one, metavar="N", help="engines (one a GPU; without GPUs one a machine)")
    add("--batch-size", type=one, default=BATCH, metavar="N", help=f"rows at a time ({BATCH})")
    add("--num-gpus", type=float, metavar="N", help="of an actor; 0: a CPU (1 where there are any)")
    add("--num-cpus", type=one, metavar="N", help="of an actor; on a CPU its threads, too")
    group = parser.add_argument_group("answers")
    tokens_help = "of an answer at most (128)"
    group.add_argument("--max-new-tokens", type=one, metavar="N", help=tokens_help)
    engine.add_choosing(group)
    engine.add_engine(parser, here=False)


def run(args: argparse.Namespace) -> None:
    """Answer the rows that have no answer yet, then write OUT."""
    require_engine()
    for name in ("ray", "pyarrow", "pandas"):
        if find_spec(name) is None:
            raise ImportError(f"{name} is not installed (pip install 'layer-streamer[ray]')")
    from layer_streamer.llm.batching.row_files import kind_of, writer_of
    from layer_streamer.llm.text.prompt_file import open_results, write_record

    kind = kind_of(args.source)
    args.source.open("rb").close()  # its error, before anything is made
    if args.output.exists():
        raise ValueError(f"{args.output}: is there already")
    source = kind(args.source, (args.prompt_column, args.messages_column))
    write = writer_of(source, args.output, ADDED)
    pieces = list(source.pieces(args.batch_size))
    total = sum(piece["count"] for piece in pieces)
    part, new = (args.output.with_name(f"{args.output.name}.{end}") for end in ("part", "new"))
    file, done = open_results(part)
    with closing(file):
        if done > total:
            raise ValueError(f"{part}: answers more rows than the {total} of {args.source}")
        left = [piece for piece in pieces if piece["row"] + piece["count"] > done + 1]
        with closing(answers(args, source, left)) as found:
            for record in in_order(found, done, total):
                write_record(file, record)
        with open(part, "rb") as results:
            made = map(json.loads, results)
            write(new, ({name: one[name] for name in ADDED} for one in made))
        new.replace(args.output)
        part.unlink()
    say(f"{total} rows answered: {args.output}")


def in_order(found: Iterable[dict[str, Any]], done: int, total: int) -> Iterator[dict[str, Any]]:
    """Each row's result once, from row ``done`` + 1 on. StreamerError where one is missing: then
    nothing that comes after it is written."""
    for record in found:
        if record["line"] > done + 1:
            break
        if record["line"] == done + 1:  # those before are of a batch that was answered in part
            done += 1
            yield record
    if done < total:
        raise StreamerError(f"row {done + 1} came without an answer")


def answers(
    args: argparse.Namespace, source: RowFile, pieces: list[Piece]
) -> Generator[dict[str, Any]]:
    """Results of rows, in order, each with the number of its row ("line")."""
    if not pieces:
        return
    import ray
    from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

    from layer_streamer.llm.ray_data import AnswerLines

    with cluster(args):
        if not args.verbose:  # the error that ends a run is one line, ours
            logging.getLogger("ray.data.exceptions").setLevel(logging.CRITICAL)
        context = DataContext.get_current()
        context.execution_options.preserve_order = True
        # Each task gives one block. Were there several, a task that is begun again could cut its
        # rows elsewhere, and as Ray goes on with the block that it had come to, rows would come
        # twice or not at all.
        context.target_max_block_size = None
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        actors, resources = shares(nodes, args.actors, args.num_gpus, args.num_cpus)
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        rows = ray.data.from_items(pieces, override_num_blocks=len(pieces)).map_batches(
            partial(read, source), batch_size=None, batch_format="pyarrow", num_cpus=0,
            compute=TaskPoolStrategy(size=min(READERS, len(pieces))), label_selector=here,
        )  # fmt: skip
        answered = rows.map_batches(
            AnswerLines,
            fn_constructor_args=(model_of(args),),
            fn_constructor_kwargs=engine_of(args, on_cpu=not resources["num_gpus"]),
            batch_size=args.batch_size, batch_format="numpy",
            compute=ActorPoolStrategy(size=min(actors, len(pieces))), **resources,
        )  # fmt: skip
        try:
            for table in answered.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield from ({"line": row.pop("row"), **row} for row in table.to_pylist())
        except ray.exceptions.RayError as error:
            raise StreamerError(cause_of(str(error))) from error


def read(source: RowFile, batch: Any) -> dict[str, Any]:
    """The rows of a piece, on the machine that has their file."""
    import numpy as np

    (piece,) = batch.to_pylist()
    lines = np.empty(piece["count"], dtype=object)
    lines[:] = source.read(piece)
    return {"row": np.arange(len(lines)) + piece["row"], "line": lines}


@contextmanager
def cluster(args: argparse.Namespace) -> Iterator[None]:
    """Context in which Ray is there: what this process has, the cluster that is named, or one of
    this machine that ends with it."""
    import ray

    if ray.is_initialized():
        yield
        return
    address = args.address or os.environ.get("RAY_ADDRESS")
    at_sigterm = signal.getsignal(signal.SIGTERM)
    options = {"address": address} if address else {"address": "local", "include_dashboard": False}
    try:
        ray.init(log_to_driver=args.verbose, logging_level="WARNING", **options)
    except (ConnectionError, RuntimeError) as error:
        raise StreamerError(f"Ray, {address or 'local'}: {cause_of(str(error))}") from error
    except SystemExit as error:  # Ray's own handler of SIGTERM
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGTERM, at_sigterm)
    try:
        yield
    finally:
        ray.shutdown()


def shares(
    nodes: Sequence[dict[str, float]], actors: int | None, gpus: float | None, cpus: int | None
) -> tuple[int, dict[str, float]]:
    """How many actors, and what each takes of its node. ValueError if no node has that."""
    if gpus is None:
        gpus = float(any(node.get("GPU") for node in nodes))
    if gpus < 0:
        raise ValueError(f"--num-gpus {gpus:g}: must be 0 or more")
    if gpus:
        places = sum(int(node.get("GPU", 0) / gpus) for node in nodes)
        if not places:
            raise ValueError(f"--num-gpus {gpus:g}: no machine of the cluster has so many")
        return actors or places, {"num_gpus": gpus, **({"num_cpus": cpus} if cpus else {})}
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= (cpus or 1)]
    if not cores:
        raise ValueError(f"--num-cpus {cpus or 1}: no machine of the cluster has so many")
    actors = actors or len(cores)
    side_by_side = -(-actors // len(cores))
    return actors, {"num_gpus": 0, "num_cpus": cpus or max(min(cores) // side_by_side, 1)}


def model_of(args: argparse.Namespace) -> str:
    """A path as it is from everywhere on a machine, or a repository."""
    path = Path(args.model).expanduser()
    return str(path.absolute()) if path.exists() else args.model


def engine_of(args: argparse.Namespace, *, on_cpu: bool) -> dict[str, Any]:
    """Options of AnswerLines."""
    import torch

    options = streamer_options(args) | engine.given(args, engine.ENGINE)
    if args.dtype:
        options["dtype"] = getattr(torch, args.dtype)
    if on_cpu:
        options.setdefault("device", "cpu")  # Ray hides no GPU from an actor that asked for none
    return {
        **options,
        "names": (args.prompt_column, args.messages_column),
        "raw": args.raw,
        "answers": engine.given(args, engine.GENERATION),
        "template_options": engine.template_options(args),
    }


def cause_of(text: str) -> str:
    """One line of what Ray says: of a traceback what was raised first."""
    first = text.partition("\n\nThe above exception")[0]
    lines = [line.strip() for line in first.splitlines() if line.strip()]
    return lines[-1] if any(line.startswith('File "') for line in lines) else " ".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 after an error (one line on stderr), 130 after Ctrl-C or SIGTERM."""
    parser = Parser(
        prog="ray_batch.py",
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="show what actors print")
    return exit_code(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
