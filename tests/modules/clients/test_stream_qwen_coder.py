"""The real Qwen2.5-Coder-0.5B through stream(), where ``fetch_model.py`` has put it, against
transformers on the floats that its own reader of GGUF files finds. Nothing is fetched here."""

from __future__ import annotations

import faulthandler
from pathlib import Path
from typing import Any

import gguf_to_safetensors
import pytest
import torch
import transformers
from assets import one_torch_thread
from fetch_model import kept
from recipes import quiet

from layer_streamer import stream

pytestmark = pytest.mark.slow

NAME = "qwen2.5-coder-0.5b"
TOKENS = 32
PROMPTS = ["def quicksort(items):\n", "The three largest rivers of Europe are"]
QUESTION = "Write a Python function that counts the vowels of a text, with one example."


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a folder of transformers', in float32."""
    path = kept(NAME)
    if path is None:
        pytest.skip(f"not here: examples/make/fetch_model.py {NAME}")
    faulthandler.cancel_dump_traceback_later()  # passes over a real model take minutes
    folder = tmp_path_factory.mktemp("coder") / "twin"
    assert gguf_to_safetensors.main([str(path), str(folder), "--dtype", "float32"]) == 0
    return folder


def test_greedy_ids_are_those_of_transformers(twin: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(twin)
    encoded = [tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]
    messages = [{"role": "user", "content": QUESTION}]
    asked = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answers = []
    with one_torch_thread(), quiet():
        model: Any = stream(twin, device="cpu", read_mode="mapped")
        assert type(model) is transformers.Qwen2ForCausalLM
        for ids in (*encoded, asked["input_ids"]):
            answers.append(model.generate(ids, max_new_tokens=TOKENS, do_sample=False))
        ends = {*model.generation_config.eos_token_id}
        model.layer_streamer.close()
        path = kept(NAME)
        assert path is not None
        plain = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        for ids, found in zip((*encoded, asked["input_ids"]), answers, strict=True):
            # Each id is the likeliest after those before it: then the texts are one, by induction.
            with torch.no_grad():
                logits = plain(found[:, :-1], use_cache=False).logits[0]
            count = ids.shape[1]
            assert logits[count - 1 :].argmax(-1).tolist() == found[0, count:].tolist()
            assert found.shape[1] - count == TOKENS or int(found[0, -1]) in ends
