"""Stacks of blocks: found without a list of models, grouped into sequences, ties named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreters import run_script
from torch import nn

from layer_streamer import ConfigError
from layer_streamer.modules.blocks import Block, Stack, find_stacks, find_ties, group_stacks


def in_package(package: str, name: str, bases: tuple[type, ...] = (nn.Module,), **body: Any) -> Any:
    """A class that says it comes from a package, which is not there."""
    return type(name, bases, {"__module__": f"{package}.models.some", **body})


Marked = in_package("transformers", "GradientCheckpointingLayer")
Own = type("OwnLayer", (Marked,), {})
Listed = type("ListedLayer", (nn.Module,), {})
Other = type("OtherLayer", (nn.Module,), {})
Pretrained = in_package("transformers", "PreTrainedModel", _no_split_modules=["ListedLayer"])
Diffuser = in_package("diffusers", "ModelMixin", _repeated_blocks=["ListedLayer"])


def holding(make: Any = nn.Module, /, **children: nn.Module) -> nn.Module:
    module: nn.Module = make()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def listed(*classes: Any) -> nn.ModuleList:
    return nn.ModuleList(cls() for cls in classes)


def names(stacks: Sequence[Stack]) -> list[str]:
    return [stack.name for stack in stacks]


@pytest.mark.parametrize(
    ("make", "members", "found"),
    [
        (nn.Module, (Own, Own), True),
        (nn.Module, (Own, Marked), True),
        (nn.Module, (Own,), False),
        (nn.Module, (Own, Other), False),
        (nn.Module, (Listed, Listed), False),
        (Pretrained, (Listed, Listed), True),
        (Pretrained, (Listed, Own), True),
        (Pretrained, (Listed, Other), False),
        (Diffuser, (Listed, Listed), True),
        (Diffuser, (Other, Other), False),
    ],
)
def test_a_list_of_several_blocks_that_are_all_marked_is_a_stack(
    make: Any, members: Any, found: bool
) -> None:
    model = holding(make, layers=listed(*members))
    if found:
        (stack,) = find_stacks(model)
        assert (stack.name, stack.parent) == ("layers", "")
        assert [b.name for b in stack.blocks] == ["layers.0", "layers.1"]
        assert [b.module for b in stack.blocks] == list(model.layers)  # type: ignore[arg-type]
    else:
        with pytest.raises(ConfigError, match=r"layers \(\d x"):
            find_stacks(model)


def test_a_part_of_the_model_may_say_which_classes_are_blocks() -> None:
    inner = holding(Pretrained, layers=listed(Listed, Listed))
    assert names(find_stacks(holding(tower=inner, head=nn.Linear(1, 1)))) == ["tower.layers"]


def test_a_list_within_a_block_is_no_stack_but_one_beside_it_is() -> None:
    outer = nn.ModuleList(holding(Own, parts=listed(Own, Own)) for _ in range(2))
    model = holding(layers=outer, layers_too=listed(Own, Own))
    assert names(find_stacks(model)) == ["layers", "layers_too"]


def test_of_a_list_that_is_left_out_those_within_its_members_are_looked_at() -> None:
    outer = nn.ModuleList(holding(Own, parts=listed(Own, Own)) for _ in range(2))
    model = holding(layers=outer, layers_too=listed(Own, Own))
    found = find_stacks(model, without={"layers", "layers.1.parts"})
    assert names(found) == ["layers.0.parts", "layers_too"]


def test_stacks_of_one_parent_are_one_sequence_and_others_are_of_their_own() -> None:
    model = holding(
        encoder=holding(layers=listed(Own, Own)),
        joint=listed(Own, Own),
        decoder=holding(layers=listed(Own, Own)),
        single=listed(Own, Own, Own),
    )
    stacks = find_stacks(model)
    assert names(stacks) == ["encoder.layers", "joint", "decoder.layers", "single"]
    found = [[block.name for block in blocks] for blocks in group_stacks(stacks)]
    assert found == [
        ["encoder.layers.0", "encoder.layers.1"],
        ["joint.0", "joint.1", "single.0", "single.1", "single.2"],
        ["decoder.layers.0", "decoder.layers.1"],
    ]


def test_patterns_name_blocks_of_any_module_in_the_order_of_the_patterns() -> None:
    model = holding(
        single=nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)),
        blocks=nn.ModuleList(holding(inner=nn.Linear(1, 1)) for _ in range(12)),
    )
    stacks = find_stacks(model, ["blocks.{i}.inner.", "single.{i}"])
    assert [stack.parent for stack in stacks] == ["", ""]
    (sequence,) = group_stacks(stacks)
    inner = [f"blocks.{i}.inner" for i in range(12)]
    assert [block.name for block in sequence] == [*inner, "single.0", "single.1"]
    assert sequence[11].module is model.get_submodule("blocks.11.inner")


def test_a_pattern_may_find_the_only_block_there_is() -> None:
    (stack,) = find_stacks(holding(blocks=listed(Other)), ["blocks.{i}."])
    assert [block.name for block in stack.blocks] == ["blocks.0"]


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["layers.{i}."], r"no module 'layers\.0'; its ModuleLists: blocks \(2 x OtherLayer\)"),
        (["blocks."], r"'blocks\.': needs \{i\} once"),
        (["blocks.{i}.{i}."], r"needs \{i\} once"),
        ([], r"stacks=\[\]: a list of patterns"),
        ("blocks.{i}.", r"a list of patterns"),
        (["blocks.{i}.", "blocks.1.parts.{i}."], r"'blocks\.1\.parts\.0' is within 'blocks\.1'"),
    ],
)
def test_patterns_that_cannot_be_are_one_clear_error(patterns: Any, said: str) -> None:
    blocks = listed(Other, Other)
    blocks[1].add_module("parts", nn.Sequential(nn.Linear(1, 1)))
    with pytest.raises(ConfigError, match=said):
        find_stacks(holding(blocks=blocks), patterns)


def test_a_model_without_blocks_is_told_what_lists_it_has_the_longest_first() -> None:
    few, many = listed(Other), nn.ModuleList(holding(own=listed(Other, Own)) for _ in range(40))
    with pytest.raises(ConfigError) as caught:
        find_stacks(holding(few=few, many=many))
    assert 'stacks=["layers.{i}."]' in str(caught.value)
    lists = str(caught.value).partition("its ModuleLists: ")[2]
    assert (
        lists == "many (40 x Module), many.*.own (2 x OtherLayer | OwnLayer), few (1 x OtherLayer)"
    )
    with pytest.raises(ConfigError, match="it has no ModuleList"):
        find_stacks(nn.Linear(1, 1))


def test_a_module_that_is_in_its_list_twice_is_one_block() -> None:
    one, two = Own(), Own()
    one.weight, two.weight = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    model = holding(layers=nn.ModuleList([one, two, one, two]))
    (stack,) = find_stacks(model)
    assert stack.blocks == (Block("layers.0", one), Block("layers.1", two))
    assert find_ties(model, stack.blocks) == ()


@given(st.lists(st.integers(0, 6), min_size=4, max_size=8), st.booleans())
def test_ties_are_the_tensors_of_blocks_that_have_several_names(
    numbers: list[int], with_head: bool
) -> None:
    shared = [nn.Parameter(torch.ones(1)) for _ in range(7)]
    blocks = listed(*[Own] * (len(numbers) // 2))
    expected: dict[int, list[str]] = {}
    for i, block in enumerate(blocks):
        for leaf, number in zip("ab", numbers[2 * i :], strict=False):
            block.register_parameter(leaf, shared[number])
            expected.setdefault(number, []).append(f"layers.{i}.{leaf}")
    model = holding(layers=blocks)
    if with_head:
        model.register_parameter("head", shared[0])
        if 0 in expected:
            expected[0].insert(0, "head")
    ties = find_ties(model, find_stacks(model)[0].blocks)
    found = sorted(list(tie.names) for tie in ties)
    assert found == sorted(some for some in expected.values() if len(some) > 1)
    for tie in ties:
        owners = list(dict.fromkeys(n.rpartition(".")[0] for n in tie.names if n != "head"))
        assert list(tie.blocks) == owners
        assert tie.within_one_block == (len(owners) == 1 and "head" not in tie.names)


def test_buffers_that_are_in_no_checkpoint_are_no_ties() -> None:
    table, stats = torch.ones(1), torch.ones(1)
    blocks = listed(Own, Own)
    for block in blocks:
        block.register_buffer("table", table, persistent=False)
        block.register_buffer("stats", stats)
    model = holding(layers=blocks)
    (tie,) = find_ties(model, find_stacks(model)[0].blocks)
    assert tie.names == ("layers.0.stats", "layers.1.stats")


IMPORTED = """
import sys
from layer_streamer.modules.blocks import find_stacks
from torch import nn
find_stacks(nn.ModuleList([nn.Linear(1, 1)]), ["{i}"])
try:
    find_stacks(nn.Linear(1, 1))
except ValueError:
    print({"transformers", "diffusers", "accelerate"} & sys.modules.keys())
"""


def test_neither_transformers_nor_diffusers_is_imported_for_another_module() -> None:
    assert run_script(IMPORTED).stdout.strip() == "set()"


def test_models_of_transformers_bring_their_marks() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"num_hidden_layers": 3, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 16}
    t5 = transformers.T5Config(d_model=8, d_kv=8, num_layers=2, num_heads=1, vocab_size=16)
    with torch.device("meta"):
        llama = transformers.LlamaModel(transformers.LlamaConfig(**small))
        both = transformers.T5ForConditionalGeneration(t5)
    found = [
        [[block.name for block in blocks] for blocks in group_stacks(find_stacks(model))]
        for model in (llama, both)
    ]
    sides = ("encoder", "decoder")
    assert found == [
        [[f"layers.{i}" for i in range(3)]],
        [[f"{side}.block.{i}" for i in range(2)] for side in sides],
    ]
