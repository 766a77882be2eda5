"""How long kernels take on a GPU: launches over rotated memory, timed by the device's events.

Only for measuring: nothing of the engine uses this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F

from .kernels.fused import plain_rms_norm
from .weights.dequant import ROW_STEP, Unpacker, Widest
from .weights.packed import Packed, scratch_nbytes, unpack_rows
from .weights.quants import BLOCK_TYPES
from .weights.scratch import Scratch

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Pair:
    """Seconds of the same work."""

    fused: float
    plain: float
    nbytes: int
    """That one kernel reads and writes."""


LOOP = 50
"""Launches from Python that are timed together."""
BUFFER = 1 << 24
"""Weights that the engine unpacks at a time on a GPU."""
ROTATED_NBYTES = 512 << 20
"""What a timed series goes through at least: several times any cache."""


def rotations(nbytes: int) -> int:
    """How many buffers of this size it takes."""
    return max(2, -(-ROTATED_NBYTES // nbytes))


def graph_seconds(calls: Sequence[Call], repeats: int) -> float:
    """Of one call, the median over replays of a graph of all: no launch from Python is in it."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:  # compiles
            call()
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return event_seconds(graph.replay, repeats) / len(calls)


def event_seconds(call: Call, repeats: int) -> float:
    """The median of a call's time on the device, after three that do not count."""
    times = []
    for i in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return float(median(times))


def loop_seconds(call: Call, calls: int, repeats: int) -> float:
    """Of one call among many from Python: whichever is longer, the launches or the work."""

    def series() -> None:
        for _ in range(calls):
            call()

    return event_seconds(series, repeats) / calls


def copy_rate(device: torch.device, repeats: int) -> float:
    """Bytes a second that the device reads and writes in copies of its own memory.

    The best of two ways: what a graph calls a copy is not always the faster one.
    """
    count = ROTATED_NBYTES // 4
    pairs = [torch.rand(2, count, dtype=torch.float32, device=device).unbind(0) for _ in range(2)]
    calls = [partial(b.copy_, a) for a, b in pairs]

    def copy_all() -> None:
        for call in calls:
            call()

    seconds = min(graph_seconds(calls, repeats), event_seconds(copy_all, repeats) / len(calls))
    return 2 * ROTATED_NBYTES / seconds


def random_matrix(kind: str, rows: int, width: int, device: torch.device) -> Packed:
    """Random codes with scales of about 0.01; groups of 128, FP8 in blocks of 128 x 128."""
    if kind in BLOCK_TYPES:
        block = BLOCK_TYPES[kind]
        raw = _bytes((rows, width // block.weights, block.nbytes), device)
        for place in block.scales:
            raw[..., place + 1] = 0x21  # float16 numbers from 0.0098 to 0.0117
        return Packed(
            format=kind, rows=rows, width=width, parts={"raw": raw.flatten(1)}, group=block.weights
        )
    packed = Packed(format=kind, rows=rows, width=width, parts={}, group=128)
    codes = _bytes((rows, width // 2 if kind == "ct4" else width), device)
    scale = torch.rand(rows, width // 128, dtype=torch.float32, device=device).div_(50).bfloat16()
    if kind in ("ct4", "ct8"):
        return replace(packed, parts={"packed": codes.view(torch.int32), "scale": scale})
    if kind == "fp8":
        scale = torch.rand(-(-rows // 128), -(-width // 128), dtype=torch.float32, device=device)
        return replace(packed, parts={"weight": codes, "scale": scale}, group_rows=128)
    if kind == "int8":
        scale = scale[:, :1].contiguous()
        return replace(packed, parts={"weight": codes.view(torch.int8), "scale": scale}, group=0)
    parts = {
        "packed": _bytes((width, rows // 2), device).view(torch.int32),
        "zero": _bytes((width // 128, rows // 2), device).view(torch.int32),
        "scale": scale.t().contiguous().half(),
    }
    return replace(packed, parts=parts)


def rotated(kind: str, rows: int, width: int, device: torch.device) -> list[Packed]:
    """As many random matrices as no cache holds."""
    first = random_matrix(kind, rows, width, device)
    count = rotations(packed_nbytes(first))
    return [first, *(random_matrix(kind, rows, width, device) for _ in range(count - 1))]


def device_of(packed: Packed) -> torch.device:
    """Where its parts are."""
    return next(iter(packed.parts.values())).device


def packed_nbytes(packed: Packed) -> int:
    """Bytes of all parts."""
    return sum(part.nbytes for part in packed.parts.values())


def unpack_calls(
    matrices: Sequence[Packed], launch: Callable[[Packed, torch.Tensor], None], dtype: torch.dtype
) -> list[Call]:
    """Unpacking of each matrix, to as many outputs as it takes to leave the cache."""
    first = matrices[0]
    shape = (first.rows, first.width)
    count = min(len(matrices), rotations(first.rows * first.width * dtype.itemsize))
    outs = [torch.empty(shape, dtype=dtype, device=device_of(first)) for _ in range(count)]
    return [partial(launch, packed, outs[i % count]) for i, packed in enumerate(matrices)]


def plain_seconds(packed: Packed, dtype: torch.dtype, repeats: int) -> float:
    """Unpacking by torch operations, as many rows at a time as the engine takes."""
    step = max(1, BUFFER // packed.width // ROW_STEP) * ROW_STEP
    out = torch.empty(min(step, packed.rows), packed.width, dtype=dtype, device=device_of(packed))
    each = scratch_nbytes(packed.format, dtype, ordered=True)
    scratch = Scratch(each * out.numel(), out.device)

    def unpack() -> None:
        for start in range(0, packed.rows, step):
            end = min(start + step, packed.rows)
            unpack_rows(packed, start, end, out[: end - start], scratch)

    return event_seconds(unpack, repeats)


FEW_TOKENS = 16
"""Up to which products with few tokens are timed: they take as long again for each four."""


def product_seconds(
    matrices: Sequence[Packed], x_TD: torch.Tensor, repeats: int
) -> dict[str, float]:
    """Of x times one matrix: "plain", unpacked first; and of those that serve, "fused", as few
    tokens are multiplied, and "tiles", on tensor cores."""
    from .kernels import launching, tiles

    first = matrices[0]
    widest = Widest.of([(first.format, first.width, True)])
    unpacker = Unpacker(x_TD.device, x_TD.dtype, widest, kernels=True)
    y_TN = x_TD.new_empty(len(x_TD), first.rows)

    def unpacked(packed: Packed) -> None:
        for start, end, rows in unpacker.blocks(packed):
            torch.mm(x_TD, rows.t(), out=y_TN[:, start:end])

    ways: dict[str, Callable[[Packed], object]] = {}
    if len(x_TD) <= FEW_TOKENS and launching.multiplies(first, x_TD):
        ways["fused"] = lambda packed: launching.multiply(packed, x_TD)
    if tiles.multiplies(first, x_TD):
        ways["tiles"] = lambda packed: tiles.multiply(packed, x_TD)
    ways["plain"] = unpacked
    return {
        way: graph_seconds([partial(call, packed) for packed in matrices], repeats)
        for way, call in ways.items()
    }


def norm_seconds(tokens: int, width: int, device: torch.device, repeats: int) -> Pair:
    """Of an addition and a norm, launched from Python: one kernel, several of torch's; bytes."""
    from .kernels.launching import launch_norm

    x, added = (
        torch.randn(2, tokens, width, dtype=torch.float32, device=device).bfloat16().unbind(0)
    )
    weight = torch.ones(width, dtype=torch.bfloat16, device=device)
    one = loop_seconds(lambda: launch_norm(x, added, weight, 1e-6), LOOP, repeats)
    several = loop_seconds(lambda: plain_rms_norm(x + added, weight, 1e-6), LOOP, repeats)
    return Pair(one, several, 4 * x.nbytes)


def swiglu_seconds(tokens: int, width: int, device: torch.device, repeats: int) -> Pair:
    """The same of SwiGLU."""
    from .kernels.launching import launch_swiglu

    gate, up = (
        torch.randn(2, tokens, width, dtype=torch.float32, device=device).bfloat16().unbind(0)
    )
    one = loop_seconds(lambda: launch_swiglu(gate, up), LOOP, repeats)
    several = loop_seconds(lambda: F.silu(gate).mul_(up), LOOP, repeats)
    return Pair(one, several, 3 * gate.nbytes)


def _bytes(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
