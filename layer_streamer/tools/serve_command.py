"""Serve a language model whose layers stream to clients of OpenAI's API, and to a browser.

    layer-streamer serve MODEL
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "Hello"}]}'

It answers this machine alone, unless --host names an address and a key is asked for. Keys come from
--api-key-file, or from LAYER_STREAMER_API_KEY. Ctrl-C or SIGTERM lets texts go on for a while, a
second one cuts. Exit code 2 is an error.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .command import at_least, require_server, say
from .engine_options import add_engine, add_language_model, open_engine, read_model

if TYPE_CHECKING:
    from ..llm.serving.streamed import StreamedEngine

HOST, PORT = "127.0.0.1", 8000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_language_model(parser)
    add = parser.add_argument_group("the server (docs/serving.md)").add_argument
    add("--host", default=HOST, metavar="ADDRESS", help=f"to listen at (default: {HOST})")
    add("--port", type=at_least(0), default=PORT, metavar="N", help=f"default: {PORT}; 0: any")
    keys_help = "a key a line, one of which is asked for; # begins a comment"
    add("--api-key-file", type=Path, metavar="FILE", help=keys_help)
    cors_help = "a site whose pages may ask, such as https://chat.example; may be repeated"
    add("--cors", action="append", default=[], metavar="ORIGIN", help=cors_help)
    add("--alias", metavar="NAME", help="of the model, for clients (default: the file's)")
    waiting_help = "texts that may wait for a row (64); more are told when to come back"
    add("--max-waiting", type=at_least(0), default=64, metavar="N", help=waiting_help)
    open_help = "connections open at a time (512), one for each request that waits or is answered"
    add("--max-connections", type=at_least(16), default=512, metavar="N", help=open_help)
    add("--embeddings", action="store_true", help="answer /v1/embeddings, too")
    drain_help = "for which texts may go on when the server is to end (60)"
    add("--drain-seconds", type=at_least(0), default=60, metavar="S", help=drain_help)
    add_engine(parser)


def run(args: argparse.Namespace) -> None:
    """Listen, open the model, answer until a signal comes."""
    require_server()
    from ..llm.serving.app import make_app
    from ..llm.serving.guarding.guard import Guard, check_bind
    from ..llm.serving.guarding.keys import Keys
    from ..llm.serving.limits import Limits
    from ..llm.serving.metrics import Metrics
    from ..llm.serving.server import Server, bind
    from ..llm.serving.working.worker import Worker

    keys = Keys.read(args.api_key_file)
    check_bind(args.host, keys)
    limits = Limits(
        max_waiting=args.max_waiting,
        max_connections=args.max_connections,
        drain_seconds=float(args.drain_seconds),
    )
    metrics = Metrics()
    with bind(args.host, args.port) as listening:
        host = f"[{args.host}]" if ":" in args.host else args.host
        url = f"http://{host}:{listening.getsockname()[1]}"
        worker = Worker(lambda: open_served(args, url), limits, metrics)
        app = make_app(worker, Guard(keys, args.cors), limits, metrics, embeddings=args.embeddings)
        try:
            Server(app, worker, limits).run(sockets=[listening])
        finally:
            worker.close()
    if worker.error is not None:
        raise worker.error


def open_served(args: argparse.Namespace, url: str) -> StreamedEngine:
    """The model, downloaded first if need be; in the thread that owns it."""
    from ..llm.serving.streamed import StreamedEngine

    model = read_model(args)
    _ = model.tokenizer  # the error of a model without one, before it is opened
    name = args.alias or Path(args.model).name.removesuffix(".gguf")
    engine = open_engine(args, model)
    engine.scheduler.max_waiting = args.max_waiting + engine.max_batch
    say(f"serving {name} at {url} (API: {url}/v1)")
    return StreamedEngine(engine, name)
