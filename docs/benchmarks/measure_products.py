"""Measure products of few tokens on the processor, straight from packed bytes and in other ways.

    python docs/benchmarks/measure_products.py [--formats Q4_0,ct4] [--tokens 1,2,4,8] [--threads 1]

For each format, different matrices of ROWS x WIDTH, of --nbytes in all, so that no cache holds
them, are multiplied one after the other: by the compiled kernels, and by plain torch, which unpacks
them first; in turn, and float32. Beside them torch's own product of bfloat16 with such matrices.
Prints a line of JSON for each format, count of tokens and of threads: GB/s of the bytes that lie in
memory, of the median of rounds. A table ends it, on stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from layer_streamer import parse_bytes
from layer_streamer.llm.host_kernels.library import FORMATS, library
from layer_streamer.llm.host_kernels.products import multiply
from layer_streamer.llm.weights.dequant import Unpacker, Widest
from layer_streamer.llm.weights.packed import CT_BITS, FLOATS, Packed
from layer_streamer.llm.weights.quants import BLOCK_TYPES

CPU = torch.device("cpu")
GROUP = 128
"""Columns that share a scale, of the formats that leave it open."""
ONE = 0x3C00
"""The float16 number 1."""
COLUMNS = ("format", "threads", "tokens", "packed GB/s", "unpacked first", "bf16 linear")
CPUINFO = Path("/proc/cpuinfo")


def main() -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--formats", default=",".join(FORMATS), metavar="F,F")
    add("--tokens", default="1,2,4,8", metavar="N,N")
    add("--threads", default="1", metavar="N,N")
    add("--shape", default="4096x4096", metavar="ROWSxWIDTH")
    add("--nbytes", default="256MiB", help="of the matrices of one format")
    add("--rounds", type=int, default=7, metavar="N")
    args = parser.parse_args()
    if library() is None:
        return 1
    rows, width = (int(number) for number in args.shape.split("x"))
    nbytes = parse_bytes("nbytes", args.nbytes)
    measured = list[dict[str, object]]()
    own = {"shape": args.shape, "machine": machine(), "torch": torch.__version__}
    for kind in args.formats.split(","):
        for threads in map(int, args.threads.split(",")):
            torch.set_num_threads(threads)
            for found in products(kind, (rows, width), nbytes, args):
                measured.append({"format": kind, "threads": threads, **found, **own})
                print(json.dumps(measured[-1]), flush=True)
    print_table(measured)
    return 0


def products(
    kind: str, shape: tuple[int, int], nbytes: int, args: argparse.Namespace
) -> list[dict[str, object]]:
    """Of one format, for each count of tokens."""
    rows, width = shape
    first = matrix(kind, rows, width)
    each = sum(part.nbytes for part in first.parts.values())
    matrices = [first, *(copied(first) for _ in range(nbytes // each))]
    plain = torch.randn(rows, width, device=CPU, dtype=torch.float32).bfloat16()
    others = [plain.clone() for _ in range(max(1, nbytes // plain.nbytes))]
    found = list[dict[str, object]]()
    for tokens in map(int, args.tokens.split(",")):
        x_TD = torch.randn(tokens, width, device=CPU, dtype=torch.float32)
        brief_TD = x_TD.bfloat16()
        ways: dict[str, tuple[Callable[[], None], int]] = {
            "packed": (each_of(matrices, multiply, x_TD), len(matrices) * each),
            # Slow, and no faster for a matrix that a cache holds.
            "unpacked": (each_of(matrices[:1], unpacker_of(kind, width), x_TD), each),
            "bf16": (each_of(others, linear, brief_TD), len(others) * plain.nbytes),
        }
        seconds = {name: list[float]() for name in ways}
        for turn in range(args.rounds + 1):
            for name, (run, _) in ways.items():
                begin = time.perf_counter()
                run()
                if turn:
                    seconds[name].append(time.perf_counter() - begin)
        rates = {name: ways[name][1] / median(own) / 1e9 for name, own in seconds.items()}
        found.append({"tokens": tokens, "gb_per_second": rates})
    return found


def each_of(
    items: Sequence[Any], function: Callable[[Any, torch.Tensor], object], x_TD: torch.Tensor
) -> Callable[[], None]:
    """A call of a function with each of them."""

    def run() -> None:
        for item in items:
            function(item, x_TD)

    return run


def linear(weight_ND: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
    """torch's own product."""
    return F.linear(x_TD, weight_ND)


def unpacker_of(kind: str, width: int) -> Callable[[Packed, torch.Tensor], torch.Tensor]:
    """What the engine does where no kernel serves."""
    unpacker = Unpacker(CPU, torch.float32, Widest(width, frozenset([(kind, True)])))

    def multiply_unpacked(packed: Packed, x_TD: torch.Tensor) -> torch.Tensor:
        y_TN = x_TD.new_empty(x_TD.shape[0], packed.rows)
        for start, end, rows_ND in unpacker.blocks(packed):
            torch.mm(x_TD, rows_ND.t(), out=y_TN[:, start:end])
        return y_TN

    return multiply_unpacked


def matrix(kind: str, rows: int, width: int) -> Packed:
    """Random codes; the scales of blocks are 1."""
    if kind in BLOCK_TYPES:
        block = BLOCK_TYPES[kind]
        shape = (rows, width // block.weights, block.nbytes)
        raw = torch.randint(0, 256, shape, device=CPU, dtype=torch.uint8)
        for place in block.scales:
            raw[..., place], raw[..., place + 1] = ONE & 255, ONE >> 8
        parts = {"raw": raw.flatten(1)}
        return Packed(format=kind, rows=rows, width=width, parts=parts, group=block.weights)
    if kind in FLOATS:
        weight = torch.randn(rows, width, device=CPU, dtype=torch.float32).to(FLOATS[kind])
        return Packed(format=kind, rows=rows, width=width, parts={"weight": weight})
    words = torch.randint(
        -(2**31), 2**31, (rows, width * CT_BITS[kind] // 32), device=CPU, dtype=torch.int64
    ).int()
    scale = torch.rand(rows, width // GROUP, device=CPU, dtype=torch.float32).half()
    parts = {"packed": words, "scale": scale}
    return Packed(format=kind, rows=rows, width=width, parts=parts, group=GROUP)


def copied(packed: Packed) -> Packed:
    """The same in other memory."""
    parts = {name: part.clone() for name, part in packed.parts.items()}
    return Packed(
        format=packed.format, rows=packed.rows, width=packed.width, parts=parts, group=packed.group
    )


def machine() -> str:
    """The processor's name."""
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "?")


def print_table(measured: Sequence[dict[str, object]]) -> None:
    """All that was measured."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for one in measured:
        rates = one["gb_per_second"]
        assert isinstance(rates, dict)
        cells = [str(one[name]) for name in COLUMNS[:3]]
        rows.append((*cells, *(f"{rate:.2f}" for rate in rates.values())))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
