"""Real Qwen2.5-Coder models in Q4_K_M, where ``fetch_model.py`` has put them: against transformers
on the floats that its own reader of GGUF files finds in them. Nothing is fetched here."""

import faulthandler
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from assets import one_torch_thread
from fetch_model import kept
from transformers import AutoModelForCausalLM, AutoTokenizer

from layer_streamer.llm.engine import StreamingEngine

pytestmark = pytest.mark.slow

TOKENS = 64
TEXTS = [
    "def quicksort(items):\n",
    "The three largest rivers of Europe are",
    "import json\n\n\ndef read_lines(path):",
]
QUESTIONS = [
    "Write a Python function that counts the vowels of a text, with one example.",
    "\u00bfPor qu\u00e9 el cielo es azul? \u4e2d\u6587\u4e5f\u53ef\u4ee5\u3002",
]
PROMPTS: list[Any] = [*TEXTS, *([{"role": "user", "content": text}] for text in QUESTIONS)]
MODELS = ("qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")


@pytest.fixture(scope="module", params=MODELS)
def greedy(request) -> Iterator[tuple[Any, list[tuple[list[int], list[int]]]]]:
    """transformers' model, and the engine's ids of each prompt and its answer, all in one batch."""
    path = kept(request.param)
    if path is None:
        pytest.skip(f"not here: examples/make/fetch_model.py {request.param}")
    faulthandler.cancel_dump_traceback_later()  # 64 passes over a real model take minutes
    with (
        one_torch_thread(),
        StreamingEngine(path, device="cpu", max_length=192, kv_tokens=960) as engine,
    ):
        details = {"max_new_tokens": TOKENS, "temperature": 0, "return_details": True}
        done = engine.generate(PROMPTS, **details)
        ids = [engine.encode(prompt) for prompt in PROMPTS]
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    yield model, [(prompt, list(answer.ids)) for prompt, answer in zip(ids, done, strict=True)]


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_greedy_ids_are_those_of_transformers(greedy, number):
    model, batch = greedy
    prompt, answer = batch[number]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0]
    # Each id is the likeliest after those before it: then the greedy texts are one, by induction.
    likeliest = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert answer == likeliest
    assert len(answer) == TOKENS or answer[-1] in engine_ends(model)


def engine_ends(model: Any) -> set[int]:
    """Ids that end a text."""
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends])


@pytest.mark.parametrize("name", MODELS)
def test_the_chat_templates_ids_are_those_of_transformers(name):
    path = kept(name)
    if path is None:
        pytest.skip(f"not here: examples/make/fetch_model.py {name}")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    turns = [
        {"role": "system", "content": "Answer in one line."},
        {"role": "user", "content": QUESTIONS[1]},
        {"role": "assistant", "content": "  Rayleigh \U0001f30a\n"},
        {"role": "user", "content": "And red?"},
    ]
    with StreamingEngine(path, device="cpu", max_length=128) as engine:
        for messages in (turns, turns[1:2]):
            expected = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
            assert engine.encode(messages) == expected
