"""What the plan says beside the blocks: another order, adapters; and how blocks get their keys."""

from __future__ import annotations

from collections.abc import ItemsView, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from layer_streamer import ConfigError, stream
from layer_streamer.checkpoint.manifest import TensorSpec
from layer_streamer.modules.blocks import Block
from layer_streamer.modules.naming.recipe import Recipe
from layer_streamer.modules.sequence import by_block


class Net(nn.Module):
    """Blocks in two lists and one by itself; ``way`` is the order in which they are called."""

    def __init__(self, way: Sequence[str]) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.middle = nn.Linear(6, 6)
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.way:
            x = torch.tanh(self.get_submodule(name)(x)) + x
        return x


MIXED = ("down.0", "up.2", "down.1", "up.1", "down.2", "up.0")
PATTERNS = ("down.{i}.", "up.{i}.")


def streamed(folder: Path, way: Sequence[str], stacks: Sequence[str]) -> tuple[Net, Any]:
    torch.manual_seed(0)
    plain = Net(way)
    save_file(plain.state_dict(), folder / "model.safetensors")
    with torch.device("meta"):
        net = Net(way)
    return plain, stream(net, folder, stacks=stacks, device="cpu", n_gpu=0)


def test_an_order_that_costs_passes_is_said_and_one_pass_is_to_be_had(tmp_path: Path) -> None:
    x = torch.ones(2, 6)
    plain, model = streamed(tmp_path, MIXED, PATTERNS)
    assert not model.layer_streamer.plan.detours
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    plan = model.layer_streamer.plan
    assert plan.detours == {"down": 3}
    assert "down: a forward comes to its blocks in another order and takes 3 passes" in str(plan)
    order = model.layer_streamer.order
    assert order == MIXED
    model.layer_streamer.close()
    plain, again = streamed(tmp_path, MIXED, order)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(again(x), plain(x))
    assert not again.layer_streamer.plan.detours
    (report,) = again.layer_streamer.last_pass.values()
    assert report.num_layers == len(MIXED)
    again.layer_streamer.close()


def test_a_block_may_be_named_alone_beside_lists(tmp_path: Path) -> None:
    way = ("down.0", "down.1", "down.2", "middle", "up.0")
    plain, model = streamed(tmp_path, way, ["down.{i}.", "middle", "up.0."])
    with torch.no_grad():
        assert torch.equal(model(torch.ones(2, 6)), plain(torch.ones(2, 6)))
    assert model.layer_streamer.order == way
    assert list(model.layer_streamer.plan.sequences) == ["down"]
    model.layer_streamer.close()


@pytest.mark.parametrize(
    ("stacks", "said"),
    [
        (["down"], r"'down': needs \{i\} once"),
        (["nothing."], "has no module 'nothing'"),
        (["down.7"], r"has no module 'down\.7'"),
    ],
)
def test_a_name_that_is_no_block_is_refused(tmp_path: Path, stacks: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        streamed(tmp_path, MIXED, stacks)


def test_adapters_are_in_the_plan_as_they_come_and_go(tmp_path: Path) -> None:
    plain, model = streamed(tmp_path, ("down.0", "down.1", "down.2"), ["down.{i}."])
    handle = model.layer_streamer
    assert handle.plan.adapter_nbytes == 0
    assert "adapters" not in str(handle.plan)
    with torch.no_grad():
        model(torch.ones(2, 6))
    assert handle.plan.adapter_nbytes == 0, "what was bound last is streamed"
    adapter = nn.Linear(6, 2, bias=False)
    for block in model.down[:2]:
        block.add_module("lora", adapter)
    assert handle.plan.adapter_nbytes == adapter.weight.nbytes, "shared ones count once"
    assert "adapters, resident: 48 B" in str(handle.plan)
    with torch.no_grad():
        assert torch.equal(model(torch.ones(2, 6)), plain(torch.ones(2, 6)))
    assert handle.plan.adapter_nbytes == adapter.weight.nbytes
    for block in model.down[:2]:
        del block.lora
    assert handle.plan.adapter_nbytes == 0
    handle.close()
    assert handle.plan.adapter_nbytes == 0


@pytest.mark.slow
def test_adapters_of_peft_are_in_the_plan(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    _, model = streamed(tmp_path, ("down.0", "down.1", "down.2"), ["down.{i}."])
    config = peft.LoraConfig(r=2, target_modules=["down.0", "down.2", "middle"])
    wrapped = peft.get_peft_model(model, config)
    each = 2 * 2 * 6 * 4
    with torch.no_grad():
        for _ in range(2):
            assert model.layer_streamer.plan.adapter_nbytes == 3 * each
            wrapped(torch.ones(2, 6))
    wrapped.add_adapter("other", config)
    assert model.layer_streamer.plan.adapter_nbytes == 6 * each
    wrapped.unload()
    assert model.layer_streamer.plan.adapter_nbytes == 0
    model.layer_streamer.close()


def recipe(name: str) -> Recipe:
    spec = TensorSpec(name, torch.uint8, (1,), Path("nowhere"), 0, 1)
    return Recipe(name, (spec,), torch.uint8, (1,))


class Counted(dict[str, Recipe]):
    """Counts how often all of it is gone through."""

    rounds = 0

    def items(self) -> ItemsView[str, Recipe]:
        Counted.rounds += 1
        return super().items()


@given(st.lists(st.sampled_from(["a.1", "a.10", "a.1b", "a", "b.0.c", "b.0.cd", "b"]), unique=True))
def test_each_recipe_is_its_blocks_by_whole_names_and_is_looked_at_once(names: list[str]) -> None:
    blocks = [Block(name, nn.Identity()) for name in names if name not in ("a", "b")]
    leaves = ("w", "deep.w", "1.w", "0.c.w")
    recipes = Counted({f"{n}.{leaf}": recipe(f"{n}.{leaf}") for n in names for leaf in leaves})
    Counted.rounds = 0
    found = by_block(blocks, recipes)
    assert Counted.rounds == 1
    assert list(found) == [block.name for block in blocks]
    for block in blocks:
        head = f"{block.name}."
        want = {n.removeprefix(head): r for n, r in recipes.items() if n.startswith(head)}
        assert found[block.name] == want
