"""Experts on demand, whatever tokens go where: the same bits as resident, whatever slots hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import BLOCKS, EXPERTS, VARIANTS, inputs, saved, streamed
from torch import nn

CHOICES = 2
Routing = list[list[list[int]]]
"""By block and token, its experts."""

tokens_of = st.integers(0, 5)


def routings(tokens: int) -> st.SearchStrategy[Routing]:
    """Any: the same expert twice, and numbers past the last one, are there, too."""
    token = st.lists(st.integers(0, EXPERTS), min_size=CHOICES, max_size=CHOICES)
    block = st.lists(token, min_size=tokens, max_size=tokens)
    return st.lists(block, min_size=BLOCKS, max_size=BLOCKS)


def answers(model: nn.Module, routing: Routing, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x, weights = inputs(len(routing[0]), CHOICES, dtype)
    chosen = torch.tensor(routing, dtype=torch.int64).view(BLOCKS, -1, CHOICES)
    with torch.no_grad():
        out: torch.Tensor = model(x, chosen, weights)
    return out


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=12, deadline=None)
@given(
    slots=st.integers(1, EXPERTS * BLOCKS),
    passes=st.lists(tokens_of.flatmap(routings), min_size=1, max_size=4),
)
def test_no_bit_depends_on_slots_parts_or_what_was_asked_before(
    tmp_path_factory: pytest.TempPathFactory, variant: str, slots: int, passes: list[Routing]
) -> None:
    folder = tmp_path_factory.mktemp("routed")
    plain = saved(folder, variant)
    net = streamed(plain, folder, slots)
    for routing in passes:
        assert torch.equal(answers(net, routing), answers(plain, routing))
    net.layer_streamer.close()


@pytest.mark.parametrize("slots", [1, EXPERTS])
def test_one_expert_for_all_and_none_for_a_layer(tmp_path: Path, slots: int) -> None:
    plain = saved(tmp_path)
    net = streamed(plain, tmp_path, slots)
    routing = [[[4, 4]] * 7, [[EXPERTS, EXPERTS]] * 7, [[0, 4]] * 7]
    assert torch.equal(answers(net, routing), answers(plain, routing))
    report = net.layer_streamer.last_experts["blocks"]
    assert report.asked == 3
    net.layer_streamer.close()


@pytest.mark.parametrize("how", [{"times": 2}, {"calls": 2}])
def test_a_block_entered_twice_keeps_its_layer_and_its_experts(
    tmp_path: Path, how: dict[str, int]
) -> None:
    plain = saved(tmp_path, **how)
    net = streamed(plain, tmp_path, 2)
    routing = [[[0, 1], [1, 0]]] * BLOCKS
    for _ in range(3):
        assert torch.equal(answers(net, routing), answers(plain, routing))
    report = net.layer_streamer.last_experts["blocks"]
    assert (report.asked, report.hits) == (2 * 2 * BLOCKS, 2 * BLOCKS)
    net.layer_streamer.close()


def test_of_half_precision_the_sum_alone_is_in_float32(tmp_path: Path) -> None:
    plain = saved(tmp_path, dtype=torch.bfloat16)
    routing = [[[2, 0], [3, 1]]] * BLOCKS
    net = streamed(plain, tmp_path, 1)
    x, weights = inputs(2, CHOICES, torch.bfloat16)
    want = x
    for i, block in enumerate(plain.blocks):
        mixed: Any = block.mix(want)  # type: ignore[operator]
        total = torch.zeros(mixed.shape, dtype=torch.float32)
        for expert in range(EXPERTS):
            for token, places in enumerate(routing[i]):
                for choice, asked in enumerate(places):
                    if asked == expert:
                        total[token] += (
                            one(block.experts, expert, mixed[token]) * weights[i, token, choice]
                        )  # type: ignore[arg-type]
        want = want + total.to(torch.bfloat16)
    assert torch.equal(answers(net, routing, torch.bfloat16), want)
    net.layer_streamer.close()


def one(experts: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = (x[None] @ experts.gate_up_proj[expert].t()).chunk(2, -1)  # type: ignore[operator,index]
    y: torch.Tensor = (nn.functional.silu(gate) * up) @ experts.down_proj[expert].t()  # type: ignore[operator,index]
    return y[0]
