"""Where bytes come from, against the same operations on real tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layer_streamer.modules.naming.trace import MAX_RUNS, Run, Trace

DTYPES = (torch.uint8, torch.bfloat16, torch.float32)
Program = Callable[[Sequence[torch.Tensor]], torch.Tensor]


def numbered(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors that share no element, bit for bit (as far as the dtype has so many)."""
    tensors, start = [], 1
    for shape in shapes:
        size = torch.Size(shape).numel() * dtype.itemsize
        numbers = torch.arange(start, start + size, dtype=torch.int64).to(torch.uint8)
        tensors.append(numbers.view(dtype).view(*shape))
        start += size
    return tensors


def traced(
    program: Program, tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[Run] | None]:
    trace = Trace()
    sources = [trace.source(tensor.dtype, tensor.shape) for tensor in tensors]
    with trace:
        out = program(sources)
    return out, trace.runs(out)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    # In memory of its own: torch sees no bytes in a lone element with a stride.
    return (
        torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1)).view(torch.uint8)
    )


def laid(runs: Sequence[Run], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    parts = [bytes_of(tensors[r.source])[r.begin : r.begin + r.nbytes] for r in runs]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], Program]:
    """A few operations, one after the other, on tensors of one shape."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    count = draw(st.integers(1, 4))
    ops = draw(st.lists(st.sampled_from("stack cat chunk transpose clone flat pick".split()),  # noqa: SIM905
                        min_size=1, max_size=5))  # fmt: skip
    numbers = draw(st.lists(st.integers(0, 7), min_size=2 * len(ops), max_size=2 * len(ops)))

    def program(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        found = list(tensors)
        for op, one, two in zip(ops, numbers[::2], numbers[1::2], strict=True):
            dims = found[0].dim()
            if op == "stack":
                found = [torch.stack(found, one % (dims + 1))]
            elif op == "cat" and dims:
                found = [torch.cat(found, one % dims)]
            elif op == "chunk" and dims:
                found = list(torch.chunk(found[one % len(found)], 1 + two % 3, two % dims))
                found = [t for t in found if t.shape == found[0].shape]
            elif op == "transpose" and dims:
                found = [t.transpose(one % dims, two % dims) for t in found]
            elif op == "clone":
                found = [t.contiguous() for t in found]
            elif op == "flat":
                found = [t.reshape(-1) for t in found]
            elif op == "pick":
                found = [found[one % len(found)]]
        return found[-1]

    return [shape] * count, program


@given(programs(), st.sampled_from(DTYPES))
def test_runs_are_the_bytes_that_the_operations_give(
    drawn: tuple[list[tuple[int, ...]], Program], dtype: torch.dtype
) -> None:
    shapes, program = drawn
    tensors = numbered(shapes, dtype)
    want = program(tensors)
    out, runs = traced(program, tensors)
    assert out.shape == want.shape
    # So small ones are followed through anything that moves bytes.
    assert runs is not None
    assert torch.equal(laid(runs, tensors), bytes_of(want))


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_fused_experts_are_whole_tensors_in_turn(
    experts: int, matrices: int, rows: int, columns: int
) -> None:
    """transformers' way: each matrix stacked over experts, then concatenated along rows."""

    def program(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        stacks = [torch.stack(tensors[i * experts : (i + 1) * experts]) for i in range(matrices)]
        return torch.cat(stacks, dim=1)

    tensors = numbered([(rows, columns)] * experts * matrices, torch.float32)
    _, runs = traced(program, tensors)
    want = [i * experts + e for e in range(experts) for i in range(matrices)]
    assert runs is not None and [run.source for run in runs] == want


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 3))
def test_a_split_tensor_put_together_again_is_one_stretch(sizes: list[int], columns: int) -> None:
    tensors = numbered([(sum(sizes), columns)], torch.float32)
    _, runs = traced(lambda t: torch.cat(torch.split(t[0], sizes)), tensors)
    assert runs == [Run(0, 0, sum(sizes) * columns * 4)]


@pytest.mark.parametrize(
    "program",
    [lambda t: t[0] + 0, lambda t: t[0].to(torch.float64), lambda t: t[0].clone().mul_(2),
     lambda t: torch.stack([t[0], torch.zeros_like(t[0])]), lambda t: torch.zeros_like(t[0]),
     lambda t: torch.cat([t[0], t[0].double()]), lambda t: t[0].flip(0),
     lambda t: torch.zeros_like(t[0]).copy_(t[0])],
)  # fmt: skip
def test_what_is_more_than_moved_has_no_runs(program: Program) -> None:
    _, runs = traced(program, numbered([(4, 3)], torch.float32))
    assert runs is None


def test_tensors_of_two_dtypes_are_not_joined_by_their_bytes() -> None:
    tensors = [torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bfloat16)]
    assert traced(lambda t: torch.cat(list(t)), tensors)[1] is None
    assert traced(lambda t: torch.stack(list(t)), tensors)[1] is None


def test_a_copy_that_keeps_odd_strides_is_not_mistaken_for_one_in_order() -> None:
    tensors = numbered([(4, 3)], torch.float32)
    _, runs = traced(lambda t: t[0].T.clone(), tensors)
    assert runs is None or torch.equal(laid(runs, tensors), bytes_of(tensors[0].T))


def test_a_transposed_matrix_is_not_followed_element_by_element() -> None:
    tensors = [torch.empty(MAX_RUNS + 1, 3)]
    assert traced(lambda t: t[0].T.contiguous(), tensors)[1] is None
    assert traced(lambda t: torch.cat([t[0], t[0]], dim=1), tensors)[1] is None


def test_an_empty_tensor_has_no_bytes_and_joins_with_others() -> None:
    tensors = [torch.empty(0, 3), torch.ones(2, 3)]
    assert traced(lambda t: t[0], tensors)[1] == []
    assert traced(lambda t: torch.cat(list(t)), tensors)[1] == [Run(1, 0, 24)]
