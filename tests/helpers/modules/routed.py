"""A module with experts of transformers' interface, told which experts its tokens go to."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from recipes import write
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from layer_streamer import stream

WIDTH, INNER, EXPERTS, BLOCKS = 32, 16, 5, 3
"""Rows are of 64 bytes and more: some kernels of a CPU compute otherwise where those lie askew."""
VARIANTS: dict[str, dict[str, bool]] = {
    "plain": {},
    "biases": {"has_bias": True},
    "transposed": {"is_transposed": True, "has_bias": True},
    "no gate": {"has_gate": False},
}


class _Experts(nn.Module):
    """With transformers' own loop over experts, as its classes have it."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    _apply_gate: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        up = "gate_up_proj" if config.has_gate else "up_proj"
        wide = INNER * (1 + config.has_gate)
        for leaf, rows, columns in ((up, wide, WIDTH), ("down_proj", WIDTH, INNER)):
            shape = (columns, rows) if config.is_transposed else (rows, columns)
            setattr(self, leaf, nn.Parameter(torch.rand(EXPERTS, *shape) - 0.5))
            if config.has_bias:
                setattr(self, f"{leaf}_bias", nn.Parameter(torch.rand(EXPERTS, rows) - 0.5))
        self.up = up
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for expert in range(EXPERTS):
            choice, token = torch.where(chosen.t() == expert)
            if not len(token):
                continue
            y = self._project(self.up, expert, x[token])
            y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
            y = self._project("down_proj", expert, y) * weights[token, choice, None]
            total.index_add_(0, token, y.to(total.dtype))
        return total

    def _project(self, leaf: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        weight = getattr(self, leaf)[expert]
        y = x @ weight if self.is_transposed else F.linear(x, weight)
        return y + getattr(self, f"{leaf}_bias")[expert] if self.has_bias else y


def _made(flags: dict[str, bool]) -> Any:
    return use_experts_implementation(type("Experts", (_Experts,), {}), **flags)


_CLASSES = {name: _made(flags) for name, flags in VARIANTS.items()}


class Block(nn.Module):
    """Calls its experts ``times``, and something that streams as ever."""

    def __init__(self, variant: str, config: Any, times: int) -> None:
        super().__init__()
        self.experts = _CLASSES[variant](config)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.times = times

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = x + self.experts(self.mix(x), chosen, weights)
        return x


class Routed(nn.Module):
    """Three blocks of five experts. ``forward(x, chosen, weights)``: (tokens, width); by block
    (tokens, choices) of experts; as many weights."""

    def __init__(self, variant: str = "plain", times: int = 1, calls: int = 1) -> None:
        """``calls``: of each block, one after the other."""
        super().__init__()
        flags = {"has_gate": True, "has_bias": False, "is_transposed": False} | VARIANTS[variant]
        self.config = SimpleNamespace(_experts_implementation="eager", **flags)
        self.blocks = nn.ModuleList(Block(variant, self.config, times) for _ in range(BLOCKS))
        self.calls = calls

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            for _ in range(self.calls):
                x = block(x, chosen[i], weights[i])
        return x


def saved(folder: Path, *args: Any, dtype: torch.dtype = torch.float32, **named: Any) -> Routed:
    """One with numbers, and its checkpoint."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Routed(*args, **named).to(dtype).eval().requires_grad_(False)
    write(folder, model.state_dict())
    return model


def streamed(model: Routed, folder: Path, slots: int, **options: Any) -> Any:
    """The same, streamed, with experts on demand."""
    net = deepcopy(model).to("meta")
    given = {"device": "cpu", "n_gpu": 1, "experts": "demand", "expert_slots": slots, **options}
    return stream(net, folder, stacks=["blocks.{i}."], **given)  # type: ignore[call-overload]


def inputs(tokens: int, choices: int, dtype: torch.dtype = torch.float32) -> Any:
    """x and weights for so many tokens."""
    made = torch.Generator().manual_seed(5)
    x = torch.rand(tokens, WIDTH, generator=made) - 0.5
    return x.to(dtype), torch.rand(BLOCKS, tokens, choices, generator=made).to(dtype)
