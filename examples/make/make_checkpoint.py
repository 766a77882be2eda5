"""Write a checkpoint with the shape of a known model and random values, to measure with.

    python examples/make/make_checkpoint.py OUT --shape qwen2.5-7b [--layers 4] [--format ct4]

OUT becomes a directory as transformers writes it: config.json and safetensors, no tokenizer; with
--format q4_k or q8_0, a GGUF file with a tokenizer of bytes. The path goes to stdout; progress goes
to stderr. Exit code 2 is an error, 130 is Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from made import FORMATS, MARK, Made, Values, is_file, plan_made
from shapes import SHAPES
from shards import Shard
from tqdm import tqdm

from layer_streamer.llm.quantize.shards import check_room
from layer_streamer.machine.atomic import naming
from layer_streamer.tools.command import Parser, say
from layer_streamer.tools.engine_options import DTYPES
from layer_streamer.tools.faults import exit_code
from layer_streamer.transport.tasks import run_all

NUM_WRITERS = 4
SYNC_NBYTES = 256 << 20
MAX_LAYERS = 1000
OWN_FILES = re.compile(
    r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)


class Writer:
    """Writes shards, several at a time: while one waits for the disk, another fills the cache.

    Everything is on the disk at the end. This costs what the disk costs, but a checkpoint to
    measure with must not be left to the page cache: dirty pages stay when a benchmark drops the
    cache, so that it would read memory and call it the disk, and writing them back would go on
    during the measurement. It is done bit by bit, so that the progress bar shows the disk's
    progress and Ctrl-C never waits for more than NUM_WRITERS * SYNC_NBYTES to get there.
    """

    def __init__(self, values: Values, on_written: Callable[[int], object]) -> None:
        self._values = values
        self._on_written, self._lock = on_written, threading.Lock()
        self._stopped = threading.Event()

    def write(self, directory: Path, shards: Sequence[Shard]) -> None:
        """Write all of them. After an error or an interrupt no thread is left."""
        writes = [partial(self._write_shard, directory, shard) for shard in shards]
        run_all(writes, NUM_WRITERS, stopped=self._stopped)

    def _write_shard(self, directory: Path, shard: Shard) -> None:
        try:
            with open(directory / shard.name, "wb", buffering=0) as file:
                offset = unsynced = 0
                for piece in self._pieces(shard):
                    if self._stopped.is_set():
                        return
                    self._write_at(file.fileno(), piece, offset)
                    offset, unsynced = offset + piece.nbytes, unsynced + piece.nbytes
                    if unsynced >= SYNC_NBYTES or offset == shard.nbytes:
                        os.fdatasync(file.fileno())
                        unsynced = 0
        except OSError as error:
            error.filename = shard.name  # which calls that are given a descriptor do not know
            raise

    def _pieces(self, shard: Shard) -> Iterator[memoryview]:
        yield memoryview(shard.header)
        offset = len(shard.header)
        for name, count in shard.counts.items():
            for piece in self._values.tensor(name, count, shard.begin + offset):
                yield piece
                offset += piece.nbytes
            padding = -offset % shard.alignment
            if padding:
                yield memoryview(bytes(padding))
                offset += padding

    def _write_at(self, descriptor: int, data: memoryview, offset: int) -> None:
        while data:  # the system may take several calls
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written
            with self._lock:
                self._on_written(written)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; ValueError for one that makes no sense."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", metavar="OUT", type=Path, help="the directory to make; its parent must be there")
    add("--shape", required=True, choices=list(SHAPES), help="whose config the model has")
    add("--layers", type=int, metavar="N", help="that many layers instead of the model's own")
    add("--format", choices=FORMATS, help="how matrices are packed; default: not at all")
    add("--dtype", choices=DTYPES, help="of what is not packed; default: bfloat16")
    add("--shard-gb", type=float, metavar="GB", help="largest file; default: 5")
    add("--seed", type=int, default=0, metavar="S", help="the same seed gives the same bytes")
    add("--force", action="store_true", help="replace a checkpoint that this script wrote")
    args = parser.parse_args(argv)
    if args.layers is not None and not 1 <= args.layers <= MAX_LAYERS:
        raise ValueError(f"--layers {args.layers}: must be from 1 to {MAX_LAYERS}")
    if args.shard_gb is not None and not args.shard_gb > 0:
        raise ValueError(f"--shard-gb {args.shard_gb:g}: must be above 0")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: must be 0 or more")
    _check_format(args)
    return args


def _check_format(args: argparse.Namespace) -> None:
    """ValueError for options that the format does not have; fills in the others' defaults."""
    if is_file(args.format):
        for option in ("dtype", "shard_gb"):
            if getattr(args, option) is not None:
                name = option.replace("_", "-")
                raise ValueError(f"--{name}: not with --format {args.format}, which is one file")
        if args.out.suffix != ".gguf":
            raise ValueError(f"{args.out}: with --format {args.format}, it must end in .gguf")
    if args.format == "bf16" and args.dtype not in (None, "bfloat16"):
        raise ValueError(f"--dtype {args.dtype}: not with --format bf16")
    args.dtype = args.dtype or "bfloat16"
    args.shard_gb = args.shard_gb or 5.0


def run(args: argparse.Namespace) -> None:
    """Check that there is room, write beside OUT, and give it the name at the very end.

    Leaves signals ignored: see main().
    """
    out = Path(os.path.realpath(args.out))
    check = check_file if is_file(args.format) else check_target
    check(out, force=args.force)
    config = dict(SHAPES[args.shape]) | {"torch_dtype": args.dtype}
    config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
    config[MARK] = {"shape": args.shape, "seed": args.seed}
    plan = plan_made(config, args.format, args.dtype, args.shard_gb * 1e9)
    check_room(out, plan.nbytes + sum(map(len, plan.texts.values())))

    began = time.perf_counter()
    temporary = tempfile.TemporaryDirectory(dir=out.parent, prefix=".make-checkpoint-")
    try:
        made = write_made(plan, Path(temporary.name) / "made", args.seed)
        check(out, force=args.force)  # what has come there meanwhile
        _install(made, out, Path(temporary.name) / "old")
    finally:
        # Removing gigabytes takes seconds: an impatient second Ctrl-C must not leave them behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        temporary.cleanup()
    seconds = time.perf_counter() - began
    count = len(plan.shards)
    files = f"{count} file{'s' if count > 1 else ''}"
    speed = plan.nbytes / seconds / 1e9
    say(f"{plan.nbytes / 1e9:.2f} GB in {files}, {seconds:.1f} s: {speed:.2f} GB/s")


def write_made(plan: Made, directory: Path, seed: int) -> Path:
    """Write all files; the path of what is to become OUT."""
    directory.mkdir()
    for name, text in plan.texts.items():
        (directory / name).write_text(text)
    values = plan.values(seed)
    with tqdm(total=plan.nbytes, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        Writer(values, bar.update).write(directory, plan.shards)
    return directory if plan.texts else directory / plan.shards[0].name


def check_target(out: Path, *, force: bool) -> None:
    """ValueError if OUT is there, unless it may be replaced and this script wrote all it holds."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise ValueError(f"{out}: not a directory")
    if os.path.ismount(out):
        raise ValueError(f"{out}: a mount point; name a directory below it")
    if not force:
        raise ValueError(f"{out}: exists (--force replaces what this script wrote)")
    names = sorted(path.name for path in out.iterdir())
    for name in names:
        if not OWN_FILES.fullmatch(name) or not (out / name).is_file():
            raise ValueError(f"{out}: has {name!r}, which this script did not write")
    if names and not _is_marked(out):
        raise ValueError(f"{out}: this script did not write it: config.json has no {MARK!r}")


def check_file(out: Path, *, force: bool) -> None:
    """ValueError if OUT is there, unless it may be replaced and this script wrote it."""
    if not os.path.lexists(out):
        return
    if not out.is_file():
        raise ValueError(f"{out}: not a file")
    if not force:
        raise ValueError(f"{out}: exists (--force replaces what this script wrote)")
    with open(out, "rb") as file:
        head = file.read(4096)
    if head[:4] != b"GGUF" or MARK.encode() not in head:
        raise ValueError(f"{out}: this script did not write it: its metadata has no {MARK!r}")


def _is_marked(out: Path) -> bool:
    try:
        config = json.loads((out / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and MARK in config


def _install(made: Path, out: Path, old: Path) -> None:
    """Give ``made`` the name ``out``; what had it goes to ``old``, and comes back if that fails."""
    try:
        if out.exists():
            out.rename(old)
        made.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise


def main(argv: list[str] | None = None) -> int:
    """Exit code of the program: 0, 2 after an error, 130 after Ctrl-C or SIGTERM."""
    handler = signal.getsignal(signal.SIGINT)

    def make() -> None:
        args = parse_args(argv)
        with naming(args.out):
            run(args)
        print(args.out)

    try:
        return exit_code(make)
    finally:
        signal.signal(signal.SIGINT, handler)


if __name__ == "__main__":
    sys.exit(main())
