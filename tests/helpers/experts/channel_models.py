"""A tiny gpt-oss whose tokenizer has the marks of channels, and texts that are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from assets import tiny_checkpoint
from byte_model import byte_tokenizer
from tokenizers import AddedToken
from zoo import zoo_model

MARKS = ["<|return|>", "<|call|>", "<|end|>", "<|start|>", "<|channel|>", "<|constrain|>",
         "<|message|>"]  # fmt: skip
RETURN, CALL, END, START, CHANNEL, CONSTRAIN, MESSAGE = range(258, 265)
TO = 265
TEMPLATE = (
    "{{ '<|start|>system<|message|>' + reasoning_effort|default('medium') + '<|end|>' }}"
    "{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.thinking and m.content %}{{ raise_exception('both') }}{% endif %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{% endif %}<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}"
    "<|channel|>commentary json<|message|>{{ m.tool_calls[0].function.arguments|tojson }}<|call|>"
    "{% elif m.role == 'tool' %}<|start|>tool<|message|>{{ m.content }}<|end|>"
    "{% elif m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "<|end|>{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
THOUGHT = "<|channel|>analysis<|message|>Hm, é.<|end|><|start|>assistant"
ANSWER = f"{THOUGHT}<|channel|>final<|message|>Well, 😀.<|return|>"


class Script:
    """What a text is held to that is known, token by token."""

    acts = True

    def __init__(self, tokens: Sequence[int]) -> None:
        self.left = list(tokens)

    def mask(self, scores_V: torch.Tensor) -> torch.Tensor:
        if not self.left:
            return scores_V
        return torch.full_like(scores_V, -torch.inf).index_fill_(0, torch.tensor(self.left[0]), 0.0)

    def accept(self, token: int) -> None:
        del self.left[:1]

    def ends_at(self, count: int) -> bool:
        return False

    def forced(self) -> list[int]:
        return []


def channel_model(directory: Path, eos: Any = RETURN) -> Path:
    """The model, of which the config knows one mark that ends its turn."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(
        [AddedToken(mark, special=True, normalized=False) for mark in MARKS], special_tokens=True
    )
    tokenizer.add_tokens([AddedToken(" to=functions.", special=False, normalized=False)])
    tokenizer.chat_template = TEMPLATE
    changes = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "eos_token_id": eos}
    tiny_checkpoint(directory, zoo_model("gpt_oss", **changes))
    tokenizer.save_pretrained(directory)
    return directory
