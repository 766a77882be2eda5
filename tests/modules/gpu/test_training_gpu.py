"""LoRA over streamed weights on an NVIDIA GPU: the resident model's gradients, in few slots."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import loaded, quiet
from tiny_models import has, least, tiny_class, tiny_inputs, tiny_model
from trainees import adapted

from layer_streamer import StreamerError, stream

pytestmark = pytest.mark.gpu

KERNELS = 1e-4
"""What a GPU's kernels differ by with the addresses of their operands, relative to the largest."""
STEPS = 20


@pytest.fixture(autouse=True)
def nothing_stays_on_the_device() -> Iterator[None]:
    """What a test made there is given back before the next one looks at it."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


def pair(folder: Path, name: str, *, reentrant: bool) -> tuple[Any, Any]:
    """On the GPU, the adapted model resident, and streamed through one slot."""
    with quiet():
        tiny_model(name).save_pretrained(folder)
        plain = loaded(tiny_class(name), folder).requires_grad_(False).to("cuda")
        whole = stream(folder, cls=tiny_class(name), device="cuda", device_budget="1GiB")
        budget = least(whole, 0)
        whole.layer_streamer.close()
        model = stream(folder, cls=tiny_class(name), device="cuda", device_budget=budget, n_gpu=0)
    options = {"reentrant": reentrant, "lora_dropout": 0.0}
    return adapted(plain, name, **options), adapted(model, name, **options)


def step(model: Any, name: str) -> torch.Tensor:
    """Gradients of one batch; its loss."""
    model.zero_grad()
    torch.manual_seed(2)  # of what some types drop
    with quiet():
        out = model(**{key: value.to("cuda") for key, value in tiny_inputs(name).items()})
    loss: torch.Tensor = (out[0].float() ** 2).mean()
    loss.backward()
    return loss


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "mixtral", "bert", "t5", "vit", "qwen3_vl"])
def test_gradients_on_a_gpu_are_those_of_the_resident_model(
    tmp_path: Path, name: str, reentrant: bool
) -> None:
    if not has(name):
        pytest.skip("this transformers does not have it")
    plain, model = pair(tmp_path, name, reentrant=reentrant)
    tiers = {t for p in model.layer_streamer.plan.sequences.values() for t in p.tiers}
    assert "device" not in tiers
    for _ in range(3):
        losses = [step(one, name) for one in (plain, model)]
        torch.testing.assert_close(*losses, rtol=KERNELS, atol=0)
        for (key, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            if theirs.requires_grad and theirs.grad is not None:
                assert mine.grad is not None, key
                most = theirs.grad.abs().max().item()
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=KERNELS * most)
    model.layer_streamer.close()


def test_steps_on_a_gpu_take_no_more_memory_each_and_an_error_ends_with_its_step(
    tmp_path: Path,
) -> None:
    _, model = pair(tmp_path, "llama", reentrant=False)
    step(model, "llama")
    before = torch.cuda.memory_allocated()
    for _ in range(STEPS):
        step(model, "llama")
    assert torch.cuda.memory_allocated() <= before
    model.base_model.model.gradient_checkpointing_disable()
    with pytest.raises(StreamerError, match="switch gradient checkpointing on"):
        step(model, "llama")
    model.base_model.model.gradient_checkpointing_enable()
    step(model, "llama")
    model.layer_streamer.close()
