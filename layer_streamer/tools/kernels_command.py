"""Measure the Triton kernels of the engine beside the device's own copy bandwidth.

    layer-streamer kernels [--save]

Three tables: unpacking, each format over memory that no cache holds; products of a packed matrix
with few tokens, and on tensor cores, against unpacking it first; norms and SwiGLU, against plain
torch. GB/s are bytes read and written. From the last two follow token counts from which one way is
faster, which --save keeps for this GPU: the engine goes by them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from contextlib import nullcontext, redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, Any

from .command import add_json

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

    from ..llm.weights.packed import Packed

TABLES = ("unpack", "product", "pointwise", "tiles", "product_tiles")
TOKENS = (1, 2, 4, 6, 8, 12, 16, 32, 64, 96, 128)
MORE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
GATE = (18944, 3584)
"""The largest matrix of a 7B model: 68M weights."""
DOWN = GATE[::-1]
"""That of as many weights in few rows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add = parser.add_argument
    add("--device", default="cuda", metavar="D", help="an NVIDIA GPU, such as cuda:0")
    add("--only", choices=TABLES, action="append", help="one table; may be repeated")
    add("--formats", metavar="F,F", help="of the packed formats, only these, such as Q4_K,ct4")
    add("--rows", type=int, default=16384, metavar="N", help="of an unpacked matrix (16384)")
    add("--width", type=int, default=4096, metavar="N", help="of an unpacked matrix (4096)")
    add("--repeats", type=int, default=20, metavar="N", help="the median is of so many (20)")
    add("--save", action="store_true", help="keep the token counts for this GPU")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    check(args)
    # Rows are printed as they come, above the bar.
    with redirect_stdout(sys.stderr) if args.json else nullcontext():
        report = measure(args, open_device(args.device))
    if args.json or not sys.stdout.isatty():
        print(json.dumps(report), flush=True)


def check(args: argparse.Namespace) -> None:
    """ValueError for arguments that make no sense together."""
    for name in ("rows", "width", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.width % 256 or args.rows % 8:
        raise ValueError(f"--rows {args.rows} --width {args.width}: multiples of 8 and 256")
    args.only = args.only or TABLES[:3]
    if args.save and not {"product", "pointwise"} <= set(args.only):
        raise ValueError("--save: needs the tables product and pointwise")


def open_device(name: str) -> torch.device:
    """The GPU to measure; ValueError where there is none that Triton serves."""
    import torch

    from ..llm.kernels.triton_support import installed, triton_serves

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: not a torch device") from error
    if device.type != "cuda":
        raise ValueError(f"--device {name}: kernels are for NVIDIA GPUs, such as cuda:0")
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch finds no NVIDIA GPU here")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} GPUs")
    if not installed():
        raise ValueError("Triton is not installed (pip install triton)")
    device = torch.device("cuda", device.index or 0)
    if not triton_serves(device):
        raise ValueError(f"--device {name}: Triton does not serve it")
    torch.cuda.set_device(device)
    return device


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure and print each table; everything that was measured."""
    import torch
    from tqdm import tqdm

    from ..llm.kernel_timing import copy_rate
    from ..llm.kernels.fused import KERNEL_FORMATS

    formats = args.formats.split(",") if args.formats else sorted(KERNEL_FORMATS)
    for kind in formats:
        if kind not in KERNEL_FORMATS:
            raise ValueError(f"--formats {kind}: only {', '.join(sorted(KERNEL_FORMATS))}")
    steps = dict.fromkeys(("unpack", "tiles"), len(formats))
    steps |= {"product": 6, "pointwise": 2, "product_tiles": 5}
    total = 1 + sum(steps[table] for table in args.only)
    torch.manual_seed(0)
    with tqdm(total=total, unit="kernel", leave=False, disable=None) as bar:
        report: dict[str, Any] = {
            "gpu": torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "copy_gb_s": copy_rate(device, args.repeats) / 1e9,
        }
        bar.update()
        say(bar, f"{report['gpu']}: copies at {report['copy_gb_s']:.0f} GB/s, read and written")
        if "unpack" in args.only:
            report["unpack"] = list(measure_unpack(args, device, formats, report, bar))
        if "tiles" in args.only:
            report["tiles"] = list(measure_tiles(args, device, formats, report, bar))
        if "product_tiles" in args.only:
            report["product_tiles"] = list(measure_product_tiles(args, device, formats, bar))
        if "product" in args.only:
            report["product"] = list(measure_products(args, device, formats, bar))
        if "pointwise" in args.only:
            report["pointwise"] = list(measure_pointwise(args, device, bar))
        if {"product", "pointwise"} <= set(args.only):
            report["thresholds"] = conclude(args, report, bar)
    return report


def measure_unpack(
    args: argparse.Namespace,
    device: torch.device,
    formats: Iterable[str],
    report: dict[str, Any],
    bar: tqdm[Any],
) -> Iterable[dict[str, Any]]:
    """Each format to bfloat16, by its kernel and by torch operations."""
    import torch

    from ..llm import kernel_timing as timing
    from ..llm.kernels.unpacking import launch_unpack

    say(bar, f"\n{'unpack':8} {'us':>8} {'GB/s':>7} {'of copy':>8} {'torch us':>9}")
    for kind in formats:
        matrices = timing.rotated(kind, args.rows, args.width, device)
        calls = timing.unpack_calls(
            matrices, lambda packed, out: launch_unpack(packed, 0, len(out), out), torch.bfloat16
        )
        seconds = timing.graph_seconds(calls, args.repeats)
        plain = timing.plain_seconds(matrices[0], torch.bfloat16, 5)
        rate = (timing.packed_nbytes(matrices[0]) + 2 * args.rows * args.width) / seconds / 1e9
        row = {"format": kind, "us": seconds * 1e6, "gb_s": rate, "torch_us": plain * 1e6}
        row["of_copy"] = rate / report["copy_gb_s"]
        say(bar, f"{kind:8} {row['us']:8.1f} {rate:7.0f} {row['of_copy']:8.1%} {plain * 1e6:9.0f}")
        bar.update()
        yield row


def measure_tiles(
    args: argparse.Namespace,
    device: torch.device,
    formats: Iterable[str],
    report: dict[str, Any],
    bar: tqdm[Any],
) -> Iterable[dict[str, Any]]:
    """Each format with other tiles than its own."""
    import torch

    from ..llm import kernel_timing as timing
    from ..llm.kernels.unpacking import ALTERNATIVES, LAUNCHES, Launch, launch_unpack

    say(bar, f"\n{'tiles':8} {'tile':>10} {'warps':>6} {'GB/s':>7} {'of copy':>8}")
    for kind in formats:
        matrices = timing.rotated(kind, args.rows, args.width, device)
        nbytes = timing.packed_nbytes(matrices[0]) + 2 * args.rows * args.width
        for tile, warps in ALTERNATIVES[kind]:
            launch = Launch(LAUNCHES[kind].kernel, tile, warps)

            def unpack(packed: Packed, out: torch.Tensor, launch: Launch = launch) -> None:
                launch_unpack(packed, 0, len(out), out, launch)

            calls = timing.unpack_calls(matrices, unpack, torch.bfloat16)
            rate = nbytes / timing.graph_seconds(calls, args.repeats) / 1e9
            row = {"format": kind, "tile": list(tile), "warps": warps, "gb_s": rate}
            row["of_copy"] = rate / report["copy_gb_s"]
            own = "  (in use)" if launch == LAUNCHES[kind] else ""
            name = "x".join(map(str, tile))
            say(bar, f"{kind:8} {name:>10} {warps:6} {rate:7.0f} {row['of_copy']:8.1%}{own}")
            yield row
        bar.update()


def measure_product_tiles(
    args: argparse.Namespace, device: torch.device, formats: Iterable[str], bar: tqdm[Any]
) -> Iterable[dict[str, Any]]:
    """Products with one token, with other tiles than their own, of a tall and of a wide matrix."""
    import torch

    from ..llm import kernel_timing as timing
    from ..llm.kernels.launching import PRODUCT_ALTERNATIVES, PRODUCTS, multiply
    from ..llm.kernels.unpacking import Launch

    say(bar, f"\n{'product':8} {'tile':>10} {'warps':>6} {'tall GB/s':>10} {'wide':>6}")
    xs = [
        torch.randn(1, shape[1], dtype=torch.float32, device=device).bfloat16()
        for shape in (GATE, DOWN)
    ]
    for kind, own in PRODUCTS.items():
        shapes = (GATE, DOWN) if kind in formats else ()
        both = [timing.rotated(kind, *shape, device) for shape in shapes]
        for tile, warps in PRODUCT_ALTERNATIVES if both else ():
            launch = Launch(own.kernel, tile, warps)
            rates = []
            for matrices, x_TD in zip(both, xs, strict=True):
                calls = [partial(multiply, packed, x_TD, launch) for packed in matrices]
                seconds = timing.graph_seconds(calls, args.repeats)
                rates.append(timing.packed_nbytes(matrices[0]) / seconds / 1e9)
            mark, name = "  (in use)" if launch == own else "", "x".join(map(str, tile))
            say(bar, f"{kind:8} {name:>10} {warps:6} {rates[0]:10.0f} {rates[1]:6.0f}{mark}")
            row = {"format": kind, "tile": list(tile), "warps": warps}
            yield row | {"gb_s": rates[0], "wide_gb_s": rates[1]}
        bar.update()


def measure_products(
    args: argparse.Namespace, device: torch.device, formats: Iterable[str], bar: tqdm[Any]
) -> Iterable[dict[str, Any]]:
    """Each format that can be multiplied as it is, by tokens."""
    import torch

    from ..llm import kernel_timing as timing
    from ..llm.kernels.thresholds import TILE_TOKENS

    say(bar, f"\n{'product':8} {'tokens':>6} {'few us':>8} {'tiles us':>8} {'GB/s':>7} "
        f"{'unpacked first us':>18}")  # fmt: skip
    for kind in TILE_TOKENS:
        matrices = timing.rotated(kind, *GATE, device) if kind in formats else []
        for tokens in TOKENS if matrices else ():
            x_TD = torch.randn(tokens, GATE[1], dtype=torch.float32, device=device).bfloat16()
            found = timing.product_seconds(matrices, x_TD, args.repeats)
            us = {way: seconds * 1e6 for way, seconds in found.items()}
            rate = timing.packed_nbytes(matrices[0]) / min(us.values()) / 1e3
            few, tiles = (f"{us[way]:8.1f}" if way in us else "-" for way in ("fused", "tiles"))
            say(bar, f"{kind:8} {tokens:6} {few:>8} {tiles:>8} {rate:7.0f} {us['plain']:18.1f}")
            row = {"format": kind, "tokens": tokens, "gb_s": rate}
            yield row | {f"{way}_us": taken for way, taken in us.items()}
        bar.update()


def measure_pointwise(
    args: argparse.Namespace, device: torch.device, bar: tqdm[Any]
) -> Iterable[dict[str, Any]]:
    """Norms and SwiGLU of a 7B model by tokens, launched from Python as the engine does."""
    from ..llm import kernel_timing as timing

    say(bar, f"\n{'kernel':8} {'tokens':>6} {'us':>8} {'GB/s':>7} {'torch us':>9}")
    for kind, seconds, width in (
        ("norm", timing.norm_seconds, GATE[1]),
        ("swiglu", timing.swiglu_seconds, GATE[0]),
    ):
        for tokens in MORE_TOKENS:
            pair = seconds(tokens, width, device, args.repeats)
            rate = pair.nbytes / pair.fused / 1e9
            row = {"kernel": kind, "tokens": tokens, "gb_s": rate}
            row |= {"fused_us": pair.fused * 1e6, "plain_us": pair.plain * 1e6}
            say(bar, f"{kind:8} {tokens:6} {row['fused_us']:8.1f} {rate:7.0f} "
                f"{row['plain_us']:9.1f}")  # fmt: skip
            yield row
        bar.update()


def conclude(args: argparse.Namespace, report: dict[str, Any], bar: tqdm[Any]) -> dict[str, Any]:
    """The token counts that follow."""
    from dataclasses import asdict

    from ..llm.kernels.thresholds import find_thresholds, save_thresholds

    found = find_thresholds(report["product"], report["pointwise"])
    say(bar, "")
    for name, by_format in (("", found.product), (" on tensor cores", found.tiles)):
        counts = ", ".join(f"{kind} {count}" for kind, count in by_format.items())
        say(bar, f"multiplied as they are{name}, up to these tokens: {counts}")
    say(bar, f"one kernel from these tokens on: norm {found.norm}, SwiGLU {found.swiglu}")
    if args.save:
        say(bar, f"kept in {save_thresholds(report['gpu'], found)}")
    return asdict(found)


def say(bar: tqdm[Any], line: str) -> None:
    """A line of stdout, above the bar."""
    bar.write(line, file=sys.stdout)
    sys.stdout.flush()
