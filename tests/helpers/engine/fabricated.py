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
TIED, UNTIED, LLAMA = "tiny-tied", "tiny-untied", "tiny-llama"


def add_tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of a few hundred kB, and a pool to match."""
    monkeypatch.setitem(SHAPES, TIED, SHAPES["qwen2.5-0.5b"] | TINY)
    monkeypatch.setitem(SHAPES, UNTIED, SHAPES["qwen2.5-7b"] | TINY)
    monkeypatch.setitem(SHAPES, LLAMA, SHAPES["llama3-8b"] | TINY)
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
