"""Many small copies in one call: each byte to its place, and no other touched."""

from __future__ import annotations

import ctypes
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layer_streamer import copy_pieces
from layer_streamer.devices import cudart

SIZE = 4096


def some_pieces(seed: int, count: int, largest: int) -> tuple[Any, Any]:
    """(where, bytes): apart from one another, in any order."""
    dice = np.random.default_rng(seed)
    nbytes = dice.integers(0, largest + 1, count)
    steps = nbytes + dice.integers(0, 5, count)
    starts = np.cumsum(steps) - steps
    order = dice.permutation(count)
    return starts[order] + 3, nbytes[order]


def expected(to: torch.Tensor, source: torch.Tensor, pieces: tuple[Any, Any, Any]) -> torch.Tensor:
    found = to.clone()
    for i, j, n in zip(*(values.tolist() for values in pieces), strict=True):
        found[i : i + n] = source[j : j + n]
    return found


@given(st.integers(0, 1 << 16), st.integers(0, 60))
def test_each_piece_arrives_where_it_belongs(seed: int, count: int) -> None:
    to_at, nbytes = some_pieces(seed, count, 60)
    source_at = np.random.default_rng(seed).permutation(to_at)
    torch.manual_seed(seed)
    to, source = (torch.randint(256, (SIZE * 2,), dtype=torch.uint8) for _ in range(2))
    wanted = expected(to, source, (to_at, source_at, nbytes))
    copy_pieces(to, to_at, source, source_at, nbytes)
    assert torch.equal(to, wanted)


@pytest.mark.parametrize("first, count", [(-1, 4), (SIZE - 3, 4), (0, SIZE + 1), (0, -1)])
@pytest.mark.parametrize("side", ["to", "source"])
def test_a_piece_that_leaves_its_tensor_is_refused_before_any_is_copied(
    side: str, first: int, count: int
) -> None:
    to, source = torch.zeros(SIZE, dtype=torch.uint8), torch.ones(SIZE, dtype=torch.uint8)
    wrong, right = np.array([0, first]), np.array([0, 0])
    to_at, source_at = (wrong, right) if side == "to" else (right, wrong)
    with pytest.raises(ValueError, match="pieces from"):
        copy_pieces(to, to_at, source, source_at, np.array([1, count]))
    assert not to.any()


def test_memory_that_is_not_plain_bytes_is_refused() -> None:
    numbers = np.array([0])
    for wrong in (torch.zeros(8), torch.zeros(8, 8, dtype=torch.uint8).t()):
        with pytest.raises(ValueError, match="contiguous uint8"):
            copy_pieces(wrong, numbers, torch.zeros(8, dtype=torch.uint8), numbers, numbers + 1)


class Library:
    """Takes the place of the runtime's library, and keeps what it was called with."""

    def __init__(self, code: int = 0) -> None:
        self.batches: list[tuple[Any, ...]] = []
        self.singles: list[tuple[Any, ...]] = []

        def batch(to: int, from_: int, sizes: int, count: int, *rest: Any) -> int:
            arrays = [(ctypes.c_int64 * count).from_address(at)[:] for at in (to, from_, sizes)]
            self.batches.append((*arrays, rest[-1]))
            return code

        # Functions: they take attributes, as ctypes' do.
        self.cudaMemcpyBatchAsync = batch
        self.cudaMemcpyAsync = lambda *given: self.singles.append(given)
        self.cudaEventRecord = lambda *_: 0
        self.cudaStreamWaitEvent = lambda *_: 0
        self.cudaHostGetDevicePointer = lambda *_: 0
        self.cudaGetErrorString = lambda code: b"out of luck"
        self.forgotten = 0

        def forget() -> None:
            self.forgotten += 1

        self.cudaGetLastError = forget


def runtime_of(library: Library, version: int, monkeypatch: pytest.MonkeyPatch) -> cudart.Runtime:
    monkeypatch.setattr(cudart, "cuda_version", lambda: version)
    return cudart.Runtime(library)  # type: ignore[arg-type]


PIECES = tuple(np.array(values) for values in ([1000, 2000], [30, 40], [5, 5]))


def test_one_call_has_all_pieces_but_empty_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    runtime = runtime_of(library, 13, monkeypatch)
    strided = [np.repeat(np.insert(values, 1, 0), 3)[::3] for values in PIECES]
    runtime.copy_all(*strided, SimpleNamespace(cuda_stream=77))
    runtime.copy_all(*(values[1:2] for values in strided), SimpleNamespace(cuda_stream=77))
    assert library.batches == [([1000, 2000], [30, 40], [5, 5], 77)]
    assert not library.singles


@given(nbytes=st.lists(st.integers(0, 12), min_size=1, max_size=30))
def test_pieces_go_in_few_calls_those_of_one_size_together(nbytes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        library = Library()
        runtime = runtime_of(library, 13, patch)
    to = np.arange(len(nbytes)) * 100
    runtime.copy_all(to, to + 7, np.array(nbytes), SimpleNamespace(cuda_stream=77))
    copied = [piece for *parts, _ in library.batches for piece in zip(*parts, strict=True)]
    assert copied == [(at, at + 7, n) for at, n in zip(to.tolist(), nbytes, strict=True) if n]
    assert len(library.batches) <= cudart.MOST_BATCHES
    runs = [size for size, _ in groupby(n for n in nbytes if n)]
    if len(runs) <= cudart.MOST_BATCHES:
        assert [set(sizes) for _, _, sizes, _ in library.batches] == [{size} for size in runs]


@pytest.mark.parametrize("version, handle", [(12, 77), (13, 0)])
def test_without_batches_and_on_the_default_stream_pieces_go_one_by_one(
    version: int, handle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library()
    runtime = runtime_of(library, version, monkeypatch)
    runtime.copy_all(*PIECES, SimpleNamespace(cuda_stream=handle))
    assert library.singles == [(1000, 30, 5, 4, handle), (2000, 40, 5, 4, handle)]
    assert not library.batches


def test_a_refused_batch_is_an_error_that_says_what_cuda_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = Library(code=1)
    runtime = runtime_of(library, 13, monkeypatch)
    with pytest.raises(RuntimeError, match="CUDA error 1: out of luck"):
        runtime.copy_all(*PIECES, SimpleNamespace(cuda_stream=77))
    assert library.forgotten == 1


def test_the_attributes_are_as_large_as_the_runtimes() -> None:
    assert ctypes.sizeof(cudart.CopyAttributes) == 24


@pytest.mark.gpu
def test_after_a_refused_copy_the_next_kernel_is_clean() -> None:
    home = torch.zeros(64, dtype=torch.uint8).pin_memory()
    there = torch.zeros(64, dtype=torch.uint8, device="cuda")
    runtime = cudart.load_runtime()
    assert runtime is not None
    to, from_ = np.array([there.data_ptr()]), np.array([home.data_ptr()])
    more_than_there_is = np.array([1 << 40])  # unknown addresses are the host's to CUDA: it faults
    with pytest.raises(RuntimeError, match="CUDA error"):
        runtime.copy_all(to, from_, more_than_there_is, torch.cuda.current_stream())
    copy_pieces(there, np.array([0]), home, np.array([0]), np.array([64]))
    assert torch.ones(3, device="cuda").sum().item() == 3


@pytest.mark.gpu
@pytest.mark.parametrize("count, largest", [(1, 1 << 20), (64, 1 << 16), (3000, 40)])
@pytest.mark.parametrize("way", ["in", "out"])
def test_pieces_travel_between_page_locked_memory_and_a_gpu(
    way: str, count: int, largest: int
) -> None:
    to_at, nbytes = some_pieces(count, count, largest)
    size = int(nbytes.sum()) + 5 * count + 8 + largest
    source = torch.randint(256, (size,), dtype=torch.uint8)
    source_at = np.random.default_rng(1).permutation(to_at)  # pieces may meet there
    home = source.pin_memory() if way == "in" else source.cuda()
    to = torch.zeros(size, dtype=torch.uint8, device="cuda" if way == "in" else "cpu")
    to = to if way == "in" else to.pin_memory()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    copy_pieces(to, to_at, home, source_at, nbytes, stream)
    stream.synchronize()
    wanted = expected(torch.zeros(size, dtype=torch.uint8), source, (to_at, source_at, nbytes))
    assert torch.equal(to.cpu(), wanted)
    copy_pieces(to.zero_(), to_at, home, source_at, nbytes)  # on the current stream
    torch.cuda.synchronize()
    assert torch.equal(to.cpu(), wanted)
