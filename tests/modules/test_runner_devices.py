"""Several devices: what a block is given lies where its layer does; and compiled blocks."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from block_models import HIDDEN, NUM_BLOCKS, Net, streamed
from torch import nn

from layer_streamer.modules.blocks import find_stacks
from layer_streamer.modules.runner import Runner
from layer_streamer.passes.inputs import move
from layer_streamer.transport.weights import Weights

CPU, META = torch.device("cpu"), torch.device("meta")


class Plan:
    layers = tuple(range(4))
    tiers = ("disk",) * 4


class Layer:
    tensors = ("weight",)


class Manifest:
    layers = (Layer(),) * 4


class Alternating:
    """A streamer's surface, whose layers lie on meta and on the CPU in turn."""

    devices = (META, CPU)
    manifest = Manifest()
    plan = Plan()

    def _opened(self) -> SimpleNamespace:
        return SimpleNamespace(experts=None)

    def sweep(self, **way: bool) -> Iterator[tuple[int, Weights]]:
        for i in range(4):
            yield i, Weights({"weight": torch.ones(3, device=self.devices[i % 2])})


class Noting(nn.Module):
    """Notes where what it is given lies, and gives the like on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3))
        self.seen: list[Any] = []

    def forward(self, x: Any, *rest: Any, **named: Any) -> Any:
        self.seen = [x, rest, named]
        return x * self.weight, {"more": rest}


def test_what_a_block_is_given_is_moved_to_its_layers_device_and_the_last_output_back() -> None:
    with torch.device("meta"):
        model = nn.ModuleList(Noting() for _ in range(4))
    streamer: Any = Alternating()
    runner = Runner(streamer, find_stacks(model, ["{i}."])[0].blocks)
    x, mask, kept = torch.ones(3), torch.ones(1), [1, "text", None]  # nothing comes from meta
    for i, block in enumerate(model):
        out, more = block(x, [mask, (mask, kept)], mask=mask, pair={"a": mask})
        there = streamer.devices[i % 2]
        given, (listed,), named = block.seen
        first, (second, same) = listed
        tensors = (given, first, second, named["mask"], named["pair"]["a"])
        assert {tensor.device for tensor in tensors} == {there}
        assert same is kept
        assert out.device == more["more"][0][0].device == (META if i == 3 else there)
    runner.close()


def test_containers_whose_tensors_are_there_stay_the_same_objects() -> None:
    Pair = namedtuple("Pair", "a b")
    x = torch.ones(1)
    for some in ([x, 1], (x, "a"), {"a": [x]}, Pair(x, None), OrderedDict(a=x), "text", {1, 2}):
        assert move(some, CPU) is some
    moved = move([{"a": x}, kept := [3]], META)
    assert moved[0]["a"].is_meta and moved[1] is kept
    assert type(move(Pair(x, 2), META)) is Pair
    ordered = move(OrderedDict(a=x, b=2), META)
    assert type(ordered) is OrderedDict and ordered["a"].is_meta and ordered["b"] == 2


def test_outputs_of_transformers_keep_their_class_when_they_are_moved() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    moved = move(outputs.BaseModelOutput(last_hidden_state=torch.ones(1)), META)
    assert type(moved) is outputs.BaseModelOutput
    assert moved.last_hidden_state.is_meta and moved["last_hidden_state"].is_meta


@pytest.fixture
def dynamo() -> Iterator[Any]:
    from torch._dynamo import utils

    torch._dynamo.reset()
    utils.counters.clear()
    yield utils.counters
    torch._dynamo.reset()


def test_compiled_forwards_of_all_blocks_are_one_graph_and_none_again(
    tmp_path: Path, dynamo: Any
) -> None:
    with streamed(tmp_path, n_gpu=2, n_cpu=0, n_cpu_pinned=0) as some:
        assert some.streamer.plan.placement.device_slots[0].count >= 3
        for block in some.model.blocks:
            block.forward = torch.compile(block.forward, backend="eager")
        for seed in range(4):
            some.agree(seed)
        some.agree(way=[0, 0, 2, 5, 5])
        some.stream_again()
        some.agree(way=range(NUM_BLOCKS))
        assert dynamo["stats"]["unique_graphs"] == 1
        assert not dynamo["graph_break"] and not dynamo["recompiles"]


def test_compiled_forwards_over_resident_layers_are_one_graph(tmp_path: Path, dynamo: Any) -> None:
    with streamed(tmp_path, device_budget="1GiB") as some:
        for block in some.model.blocks:
            block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
        for seed in range(3):
            some.agree(seed)
        assert dynamo["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("what", ["model", "block"])
def test_a_compiler_that_comes_to_the_hooks_is_told_what_to_compile(
    tmp_path: Path, dynamo: Any, what: str
) -> None:
    with streamed(tmp_path, Net) as some:
        if what == "block":
            some.model.blocks[0].compile(backend="eager")
            compiled = some.model
        else:
            compiled = torch.compile(some.model, backend="eager")
        with (
            torch.no_grad(),
            pytest.raises(RuntimeError, match=r"compile each block's forward alone"),
        ):
            compiled(torch.ones(2, HIDDEN))
        torch._dynamo.reset()
        if what == "model":
            some.agree()
