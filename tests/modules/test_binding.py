"""Weights are bound by dict stores: which objects a module holds, and when."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from block_models import HIDDEN, Part, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupter import Interrupt, Interrupter
from torch import nn

from layer_streamer import ConfigError, StreamerError
from layer_streamer.modules.binding import Binder
from layer_streamer.modules.blocks import Block
from layer_streamer.transport.weights import Weights


@dataclass
class Recipe:
    convert: Callable[[torch.Tensor], torch.Tensor] | None = None


def on_meta(make: Callable[[], nn.Module] = Part) -> nn.Module:
    """Parameters on meta, and what is in no checkpoint real."""
    with torch.device("meta"):
        block = make().eval()
    for module in block.modules():
        for leaf in module._non_persistent_buffers_set:
            module._buffers[leaf] = torch.zeros(module._buffers[leaf].shape)
    return block


def state(make: Callable[[], nn.Module] = Part, seed: int = 0) -> dict[str, torch.Tensor]:
    return dict(randomized(make(), seed).state_dict())


def bound(
    *blocks: nn.Module, keys: Sequence[str] | None = None, **options: Any
) -> tuple[Binder, tuple[nn.Module, ...]]:
    named = [Block(f"blocks.{i}", block) for i, block in enumerate(blocks)]
    each = [list(block.state_dict()) if keys is None else keys for block in blocks]
    return Binder(named, each, **options), blocks


def test_a_block_gets_the_weights_and_computes_with_them() -> None:
    plain = randomized(Part())
    binder, (block,) = bound(on_meta())
    block._buffers["table"] = plain.get_buffer("table")
    weights = Weights(plain.state_dict())
    binder.bind(0, block, weights)
    for name, tensor in weights.items():
        mine = block.state_dict(keep_vars=True)[name]
        assert mine.data_ptr() == tensor.data_ptr()
        assert isinstance(mine, nn.Parameter) == (name != "scale")
        assert not mine.requires_grad
    x = torch.ones(2, HIDDEN)
    assert torch.equal(block(x), plain(x))


def test_blocks_of_one_form_get_the_same_objects_whenever_a_slot_holds_the_layout_again() -> None:
    binder, blocks = bound(on_meta(), on_meta(), on_meta())
    slots = [Weights(state(seed=i)) for i in range(2)]
    seen: list[set[int]] = [set(), set()]
    for n in range(12):
        block = blocks[n % 3]
        binder.bind(n % 3, block, slots[n % 2])
        ids = sorted(id(t) for t in block.state_dict(keep_vars=True).values())
        seen[n % 2].add(hash(tuple(ids)))
    assert [len(some) for some in seen] == [1, 1]
    assert seen[0] != seen[1]


def test_unbound_parameters_are_on_meta_in_the_right_shape_and_dtype() -> None:
    block = on_meta(lambda: Part().to(torch.bfloat16))
    before = {k: id(t) for k, t in block.state_dict(keep_vars=True).items()}
    binder, _ = bound(block)
    binder.bind(0, block, Weights(state(lambda: Part().to(torch.bfloat16))))
    assert not any(t.is_meta for t in block.parameters())
    binder.unbind(0)
    for tensor in block.state_dict(keep_vars=True).values():
        assert tensor.is_meta and not tensor.requires_grad
        assert tensor.dtype == torch.bfloat16
    binder.release()
    for name, tensor in block.state_dict(keep_vars=True).items():
        assert tensor.is_meta and not tensor.requires_grad and id(tensor) == before[name]


def test_real_parameters_are_given_up_when_the_binder_is_made() -> None:
    block = Part()
    gone = [weakref.ref(p) for p in block.parameters()]
    binder, _ = bound(block)
    gc.collect()
    assert all(ref() is None for ref in gone)
    assert all(isinstance(p, nn.Parameter) and p.is_meta for p in block.parameters())
    assert block.up.weight.shape == (2 * HIDDEN, HIDDEN)
    binder.bind(0, block, Weights(state()))
    binder.release()
    assert all(p.is_meta for p in block.parameters())


def test_what_has_no_key_stays_as_it_is() -> None:
    block = on_meta()
    adapter = nn.Linear(HIDDEN, HIDDEN)
    block.add_module("adapter", adapter)
    own = adapter.weight
    binder, _ = bound(block, keys=list(state()))
    binder.bind(0, block, Weights(state()))
    binder.unbind(0)
    assert adapter.weight is own and own.requires_grad and not own.is_meta


def test_a_key_without_a_place_is_named() -> None:
    for key in ("up.nope", "nope.weight", "table"):
        with pytest.raises(ConfigError, match=rf"blocks\.0\.{key}: Part has no such parameter"):
            bound(on_meta(), keys=[key])


def test_another_shape_than_the_modules_is_named() -> None:
    binder, (block,) = bound(on_meta())
    weights = {**state(), "up.bias": torch.ones(3)}
    with pytest.raises(
        StreamerError, match=r"blocks\.0\.up\.bias: expected shape \[80\], got \[3\]"
    ):
        binder.bind(0, block, Weights(weights))


def test_several_names_of_one_tensor_within_a_block_all_get_it() -> None:
    block = on_meta()
    block.other = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False, device="meta")
    block.other.weight = block.up.weight
    binder, _ = bound(block, keys=list(state()))
    binder.bind(0, block, Weights(state()))
    assert block.other.weight is block.up.weight and not block.up.weight.is_meta
    binder.unbind(0)
    assert block.other.weight is block.up.weight and block.up.weight.is_meta


def test_what_would_be_computed_with_on_meta_is_named_until_it_has_values() -> None:
    block = on_meta()
    binder, _ = bound(block, keys=list(state()))
    block.up = Wrapped(block.up)
    block.up.lora.to("meta")
    for _ in range(2):
        with pytest.raises(StreamerError, match=r"blocks\.0\.up\.lora\.weight is on meta"):
            binder.bind(0, block, Weights(state()))
    block.up.lora = nn.Linear(HIDDEN, 2 * HIDDEN)
    binder.bind(0, block, Weights(state()))
    with pytest.raises(StreamerError, match=r"blocks\.0\.down\.weight is on meta"):
        fresh = on_meta()
        some, _ = bound(fresh, keys=[key for key in state() if key != "down.weight"])
        some.bind(0, fresh, Weights(state()))


def test_what_was_bound_can_be_bound_by_another_binder_released_or_not() -> None:
    block = on_meta()
    before = block.up.weight
    for released in (True, False, False, True):
        binder, _ = bound(block)
        binder.bind(0, block, Weights(state()))
        assert type(block.up.weight) is nn.Parameter
        binder.unbind(0)
        if released:
            binder.release()
            assert type(block.scale) is torch.Tensor and block.up.weight is before


def test_an_unbound_parameter_says_that_it_is_where_its_weights_will_be() -> None:
    blocks = on_meta(), on_meta()
    binder, _ = bound(*blocks, devices=[torch.device("cpu"), torch.device("cuda", 1)])
    said = [[str(t.device) for t in (b.up.weight, b.scale)] for b in blocks]
    assert said == [["cpu", "cpu"], ["cuda:1", "cuda:1"]]
    assert all(p.is_meta for b in blocks for p in b.parameters())
    binder.release()
    assert blocks[0].up.weight.device.type == "meta"


def test_a_recurrent_network_computes_with_what_is_bound() -> None:
    plain = randomized(nn.LSTM(HIDDEN, HIDDEN))
    binder, (block,) = bound(on_meta(lambda: nn.LSTM(HIDDEN, HIDDEN)))
    x = torch.ones(3, HIDDEN)
    for seed in (0, 1):
        weights = state(lambda: nn.LSTM(HIDDEN, HIDDEN), seed)
        plain.load_state_dict(weights)
        binder.bind(0, block, Weights(weights))
        assert torch.equal(block(x)[0], plain(x)[0])


def test_what_is_made_by_arithmetic_is_made_anew_in_the_same_memory_each_time() -> None:
    made = {f"blocks.{i}.up.weight": Recipe(torch.t) for i in range(2)}
    binder, blocks = bound(on_meta(), on_meta(), sources=made)
    assert binder.made_nbytes == 2 * HIDDEN * HIDDEN * 4
    places = set()
    for n in range(6):
        stored = {**state(seed=n % 3), "up.weight": torch.rand(HIDDEN, 2 * HIDDEN)}
        weights = Weights(stored)
        binder.bind(n % 2, blocks[n % 2], weights)
        parameter = blocks[n % 2].up.weight
        assert isinstance(parameter, nn.Parameter)
        assert torch.equal(parameter, stored["up.weight"].T)
        assert torch.equal(blocks[n % 2].down.weight, stored["down.weight"])
        places.add(parameter.data_ptr())
    assert len(places) == 1


def test_arithmetic_may_change_the_dtype_in_any_mode_of_gradients() -> None:
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        sources = {"blocks.0.scale": Recipe(lambda t: t.float() * 2), "blocks.0.up.bias": Recipe()}
        binder, (block,) = bound(on_meta(), sources=sources)
        half = torch.full((HIDDEN,), 3, dtype=torch.bfloat16)
        weights = Weights({**state(), "scale": half})
        with mode():
            for _ in range(2):
                binder.bind(0, block, weights)
        assert torch.equal(block.scale, torch.full((HIDDEN,), 6.0))
        assert not any(t.is_inference() for t in block.state_dict(keep_vars=True).values())


def test_a_gradient_asked_for_in_one_hand_out_is_not_asked_for_in_the_next() -> None:
    binder, blocks = bound(on_meta(), on_meta())
    weights = Weights(state())
    binder.bind(0, blocks[0], weights)
    wanted = blocks[0].up.weight.requires_grad_()
    (wanted * 2).sum().backward()
    with torch.no_grad():  # where nothing is added to any
        binder.bind(1, blocks[1], weights)
    binder.bind(1, blocks[1], weights)
    assert blocks[1].up.weight is not wanted
    assert not any(p.requires_grad or p.grad is not None for p in blocks[1].parameters())
    assert wanted.grad is not None


def test_a_module_without_children_that_gets_one_is_looked_at_again() -> None:
    """A parametrization takes a parameter out of its module into a child."""
    binder, (block,) = bound(on_meta())
    binder.bind(0, block, Weights(state()))
    shown = block.up.weight
    child = nn.Module()
    child.original = shown
    del block.up.weight
    block.up.inner = child
    again = Weights({name: tensor.clone() for name, tensor in state().items()})
    binder.bind(0, block, again)
    assert block.up.inner.original is not shown
    assert block.up.inner.original.data_ptr() == again["up.weight"].data_ptr()


def test_a_parameter_of_a_class_of_its_own_keeps_class_and_attributes() -> None:
    class Packed(nn.Parameter):
        pass

    def packed(kind: int) -> nn.Module:
        block = nn.Linear(4, 4, bias=False, device="meta")
        block.weight = Packed(torch.empty(4, 4, device="meta", dtype=torch.uint8), False)
        block.weight.kind = kind
        return block

    binder, blocks = bound(packed(2), packed(3), packed(2))
    weights = Weights({"weight": torch.ones(4, 4, dtype=torch.uint8)})
    seen = []
    for i, block in enumerate(blocks):
        binder.bind(i, block, weights)
        assert type(block.weight) is Packed and block.weight.kind == (2, 3, 2)[i]
        seen.append(block.weight)
    assert seen[0] is seen[2] and seen[0] is not seen[1]


class Wrapped(nn.Module):
    """As peft wraps a linear layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.lora = nn.Linear(HIDDEN, 2 * HIDDEN)


@pytest.mark.parametrize("when", ["before", "unbound", "bound"])
def test_a_layer_that_is_wrapped_before_or_after_keeps_its_weights(when: str) -> None:
    block, keys = on_meta(), list(state())
    if when == "before":
        block.up = Wrapped(block.up)
    binder, _ = bound(block, keys=keys)
    if when == "bound":
        binder.bind(0, block, Weights(state()))
    if when != "before":
        block.up = Wrapped(block.up)
    weights = Weights(state(seed=1))
    binder.bind(0, block, weights)
    assert torch.equal(block.up.base_layer.weight, weights["up.weight"])
    assert not block.up.lora.weight.is_meta
    binder.unbind(0)
    assert block.up.base_layer.weight.is_meta


def test_a_layer_that_is_wrapped_after_an_interrupted_binding_keeps_its_weights() -> None:
    number, fired = 0, True
    while fired:
        block = on_meta()
        binder, _ = bound(block)
        binder.bind(0, block, Weights(state()))
        weights = Weights(state(seed=1))
        try:
            with Interrupter(number, "opcode", ("transport",)) as interrupter:
                binder.bind(0, block, weights)
        except Interrupt:
            pass
        finally:
            sys.settrace(None)
        block.up = Wrapped(block.up)
        binder.bind(0, block, weights)
        assert torch.equal(block.up.base_layer.weight, weights["up.weight"])
        number, fired = number + 5, interrupter.fired
    assert number > 100


def test_a_module_that_takes_over_the_parameter_of_another_gets_the_weights() -> None:
    block = on_meta()
    binder, _ = bound(block)
    binder.bind(0, block, Weights(state()))
    new = nn.Linear(HIDDEN, 2 * HIDDEN, device="meta")
    new.weight, new.bias = block.up.weight, block.up.bias
    block.up = new
    weights = Weights(state(seed=1))
    binder.bind(0, block, weights)
    assert torch.equal(new.weight, weights["up.weight"])


def test_a_module_that_was_put_in_the_place_of_another_is_named() -> None:
    block = on_meta()
    binder, _ = bound(block)
    old, block.up = block.up, nn.Linear(HIDDEN, 2 * HIDDEN)
    for _ in range(2):
        with pytest.raises(StreamerError, match=r"blocks\.0: .* streamed up\.bias, up\.weight any"):
            binder.bind(0, block, Weights(state()))
    block.up = old
    binder.bind(0, block, Weights(state()))


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.booleans()), max_size=12))
def test_a_block_has_the_weights_it_was_given_last_whatever_came_before(
    acts: list[tuple[int, int, bool]],
) -> None:
    binder, blocks = bound(on_meta(), on_meta(), on_meta(lambda: nn.LayerNorm(3)))
    slots = [(Weights(state(seed=k)), Weights(state(lambda: nn.LayerNorm(3), k))) for k in range(3)]
    expected: dict[int, Mapping[str, torch.Tensor] | None] = dict.fromkeys(range(3))
    for i, k, gives in acts:
        weights = slots[k][i == 2]
        if gives:
            binder.bind(i, blocks[i], weights)
        else:
            binder.unbind(i)
        expected[i] = weights if gives else None
        for j, block in enumerate(blocks):
            for name, tensor in block.state_dict().items():
                some = expected[j]
                assert tensor.is_meta if some is None else torch.equal(tensor, some[name])


USES: dict[str, Callable[[nn.Module], Any]] = {
    "a product": lambda b: torch.ones(2, HIDDEN) @ b.up.weight.T,
    "a call": lambda b: b.up(torch.ones(2, HIDDEN)),
    "a sum": lambda b: b.up.weight.sum(),
    "a stack": lambda b: torch.stack([b.up.weight, b.up.weight]),
    "a buffer": lambda b: b.scale + 1,
    "a transposed": lambda b: b.up.weight.mT,
}


@pytest.mark.parametrize("use", USES)
def test_a_use_outside_of_the_window_names_the_parameter(use: str) -> None:
    binder, (block,) = bound(on_meta())
    for _ in range(2):
        with pytest.raises(StreamerError, match=r"blocks\.0\.(up\.weight|up\.bias|scale) is used"):
            USES[use](block)
        binder.bind(0, block, Weights(state()))
        USES[use](block)
        assert type(block.up.weight) is nn.Parameter and type(block.scale) is torch.Tensor
        binder.unbind(0)


def test_unbound_parameters_still_tell_their_form() -> None:
    _, (block,) = bound(on_meta())
    weight = block.up.weight
    assert isinstance(weight, nn.Parameter) and not isinstance(block.scale, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device.type) == ((80, 40), torch.float32, "meta")
    assert weight.numel() == 3200 and weight.is_floating_point() and not weight.requires_grad
    assert "meta" in repr(weight)
    assert set(block.state_dict()) == set(state())
    assert sum(p.numel() for p in block.parameters()) == 40 * 80 * 2 + 80 + 2 * 40
