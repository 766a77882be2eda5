"""Checkpoints of tiny shapes, made by the real script, for its tests."""

from __future__ import annotations

from pathlib import Path

import make_checkpoint
import pytest
import random_values
from shapes import SHAPES

TINY = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 500, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OSS = "tiny-gpt-oss"
TIED, UNTIED, LLAMA = "tiny-tied", "tiny-untied", "tiny-llama"
FEW = {"num_experts_per_tok": 2}
MIXTURES = {
    "tiny-mixtral": ("mixtral-8x7b", TINY | FEW | {"num_local_experts": 4}),
    "tiny-qwen3-moe": ("qwen3-30b-a3b", TINY | FEW | {
        "num_experts": 12, "moe_intermediate_size": 32, "head_dim": 24,
    }),
    "tiny-olmoe": ("olmoe", TINY | FEW | {"num_experts": 3, "bos_token_id": None}),
}  # fmt: skip
"""Tiny ones of mixtures of experts: the real shape, and what is changed in it."""


def add_tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of a few hundred kB, and a pool to match."""
    monkeypatch.setitem(SHAPES, TIED, SHAPES["qwen2.5-0.5b"] | TINY)
    monkeypatch.setitem(SHAPES, UNTIED, SHAPES["qwen2.5-7b"] | TINY)
    monkeypatch.setitem(SHAPES, LLAMA, SHAPES["llama3-8b"] | TINY)
    few = FEW | {"num_local_experts": 4, "head_dim": 24, "sliding_window": 4, "pad_token_id": 0}
    monkeypatch.setitem(SHAPES, OSS, SHAPES["gpt-oss-20b"] | TINY | few)
    for name, (shape, changes) in MIXTURES.items():
        monkeypatch.setitem(SHAPES, name, SHAPES[shape] | changes)
    monkeypatch.setattr(random_values, "MIN_POOL_ELEMENTS", 1 << 16)


def main(*arguments: object) -> int:
    """The script's exit code."""
    return make_checkpoint.main([str(argument) for argument in arguments])


def make(out: Path, *arguments: object, shape: str = UNTIED) -> Path:
    """The path of a checkpoint that must succeed."""
    assert main(out, "--shape", shape, *arguments) == 0
    return out


def contents(directory: Path) -> dict[str, bytes]:
    """Name and bytes of every file."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
