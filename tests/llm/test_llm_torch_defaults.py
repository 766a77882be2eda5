"""torch.set_default_device and set_default_dtype change nothing: they are the program's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from assets import tiny_checkpoint
from gguf_models import write_gguf
from packed_models import write_packed
from quantizing import contents, run
from torch_defaults import other_defaults
from zoo import IDS, zoo_model

from layer_streamer.llm.engine import StreamingEngine

PROMPTS = [IDS[:40], IDS[3:20]]
SAFETENSORS = [
    ("qwen2-yarn", torch.float64),
    ("gemma3_text", torch.bfloat16),
    *(pytest.param(c, torch.float64, marks=pytest.mark.slow)
      for c in ("llama-llama3", "llama-dynamic")),
]  # fmt: skip
PACKED = [
    "ct4-asym-g16",
    "fp8-blocks",
    *(pytest.param(name, marks=pytest.mark.slow)
      for name in ("ct4-act-order", "int8-channel", "awq-g32", "gptq4-g32")),
]  # fmt: skip


DRAWN: dict[str, Any] = {
    "temperature": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {5: -100},
    "logprobs": True, "top_logprobs": 2,
}  # fmt: skip


def texts(path: Path, **options: Any) -> list[tuple[int, ...]]:
    """The likeliest ids of two prompts, and drawn ones."""
    changed = {"device": "cpu", "dtype": torch.float32, "max_length": 64} | options
    with StreamingEngine(path, **changed) as engine:
        found = []
        for sampling in ({"temperature": 0}, DRAWN):
            found += engine.generate(
                PROMPTS, max_new_tokens=5, seed=3, return_details=True, **sampling
            )
    return [completion.ids for completion in found]


@pytest.mark.parametrize(("case", "dtype"), SAFETENSORS)
def test_a_model_gives_the_same_text(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    path = tiny_checkpoint(tmp_path, zoo_model(case, max_position_embeddings=64))
    expected = texts(path)
    with other_defaults(dtype):
        assert texts(path) == expected


@pytest.mark.parametrize("packing", PACKED)
def test_a_packed_model_gives_the_same_text(tmp_path: Path, packing: str) -> None:
    path = write_packed(tmp_path / "packed", zoo_model("llama"), packing)
    expected = texts(path)
    with other_defaults():
        assert texts(path) == expected


def test_a_gguf_file_gives_the_same_text_and_the_same_quantized_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "a.gguf"
    write_gguf(path, zoo_model("llama"), tokenizer=True)
    expected = texts(path)
    assert run(path, tmp_path / "plain", "--bits", 4) == 0
    with other_defaults():
        assert texts(path, prefill_chunk=7) == expected
        assert run(path, tmp_path / "other", "--bits", 4) == 0
    assert contents(tmp_path / "other") == contents(tmp_path / "plain")
