"""Measure experts that come from disk, beside reads of as many bytes and nothing else.

    python docs/benchmarks/measure_cold_experts.py CHECKPOINT OUT [--host-budget 1GiB] [--count 8]

Host memory is granted too little to hold experts, and before each turn the files' pages are dropped
from the page cache. In turn, the store brings so many experts of one layer that are in no slot, and
as many others are read by threads that do nothing but that: of the same number, in stretches of the
same length, past the page cache or not as the store does. Medians, and the ratio of the rates.

Appends a JSON line to OUT, and prints a row.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from measure import describe_machine

from layer_streamer import LayerStreamer
from layer_streamer.checkpoint.experts import expert_extents
from layer_streamer.passes.expert_tiers import READ_CHUNK
from layer_streamer.streamer import pipeline_of, store_of

PAGE = 4096


class RawReads:
    """Threads that read, each into memory of its own."""

    def __init__(self, paths: Sequence[Path], threads: int, *, direct: bool) -> None:
        flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
        self._files = {path: os.open(path, flags) for path in paths}
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._buffers = [mmap.mmap(-1, READ_CHUNK + 2 * PAGE) for _ in range(threads)]
        self._sizes = {path: path.stat().st_size for path in paths}

    def read(self, stretches: Sequence[tuple[Path, int, int]]) -> None:
        """All of them, shared out in turn."""
        mine = [stretches[i :: self._threads] for i in range(self._threads)]
        list(self._pool.map(self._read_some, self._buffers, mine))

    def _read_some(self, buffer: mmap.mmap, some: Sequence[tuple[Path, int, int]]) -> None:
        view = memoryview(buffer)
        for path, offset, nbytes in some:
            start = offset // PAGE * PAGE
            end = min(-(-(offset + nbytes) // PAGE) * PAGE, -(-self._sizes[path] // PAGE) * PAGE)
            os.preadv(self._files[path], [view[: end - start]], start)

    def close(self) -> None:
        self._pool.shutdown()
        for file in self._files.values():
            os.close(file)


def stretches_of(streamer: LayerStreamer, layer: int, experts: Sequence[int]) -> list[Any]:
    """What has to be read of experts: a chunk at most at a time."""
    store = store_of(streamer)
    assert store is not None
    return [
        (extent.path, extent.offset + at, min(READ_CHUNK, extent.nbytes - at))
        for expert in experts
        for extent in expert_extents(store.layers[layer], expert)
        for at in range(0, extent.nbytes, READ_CHUNK)
    ]


def drop_pages(streamer: LayerStreamer) -> None:
    for path in streamer.manifest.files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def turns(
    streamer: LayerStreamer, raw: RawReads, count: int, dice: random.Random
) -> Iterator[tuple[float, float]]:
    """Of each layer, seconds of the store and of reads alone; which is first changes in turn."""
    pipeline = pipeline_of(streamer)
    for layer, weights in streamer.sweep():
        experts = getattr(weights, "experts", None)
        if experts is None:
            continue
        drop_pages(streamer)
        chosen = dice.sample(range(len(experts)), 2 * count)
        seconds = [0.0, 0.0]
        for way in (0, 1) if layer % 2 else (1, 0):
            began = time.perf_counter()
            if way == 0:
                experts.bring(chosen[:count])
                pipeline.devices[0].current_stream().synchronize()
            else:
                raw.read(stretches_of(streamer, layer, chosen[count:]))
            seconds[way] = time.perf_counter() - began
        yield seconds[0], seconds[1]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as stack:
        streamer = stack.enter_context(
            LayerStreamer.from_checkpoint(
                args.path, device=args.device, experts="demand", expert_slots=args.count * 48,
                host_budget=args.host_budget, track_progress=False,
            )
        )  # fmt: skip
        tiers = streamer.plan.expert_tiers
        assert tiers is not None
        direct, threads = tiers.read_mode == "direct", streamer.plan.read_threads
        raw = RawReads(list(streamer.manifest.files), threads, direct=direct)
        stack.callback(raw.close)
        dice, found = random.Random(0), list[tuple[float, float]]()
        for _ in range(args.passes):
            found += [
                pair
                for layer, pair in enumerate(turns(streamer, raw, args.count, dice))
                if layer not in tiers.layers
            ]
        store = store_of(streamer)
        assert store is not None
        nbytes = args.count * next(iter(store.layers.values())).expert_nbytes
    own, alone = (median(column) for column in zip(*found, strict=True))
    return {
        "count": args.count, "bytes": nbytes, "read_mode": tiers.read_mode, "threads": threads,
        "in_pages": len(tiers.layers), "turns": len(found), "seconds": own, "raw_seconds": alone,
        "share": alone / own,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """One row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("path", type=Path, metavar="CHECKPOINT")
    add("out", type=Path, metavar="OUT")
    add("--count", type=int, default=8, help="experts at a time")
    add("--host-budget", default="1GiB")
    add("--device", default="cuda")
    add("--passes", type=int, default=3, metavar="N")
    args = parser.parse_args(argv)
    found = measure(args)
    with open(args.out, "a") as file:
        file.write(json.dumps({**describe_machine(), "path": str(args.path)} | found) + "\n")
    print(
        f"{found['count']} experts, {found['bytes'] / 1e6:.1f} MB, {found['read_mode']} on "
        f"{found['threads']} threads: {found['share']:.3f} of the rate of reads alone "
        f"({found['bytes'] / found['raw_seconds'] / 1e9:.2f} GB/s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
