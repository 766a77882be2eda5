"""Gradients through a pass: those of the plain model, or an error in backward; never others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_safetensors
from hypothesis import strategies as st
from routes import NUM_LAYERS
from support import open_checkpoint
from tried import tried

from layer_streamer import LayerStreamer

NORM, Q = "input_layernorm.weight", "self_attn.q_proj.weight"
HIDDEN = 40
REFUSED = "modified by an inplace operation"


ROUNDING = {"rtol": 1e-3, "atol": 1e-3}
"""A GPU rounds its products otherwise than the CPU that says what is right; another layer's weights
change a gradient by far more."""


def finish(device: Any) -> None:
    """Have a late device do its work: what the tests compute with is ordinary memory."""
    for one in device if isinstance(device, list) else [device]:
        if hasattr(one, "drain"):
            one.drain()


def stays(streamer: LayerStreamer, device: Any, layer_idx: int) -> bool:
    """Whether a layer's tensors are the same memory in every pass."""
    views_files = device is None and streamer.plan.read_mode == "mapped"
    return streamer.plan.tiers[layer_idx] == "device" or views_files


def saves_weights(x: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A layer whose backward needs its weights again."""
    return torch.tanh(x @ weights[Q].T) * weights[NORM]


def plain_gradient(tensors: Mapping[str, torch.Tensor], layer_fn: Any) -> torch.Tensor:
    """The gradient at ones, by the tensors themselves."""
    x = torch.ones(2, HIDDEN, requires_grad=True)
    state = x
    for i in range(NUM_LAYERS):
        head = f"model.layers.{i}."
        own = {k.removeprefix(head): t for k, t in tensors.items() if k.startswith(head)}
        state = layer_fn(state, own)
    state.sum().backward()
    assert x.grad is not None
    return x.grad


def forward(streamer: LayerStreamer, device: Any, layer_fn: Any) -> tuple[Any, Any]:
    """x, at ones, and the result of a pass."""

    def step(state: torch.Tensor, weights: Any, layer_idx: int) -> torch.Tensor:
        finish(device)
        return layer_fn(state, weights)

    x = torch.ones(2, HIDDEN, device=streamer.device, requires_grad=True)
    return x, streamer.run_pass(x, step)


def test_a_backward_that_needs_weights_which_have_gone_raises(
    streamer: LayerStreamer, device: Any, tensors: Any
) -> None:
    for _ in range(3):
        x, y = forward(streamer, device, saves_weights)
        if all(stays(streamer, device, i) for i in range(NUM_LAYERS)):
            y.sum().backward()
            torch.testing.assert_close(
                x.grad.cpu(), plain_gradient(tensors, saves_weights), **ROUNDING
            )
        else:
            with pytest.raises(RuntimeError, match=REFUSED):
                y.sum().backward()


def test_a_backward_that_needs_no_weights_is_right(
    streamer: LayerStreamer, device: Any, tensors: Any
) -> None:
    def saves_copies(x: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.tanh(x @ weights[Q].clone().T) + weights[NORM]

    for _ in range(2):
        x, y = forward(streamer, device, saves_copies)
        y.sum().backward()
        torch.testing.assert_close(x.grad.cpu(), plain_gradient(tensors, saves_copies), **ROUNDING)


def test_a_backward_within_the_hand_out_is_right_for_the_weights_as_well(
    streamer: LayerStreamer, device: Any, tensors: Any
) -> None:
    for layer_idx, weights in streamer.sweep():
        finish(device)
        x = torch.ones(2, HIDDEN, device=weights[Q].device, requires_grad=True)
        wanted = weights[NORM]
        assert not wanted.requires_grad and wanted.grad is None
        saves_weights(x, {**weights, NORM: wanted.requires_grad_()}).sum().backward()
        head = f"model.layers.{layer_idx}."
        own = {key: tensors[head + key].clone().requires_grad_() for key in (NORM, Q)}
        plain = torch.ones(2, HIDDEN, requires_grad=True)
        saves_weights(plain, own).sum().backward()
        torch.testing.assert_close(x.grad.cpu(), plain.grad, **ROUNDING)  # type: ignore[union-attr]
        torch.testing.assert_close(wanted.grad.cpu(), own[NORM].grad, **ROUNDING)  # type: ignore[union-attr]


def test_what_a_sweep_that_is_left_early_has_saved_is_refused_too(
    streamer: LayerStreamer, device: Any
) -> None:
    x = torch.ones(2, HIDDEN, device=streamer.device, requires_grad=True)
    for _, weights in streamer.sweep():
        finish(device)
        y = saves_weights(x, weights)
        break
    streamer.run_pass(None, lambda x, w, i: x)
    if stays(streamer, device, 0):
        y.sum().backward()
        return
    with pytest.raises(RuntimeError, match=REFUSED):
        y.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_passes_without_gradients_cast_and_all_leave_later_ones_right(
    tmp_path: Path, tensors: Any, mode: Any
) -> None:
    def layer_fn(x: Any, weights: Any, layer_idx: int) -> torch.Tensor:
        return saves_weights(x, weights)

    with open_checkpoint(None, tmp_path, n_gpu=1, dtype=torch.bfloat16) as streamer:
        with mode():
            for _ in range(2):
                streamer.run_pass(torch.ones(2, HIDDEN, dtype=torch.bfloat16), layer_fn)
        x = torch.ones(2, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        y = streamer.run_pass(x, layer_fn)
        with pytest.raises(RuntimeError, match=REFUSED):
            y.sum().backward()


LAYERS = {
    "needs the weights": lambda x, w: torch.tanh(x @ w["w"]),
    "needs the bias": lambda x, w: torch.sin(x) * w["b"],
    "needs none": lambda x, w: torch.sin(x) + w["b"],
    "needs copies": lambda x, w: torch.sin(x) * w["b"].clone() + x @ w["w"].clone(),
    "needs a view": lambda x, w: x * w["w"].view(-1)[: x.shape[-1]],
    "needs a detached one": lambda x, w: x * w["b"].detach(),
    "needs all": lambda x, w: torch.nn.functional.linear(x, w["w"], w["b"]).sigmoid() * w["b"],
}
"""Layers by what their backward needs; x has 6 columns."""
OPTIONS = st.fixed_dictionaries({
    "n_gpu": st.integers(0, 3),
    "n_cpu": st.integers(0, 2),
    "n_cpu_pinned": st.integers(0, 2),
    "read_mode": st.sampled_from(["buffered", "direct", "mapped", "auto"]),
    "device_budget": st.sampled_from([None, "40KiB", "80KiB", "120KiB", "1GiB"]),
    "dtype": st.sampled_from([None, torch.float32]),
    "device": st.sampled_from(["cpu", ["cpu", "cpu"]]),
})  # fmt: skip


@tried(
    30,
    60,
    options=OPTIONS,
    kinds=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=7),
    stored=st.sampled_from([torch.float32, torch.bfloat16]),
    padding=st.integers(0, 5),
    passes=st.integers(1, 3),
    close_first=st.booleans(),
)
def test_a_gradient_is_that_of_the_plain_model_or_an_error(  # noqa: PLR0917 - what is drawn
    tmp_path_factory: pytest.TempPathFactory,
    options: dict[str, Any],
    kinds: list[str],
    stored: torch.dtype,
    padding: int,
    passes: int,
    close_first: bool,
) -> None:
    path, generator = tmp_path_factory.mktemp("m"), torch.Generator().manual_seed(padding)
    shapes = {"w": (6, 6), "b": (6,)}
    tensors = {
        f"model.layers.{i}.{key}": torch.randn(shape, generator=generator).to(stored)
        for i in range(len(kinds))
        for key, shape in shapes.items()
    }
    write_safetensors(path / "model.safetensors", tensors, padding=padding)

    def layer_fn(state: torch.Tensor, weights: Any, i: int) -> torch.Tensor:
        return LAYERS[kinds[i]](state, {key: weights[key].to(torch.float32) for key in shapes})

    plain = torch.ones(2, 6, requires_grad=True)
    expected = plain
    for i in range(len(kinds)):
        own = {key: tensors[f"model.layers.{i}.{key}"] for key in shapes}
        expected = layer_fn(expected, own, i)
    expected.sum().backward()
    try:
        streamer = LayerStreamer.from_checkpoint(path, **options)
    except ValueError:
        return  # a budget below the slots
    with streamer:
        made = []
        for _ in range(passes):
            x = torch.ones(2, 6, requires_grad=True)
            made.append((x, streamer.run_pass(x, layer_fn)))
        if close_first:
            streamer.close()
        for x, y in made:
            assert torch.equal(y, expected)
            try:
                y.sum().backward()
            except RuntimeError as error:
                assert REFUSED in str(error)
            else:
                assert torch.equal(x.grad, plain.grad)  # type: ignore[arg-type]
