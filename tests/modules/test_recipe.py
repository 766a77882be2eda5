"""Conversions: how what lies end to end becomes their inputs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layer_streamer.modules.naming.recipe import Conversion

DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.int64)
Inputs = list[tuple[torch.dtype, tuple[int, ...]]]


@st.composite
def inputs(draw: st.DrawFn) -> Inputs:
    shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
    return draw(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), min_size=2, max_size=5))


def bytes_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])


@given(inputs(), st.integers(0, 2))
def test_each_input_is_given_as_it_was_stored(inputs: Inputs, before: int) -> None:
    """Wherever it begins: behind odd bytes, and where the slot has other tensors before."""
    random = torch.Generator().manual_seed(0)
    stored = [torch.randint(0, 100, s, generator=random).to(dtype) for dtype, s in inputs]
    given_: list[torch.Tensor] = []

    def make(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        given_.extend(tensors)
        return tensors[0]

    laid = torch.cat([torch.zeros(16 * before, dtype=torch.uint8), bytes_of(stored)])
    Conversion("x", tuple(inputs), inputs[0][0], inputs[0][1], make)(laid[16 * before :])
    assert len(given_) == len(stored)
    for got, want in zip(given_, stored, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_a_lone_input_is_given_as_the_recipe_sees_it() -> None:
    laid = torch.arange(6.0).view(2, 3)
    convert = Conversion("x", ((torch.float32, (2, 3)),), torch.float32, (3, 2), lambda t: t[0].T)
    assert torch.equal(convert(laid), laid.T)


def test_nothing_is_recorded_for_gradients() -> None:
    laid = torch.ones(2, requires_grad=True)
    convert = Conversion("x", ((torch.float32, (2,)),), torch.float32, (2,), lambda t: t[0] * 2)
    assert not convert(laid).requires_grad


def test_an_error_of_an_operation_is_the_callers() -> None:
    def make(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError):
        Conversion("x", ((torch.uint8, ()),), torch.uint8, (), make)(torch.ones(()))
