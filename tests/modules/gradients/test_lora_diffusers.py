"""LoRA over streamed transformers of diffusers: gradients of the resident model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from recipes import quiet
from tiny_diffusers import DIFFUSERS, tiny_diffuser
from trainees import FEW_SLOTS, gradients

from layer_streamer import stream

ADDRESSES = 5e-6
"""What kernels differ by with the addresses of their operands, on a CPU, of the largest number."""
NAMES = [name for name in DIFFUSERS if name != "AutoencoderKL"]
"""Those that checkpoint block by block: an autoencoder has several of them in one."""


def adapted(model: Any) -> Any:
    torch.manual_seed(1)
    targets = ["to_q", "to_v", "to_k"]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    model.enable_gradient_checkpointing()
    return model.train()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if i else []) for i, n in enumerate(NAMES)]
)
def test_gradients_of_a_diffusion_transformer_are_those_of_the_resident_one(
    tmp_path: Path, name: str
) -> None:
    with quiet():
        made = tiny_diffuser(name)
        made.save_pretrained(tmp_path)  # type: ignore[operator]
        plain = type(made).from_pretrained(tmp_path).requires_grad_(False)  # type: ignore[attr-defined]
        model = stream(tmp_path, device="cpu", **FEW_SLOTS)
        models = [adapted(plain), adapted(model)]
        for _ in range(2):
            for one in models:
                one(**DIFFUSERS[name][1](), return_dict=False)[0].square().mean().backward()
            theirs, mine = map(gradients, models)
            for key, wanted in theirs.items():
                if wanted is not None:
                    atol = ADDRESSES * wanted.abs().max().item()
                    torch.testing.assert_close(mine[key], wanted, rtol=0, atol=atol)
    model.layer_streamer.close()
