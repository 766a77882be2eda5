"""What the engine calls some modules of a layer: those of a mixture of experts as Qwen does."""

from __future__ import annotations

import re

ROUTER, EXPERTS = "mlp.gate", "mlp.experts."
SHARED, SHARED_GATE = "mlp.shared_expert", "mlp.shared_expert_gate"
"""Modules of a layer, in the engine."""
SINKS = "self_attn.sinks"
"""Scores of query heads, in models that have them; the tensor itself, where it is no weight."""
EXPERT_NUMBER = re.compile(r"(\bexperts\.)\d+\.")
"""In the name of a tensor of one expert."""
MATRICES = ("gate_proj", "up_proj", "down_proj")
"""Of an expert, and of any other block."""


def expert_module(expert: int, matrix: str) -> str:
    """The module of one of an expert's matrices, in the engine."""
    return f"{EXPERTS}{expert}.{matrix}"


def shared_key(key: str) -> str:
    """A tensor of one expert by the name that it has in all, without the expert's number."""
    return EXPERT_NUMBER.sub(r"\1", key, count=1)


def expert_of(module: str) -> tuple[int, str] | None:
    """The expert that a module is of, and which of its matrices; None: it is of none."""
    if not module.startswith(EXPERTS):
        return None
    expert, _, matrix = module.removeprefix(EXPERTS).partition(".")
    return int(expert), matrix
