"""Every kernel compiled for GPUs that are not there: run by test_llm_kernels.py in a process.

    python tests/helpers/engine/kernels_compile.py MAJOR.MINOR DTYPE

Triton's launcher is told of a GPU of that compute capability, and stops after compiling, ptxas
included. Prints the number of compiled variants.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import packed_cases as cases
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from layer_streamer.devices import slot_kernels
from layer_streamer.llm.kernels import (
    decode_launching,
    fixed_products,
    launching,
    slot_products,
    slot_tiles,
    tiles,
    unpacking,
)
from layer_streamer.llm.passes.splits import block_of, splits_of
from layer_streamer.llm.weights.packed import FLOATS, Packed
from layer_streamer.llm.weights.quants import BLOCK_TYPES

compiled: dict[str, Any] = {}
PRODUCTS = {"multiply_words", "multiply_blocks", "multiply_q4_k", "multiply_slots"}
SHARED_NBYTES = 99 << 10
"""Of a program, on the GPU that has the least."""


class AbsentGpu:
    """What Triton asks a driver for until it launches."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class NotLaunched:
    """What has been compiled, in place of what can be launched."""

    def __init__(self, kernel: Any) -> None:
        self._count = len(kernel.arg_names)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert len(grid) == 3
        return self._launch

    def _launch(self, *given: Any) -> None:
        assert len(given) == self._count


def compile_only(run: Any) -> Any:
    """``run`` without the launch."""

    def stop_after_compiling(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, warmup=True, **options)
        compiled[kernel.hash] = kernel
        # Or rows and tokens that a program has would decide the order of sums, and cost much.
        moves = kernel.metadata.name in PRODUCTS and "convert_layout" in kernel.asm["ttgir"]
        assert not moves, f"{kernel.metadata.name} moves numbers between threads: {options}"
        assert kernel.metadata.shared <= SHARED_NBYTES, options
        return NotLaunched(self)

    return stop_after_compiling


def compile_all(dtype: torch.dtype, *, has_cores: bool) -> None:
    """What the engine launches, with the shapes of real matrices in few rows, and as many of these
    in a program as of real ones. ``has_cores``: that products can be on."""
    launching.WARPS = 1
    matrices = [cases.blocks(kind, 16, 3584) for kind in unpacking.LAUNCHES if kind in BLOCK_TYPES]
    matrices += [cases.integers(kind, 16, 3584, 128) for kind in ("ct4", "ct8")]
    matrices += [cases.integers(kind, 16, 96) for kind in ("ct4", "ct8", "int8")]
    matrices += [cases.integers(kind, 16, 96, 32, zero=True) for kind in ("ct4", "ct8", "int8")]
    matrices += [cases.fp8(16, 256, (128, 128)), cases.fp8(16, 96, dtype=torch.bfloat16)]
    matrices += [cases.fp8(16, 96, (1, 32), dtype=torch.uint8), cases.awq(256, 3584)]
    for packed in matrices:
        out = torch.empty(packed.rows, packed.width, dtype=dtype)
        assert unpacking.serves(packed), packed.format
        unpacking.launch_unpack(packed, 0, packed.rows, out)
        for tokens in (1, 2, 4):
            x = torch.zeros(tokens, packed.width, dtype=dtype)
            if launching.multiplies(packed, x):
                launching.multiply(packed, x)
                launching.multiply(packed, x, bias_N=x[0])
            if launching.multiplies(packed, x) and tokens < 4:
                kernel = launching.PRODUCTS[packed.format].kernel
                launch = unpacking.Launch(kernel, *launching.PRODUCT_ALTERNATIVES[-1])
                launching.multiply(packed, x, launch)
        for tokens in (1, 17, 64) if has_cores else ():
            x = torch.zeros(tokens, packed.width, dtype=dtype)
            if tiles.multiplies(packed, x):
                tiles.multiply(packed, x)
                tiles.multiply(packed, x, bias_N=x[0])
                compile_slots(packed, x)
    x, weight = torch.zeros(2, 3584, dtype=dtype), torch.zeros(3584, dtype=dtype)
    launching.launch_norm(x, x, weight, 1e-6)
    launching.launch_norm(x, None, weight.float(), 1e-6)
    launching.launch_swiglu(x, x)
    for rows in (1, 16, 18):  # aligned or not, a token wide or more
        out = torch.zeros(2, rows, dtype=dtype)
        fixed_products.launch_tiles(x, torch.zeros(rows, 3584, dtype=dtype), out)
    heads = x.view(2, 28, 128).transpose(0, 1)
    table = torch.zeros(2, 2, 64)
    launching.launch_rotate([heads, heads[:4]], table, interleaved=False)
    launching.launch_rotate([heads], table, interleaved=True)
    compile_mixtures(matrices, dtype, has_cores=has_cores)
    compile_tables()
    for sizes in ((28, 4, 128, None), (32, 8, 64, 512), (8, 1, 256, None)):
        compile_decoding(*sizes, dtype)


def compile_slots(packed: Packed, x: torch.Tensor) -> None:
    """Products of a bank that has the matrix in two slots."""
    parts = {name: torch.stack((part, part)) for name, part in packed.parts.items()}
    bank, out = replace(packed, parts=parts), x.new_zeros(len(x), packed.rows)
    slots = torch.zeros(len(x), dtype=torch.long)
    ends = [len(x)]
    assert slot_tiles.multiplies(bank, x)
    for routed in (slot_tiles.one_by_one(slots), slot_tiles.route(slots, ends, [(0, 1)])):
        slot_tiles.multiply(bank, x, routed, out, per_token=1)
        slot_tiles.multiply(bank, x, routed, out)


def compile_mixtures(matrices: list[Packed], dtype: torch.dtype, *, has_cores: bool) -> None:
    """The kernels of few tokens that pass experts, of which these are matrices."""
    kind = next(kind for kind, own in FLOATS.items() if own == dtype)
    weight = torch.zeros(16, 2048, dtype=dtype)
    matrices = [*matrices, Packed(format=kind, rows=16, width=2048, parts={"weight": weight})]
    parts = {
        name: torch.zeros(16, n, dtype=torch.uint8) for name, n in (("packed", 1440), ("scale", 90))
    }
    matrices.append(Packed(format="mxfp4", rows=16, width=2880, parts=parts, group=32))
    slots = torch.zeros(8, dtype=torch.long)
    for matrix in matrices:
        parts = {name: part.expand(2, *part.shape) for name, part in matrix.parts.items()}
        bank, x = replace(matrix, parts=parts), torch.zeros(1, matrix.width, dtype=dtype)
        if matrix.format == kind:
            assert slot_products.multiply_floats(weight, x) is not None
        if slot_products.serves(bank, x):
            slot_products.launch_slots((bank,), x, slots, 8)
            biased = replace(bank, parts=parts | {"bias": torch.zeros(2, 16, dtype=dtype)})
            slot_products.launch_slots((biased,), x, slots[:1])
    gate = torch.zeros(2, 2880, dtype=dtype)
    launching.launch_clamped(gate, gate, 1.702, 7.0)
    if has_cores and dtype in tiles.DTYPES:
        compile_slots(
            replace(matrices[-1], parts={**matrices[-1].parts, "bias": gate[0, :16]}), gate
        )
    y, shares = torch.zeros(16, 2048, dtype=dtype), torch.zeros(2, 8)
    launching.launch_combine(y, shares)
    for experts, per_token in ((8, 2), (60, 4), (128, 8), (1024, 16)):
        for over_chosen in (False, True):
            launching.launch_choose(
                torch.zeros(2, experts, dtype=dtype), per_token, normed=True, rounded=True,
                over_chosen=over_chosen,
            )  # fmt: skip


def compile_tables() -> None:
    """What a GPU does that keeps tables of slots by itself."""

    def numbers(count: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(count, dtype=dtype)

    for slots, pairs in ((5, 1), (2354, 8), (9000, slot_kernels.MOST_PAIRS)):
        ranks, clock = numbers(slots, torch.int64), numbers(2, torch.int64)
        table = slot_kernels.Table(numbers(6144), numbers(slots), ranks, clock)
        ids, told = numbers(pairs, torch.int64), numbers(2 + 3 * pairs)
        slot_kernels.place(table, ids, slot_kernels.Layer(0, 128, 4), ids, told)
    sources, targets = torch.zeros(9, 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)
    for word in slot_kernels.WORDS:
        pieces = slot_kernels.Pieces(sources, targets, numbers(4).view(2, 2), word)
        slot_kernels.fill(pieces, numbers(5), torch.zeros(16, dtype=torch.uint8), 16)


def compile_decoding(
    heads: int, groups: int, width: int, window: int | None, dtype: torch.dtype
) -> None:
    """The kernels of passes in which each row takes a token."""
    numbers, sums = torch.ones(2, 3, dtype=torch.long), torch.zeros(1)
    blocks = torch.zeros(2, 18, dtype=torch.int32)
    block = block_of(width, dtype)
    splits = splits_of(window or 4096, block)
    look = decode_launching.Look(numbers, blocks, 1, window, splits, block, sums, sums)
    q, k = torch.zeros(heads, 2, width, dtype=dtype), torch.zeros(groups, 2, width, dtype=dtype)
    memory, table = torch.zeros(1, 2, groups, width, dtype=dtype), torch.zeros(2, 2, width // 2)
    for interleaved in (False, True):
        decode_launching.launch_rotate_and_store(
            (q, k, k), table, memory, look, interleaved=interleaved
        )
    for sinks in (None, torch.zeros(heads, dtype=dtype)):
        q_THE = q.transpose(0, 1).contiguous()
        decode_launching.launch_attention(q_THE, memory, look, 0.1, sinks)


def main() -> None:
    major, minor = map(int, sys.argv[1].split("."))
    has_cores = (major, minor) >= tiles.LEAST_CAPABILITY
    driver.set_active(AbsentGpu(10 * major + minor))
    JITFunction.run = compile_only(JITFunction.run)
    compile_all(getattr(torch, sys.argv[2]), has_cores=has_cores)
    print(len(compiled))


if __name__ == "__main__":
    main()
