"""Pairs of tiny models with the same LoRA adapters, one resident and one that streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from recipes import loaded, quiet
from tiny_models import has, tiny_class, tiny_inputs, tiny_model

from layer_streamer import stream

FEW_SLOTS = {"n_gpu": 0, "n_cpu_pinned": 0, "n_cpu": 0}
"""One slot: every pass brings all layers but one."""
TARGETS = {
    "mixtral": ["q_proj", "v_proj"],
    "qwen3_moe": ["q_proj", "o_proj"],
    "granitemoe": ["q_proj", "o_proj"],
    "deepseek_v3": ["o_proj", "kv_b_proj"],
    "qwen3_next": ["q_proj", "o_proj"],
    "mamba2": ["in_proj"],
    "falcon_h1": ["in_proj", "q_proj"],
}
"""By type, where peft's "all-linear" is not what there is to adapt."""


def adapted(model: Any, name: str = "", *, reentrant: bool = False, **options: Any) -> Any:
    """With random adapters, in training, its activations checkpointed."""
    torch.manual_seed(1)
    asked = {"r": 2, "lora_dropout": 0.1, "init_lora_weights": False, **options}
    config = peft.LoraConfig(**{"target_modules": TARGETS.get(name, "all-linear"), **asked})
    with quiet():
        model = peft.get_peft_model(model, config).train()
        if reentrant:
            model.enable_input_require_grads()
        kwargs = {"use_reentrant": reentrant}
        model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    return model


def streamed_with(folder: Path, name: str, **options: Any) -> Any:
    """The saved model, streamed."""
    with quiet():
        return stream(folder, cls=tiny_class(name), **{"device": "cpu", **FEW_SLOTS, **options})


@contextmanager
def trainees(
    folder: Path, name: str, *, reentrant: bool = False, lora: Any = None, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """The resident and the streamed model of a type, adapted."""
    with quiet():
        if not (folder / "config.json").exists():
            tiny_model(name).save_pretrained(folder)
        cast = {"dtype": options["dtype"]} if "dtype" in options else {}
        plain = loaded(tiny_class(name), folder, **cast).requires_grad_(False)
    model = streamed_with(folder, name, **options)
    try:
        made = [adapted(m, name, reentrant=reentrant, **(lora or {})) for m in (plain, model)]
        yield made[0], made[1]
    finally:
        model.layer_streamer.close()


def loss_of(model: Any, name: str, seed: int) -> torch.Tensor:
    """Of one batch, with dropout of this seed."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # what is masked of sounds
    with quiet():
        out = model(**tiny_inputs(name))
    found = [value for value in out.values() if torch.is_tensor(value) and value.requires_grad]
    loss: torch.Tensor = (found[0].float() ** 2).mean()
    return loss


def gradients(model: Any) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether names and bits are the same; at least one is there."""

    def equal(a: Any, b: Any) -> bool:
        return a is b if a is None or b is None else torch.equal(a, b)

    some = any(value is not None for value in one.values())
    return some and one.keys() == other.keys() and all(equal(one[n], other[n]) for n in one)


def train(model: Any, name: str, steps: int = 5, micro: int = 2) -> list[float]:
    """Steps of AdamW, of so many batches each; the losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for step in range(steps):
        for part in range(micro):
            loss = loss_of(model, name, step * micro + part)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def adapters(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


__all__ = [
    "FEW_SLOTS", "adapted", "adapters", "gradients", "has", "loss_of", "same", "streamed_with",
    "train", "trainees",
]  # fmt: skip
