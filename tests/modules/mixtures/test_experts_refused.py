"""What experts on demand cannot do is said in one line, and the next forward is right."""

from __future__ import annotations

import gc
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import quiet, write
from routed import BLOCKS, Routed, inputs, saved, streamed
from tiny_models import tiny_class, tiny_model
from tiny_quantized import quantized_checkpoint
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from layer_streamer import ClosedError, ConfigError, StreamerError, stream

CHOSEN = torch.tensor([[[0, 1], [2, 3], [4, 0]]] * BLOCKS)


def answer(model: Any, x: torch.Tensor | None = None) -> torch.Tensor:
    own, weights = inputs(3, 2)
    with torch.set_grad_enabled(x is not None):
        out: torch.Tensor = model(own if x is None else x, CHOSEN, weights)
    return out


def ask_for_gradients(net: Any) -> None:
    answer(net, inputs(3, 2)[0].requires_grad_())


def ask_for_gradients_of_experts(net: Any) -> None:
    whole = net.blocks[1].experts.down_proj
    whole.requires_grad_(True)
    try:
        answer(net, inputs(3, 2)[0])
    finally:
        whole.requires_grad_(False)


def replace_a_parameter(net: Any) -> None:
    experts = net.blocks[2].experts
    own = experts._parameters["down_proj"]
    experts._parameters["down_proj"] = nn.Parameter(torch.zeros(own.shape))
    try:
        answer(net)
    finally:
        experts._parameters["down_proj"] = own


def use_one_outside(net: Any) -> None:
    answer(net)
    with torch.no_grad():
        net.blocks[1].experts(torch.zeros(3, 32), CHOSEN[0], torch.ones(3, 2))


def use_all_of_them(net: Any) -> None:
    print(net.blocks[1].experts.gate_up_proj + 1)


def compile_a_block(net: Any) -> None:
    forward = net.blocks[0].forward
    net.blocks[0].forward = torch.compile(forward, backend="eager", fullgraph=False)
    try:
        answer(net)
    finally:
        net.blocks[0].forward = forward


@pytest.mark.parametrize(
    ("do", "words"),
    [
        (ask_for_gradients, "gradients are asked for through experts that are brought on demand"),
        (ask_for_gradients_of_experts, "gradients are asked for through experts"),
        (replace_a_parameter, r"blocks\.2\.experts\.down_proj was replaced or wrapped"),
        (use_one_outside, r"blocks\.1\.experts is used while its block has no weights"),
        (use_all_of_them, r"blocks\.1\.experts\.gate_up_proj is used as a whole, and its experts"),
        (compile_a_block, "cannot be traced by torch.compile"),
    ],
)
def test_it_is_said_in_one_line_and_the_next_forward_is_right(
    tmp_path: Path, do: Callable[[Any], None], words: str
) -> None:
    plain = saved(tmp_path)
    net = streamed(plain, tmp_path, 2)
    with pytest.raises(StreamerError, match=words) as caught:
        do(net)
    assert "\n" not in str(caught.value).strip()
    assert torch.equal(answer(net), answer(plain))
    net.layer_streamer.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts": None}, "expert_slots: goes with experts='demand'"),
        ({"expert_slots": None}, "expert_slots= or device_budget= has to say how many"),
        ({"device": ["cpu", "cpu"]}, "of several devices, each needs a streamer of its own"),
        ({"expert_slots": 0}, "expert_slots=0: must be"),
    ],
)
def test_options_that_cannot_be_are_refused(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    plain = saved(tmp_path)
    with pytest.raises(ConfigError, match=words):
        streamed(plain, tmp_path, 2, **options)


def test_experts_that_would_be_cast_are_refused(tmp_path: Path) -> None:
    with quiet():
        tiny_model("olmoe").save_pretrained(tmp_path)
    words = r"layers\.0\.mlp\.experts\.gate_up_proj is made of .* by arithmetic \(cast\)"
    options: dict[str, Any] = {"experts": "demand", "expert_slots": 2, "dtype": torch.bfloat16}
    with quiet(), pytest.raises(ConfigError, match=words):
        stream(tmp_path, cls=tiny_class("olmoe"), device="cpu", **options)


class Own(nn.Module):
    """Experts of nobody's interface."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(3, 4, 4))


def test_a_block_with_experts_of_its_own_beside_others_is_refused(tmp_path: Path) -> None:
    plain = saved(tmp_path)
    plain.blocks[1] = nn.ModuleDict({"experts": Own()})
    write(tmp_path, plain.state_dict())
    words = r"blocks\.1\.experts\.up: Own does not go through transformers' ExpertsInterface"
    with pytest.raises(ConfigError, match=words):
        streamed(plain, tmp_path, 2)


def test_other_models_and_transformers_own_registry_stay_as_they_are(tmp_path: Path) -> None:
    before = {name: ALL_EXPERTS_FUNCTIONS[name] for name in ALL_EXPERTS_FUNCTIONS}
    plain = saved(tmp_path)
    net = Routed().to("meta")
    net.config, other = plain.config, Routed()
    for model in (net, other):
        for block in model.blocks:
            block.experts.config = plain.config  # type: ignore[union-attr]
    options: dict[str, Any] = {"experts": "demand", "expert_slots": 4, "device": "cpu"}
    stream(net, tmp_path, stacks=["blocks.{i}."], **options)
    assert plain.config._experts_implementation == "eager"
    own = {id(block.experts.config) for block in net.blocks}  # type: ignore[union-attr]
    assert len(own) == 1 and id(plain.config) not in own
    assert torch.equal(answer(net), answer(plain))
    assert all(ALL_EXPERTS_FUNCTIONS[name] is made for name, made in before.items())
    net.layer_streamer.close()


def test_a_resident_model_cannot_take_the_implementation(tmp_path: Path) -> None:
    plain = saved(tmp_path)
    streamed(plain, tmp_path, 2).layer_streamer.close()
    plain.config = copy(plain.config)
    plain.config._experts_implementation = "layer_streamer"
    for block in plain.blocks:
        block.experts.config = plain.config  # type: ignore[union-attr]
    with pytest.raises(StreamerError, match="is for models that"):
        answer(plain)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_amid_experts_the_next_forward_is_right(
    tmp_path: Path, error: type[BaseException]
) -> None:
    plain = saved(tmp_path)
    net = streamed(plain, tmp_path, 2)
    experts = net.blocks[1].experts
    own, calls = experts.act_fn, []

    def fail(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        if len(calls) == 3:
            raise error
        return own(x)  # type: ignore[no-any-return]

    del experts.act_fn
    experts.act_fn = fail
    with pytest.raises(error):
        answer(net)
    experts.act_fn = own
    assert torch.equal(answer(net), answer(plain))
    net.layer_streamer.close()


def test_passes_leave_nothing_behind(tmp_path: Path) -> None:
    net = streamed(saved(tmp_path), tmp_path, 2)
    counts = []
    for passes in (5, 40):
        for _ in range(passes):
            answer(net)
        gc.collect()
        counts.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert counts[0] == counts[1]
    net.layer_streamer.close()


def test_after_close_a_block_says_so(tmp_path: Path) -> None:
    net = streamed(saved(tmp_path), tmp_path, 2)
    net.layer_streamer.close()
    with pytest.raises(ClosedError):
        answer(net)


@pytest.mark.parametrize(("name", "method"), [("mixtral", "fp8"), ("gpt_oss", "mxfp4")])
def test_experts_that_are_unpacked_are_refused(tmp_path: Path, name: str, method: str) -> None:
    with quiet():
        folder = quantized_checkpoint(tmp_path, name, method)
    options: dict[str, Any] = {"experts": "demand", "expert_slots": 2, "device": "cpu"}
    with quiet(), pytest.raises(ConfigError, match=r"mlp\.experts\.\w+ is made of .* by arithm"):
        stream(folder, cls=tiny_class(name), **options)
