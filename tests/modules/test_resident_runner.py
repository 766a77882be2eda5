"""Blocks that all stay on a device of its own memory: bound for good, without a pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from block_models import HIDDEN, NUM_BLOCKS, Streamed, streamed
from routes import make_devices
from torch import nn

from layer_streamer.modules.blocks import find_stacks
from layer_streamer.modules.resident import ResidentRunner, give_weights
from layer_streamer.modules.runner import Runner

ROUTE = "resident"


def give(some: Streamed, sources: Any = None, **options: Any) -> Any:
    """In place of the runner that there is."""
    some.runner.close()
    blocks = find_stacks(some.model, ["blocks.{i}."])[0].blocks
    some.runner = give_weights(some.streamer, blocks, sources or {}, **options)
    return some.runner


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Streamed]:
    with streamed(tmp_path, route=ROUTE, device=make_devices(ROUTE)) as some:
        give(some)
        yield some


def test_answers_are_those_of_the_resident_model_and_no_pass_is_made(opened: Streamed) -> None:
    assert isinstance(opened.runner, ResidentRunner)
    before = opened.streamer.last_pass
    for way in (None, [0, 0, 3], [3, 1, 0], []):
        opened.agree(way=way)
    assert str(opened.streamer.last_pass) == str(before)


def test_weights_are_the_same_tensors_in_every_forward_and_between_them(opened: Streamed) -> None:
    opened.agree()
    kept = [[*block.parameters()] for block in opened.model.blocks]
    opened.agree()
    for block, some in zip(opened.model.blocks, kept, strict=True):
        assert all(a is b for a, b in zip(block.parameters(), some, strict=True))
        assert not any(parameter.is_meta for parameter in some)


def test_what_a_block_shares_with_others_may_get_its_values_after_the_runner_is_made(
    tmp_path: Path,
) -> None:
    with streamed(tmp_path, route=ROUTE, device=make_devices(ROUTE)) as some:
        some.runner.close()
        empty = nn.Parameter(torch.empty(2, device="meta"), requires_grad=False)
        for block in some.model.blocks[:2]:
            block.register_parameter("shared", empty)
        give(some)
        for block in some.model.blocks[:2]:
            block.shared = nn.Parameter(torch.ones(2), requires_grad=False)
        some.agree()


def test_a_block_whose_modules_were_changed_gets_its_weights_into_them(opened: Streamed) -> None:
    class Wrapped(nn.Module):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer

        def forward(self, *args: Any) -> Any:
            return self.base_layer(*args)

    for block in opened.model.blocks:
        name, child = next((n, c) for n, c in block.named_children() if [*c.parameters()])
        setattr(block, name, Wrapped(child))
    opened.agree()


def test_weights_that_were_taken_out_for_a_state_come_back_with_the_next_forward(
    opened: Streamed,
) -> None:
    for i in range(NUM_BLOCKS):
        opened.runner.binder.unbind(i)
    assert all(p.is_meta for block in opened.model.blocks for p in block.parameters())
    opened.agree()


def test_two_forwards_at_once_are_both_right(opened: Streamed) -> None:
    """Each waits in its second block for the other to have come there."""
    together = threading.Barrier(2)

    def wait(module: nn.Module, args: object) -> None:
        together.wait(30)

    handle = opened.model.blocks[1].register_forward_pre_hook(wait)
    x = [torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    got: dict[int, torch.Tensor] = {}

    def run(i: int) -> None:
        with torch.no_grad():
            got[i] = opened.model(x[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    handle.remove()
    with torch.no_grad():
        assert all(torch.equal(got[i], opened.resident(x[i])) for i in range(2))


def test_after_close_blocks_are_on_meta_and_another_runner_can_take_over(opened: Streamed) -> None:
    opened.runner.close()
    opened.runner.close()
    assert all(p.is_meta for block in opened.model.blocks for p in block.parameters())
    give(opened)
    opened.agree()


@pytest.mark.parametrize("why", ["strict", "made", "streams", "cpu"])
def test_where_weights_do_not_stay_as_they_are_passes_are_made(tmp_path: Path, why: str) -> None:
    route = {"streams": "mapped", "cpu": "cpu partial"}.get(why, ROUTE)
    with streamed(tmp_path, route=route, device=make_devices(route)) as some:
        # One parameter is made from what lies in the checkpoint: here it is the same.
        made = {"blocks.2.norm.weight": SimpleNamespace(convert=lambda stored: stored)}
        runner = give(some, made if why == "made" else None, strict=why == "strict")
        assert isinstance(runner, Runner)
        some.agree()
