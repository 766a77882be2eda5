"""Text to token ids and back, for prompts that go in and text that streams out.

Works on any tokenizer of transformers; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT_TOKENS = 8
"""Tokens before the new ones that are decoded with them: a token's text depends on its left."""

MAX_HELD_TOKENS = 8
"""Tokens held back while they end in half a character, which has 4 bytes at most."""


def has_chat_template(tokenizer: Any) -> bool:
    return bool(tokenizer.chat_template)


def raw_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text to be continued, with what the tokenizer itself puts before one."""
    return [int(i) for i in tokenizer.encode(text)]


def chat_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a user's message in the model's chat template, up to where the answer begins."""
    messages = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The template has written every special token itself.
    return [int(i) for i in tokenizer.encode(rendered, add_special_tokens=False)]


class StreamingDetokenizer:
    """Turns ids into text one by one; holds back bytes that do not make a character yet."""

    def __init__(self, tokenizer: Any, context_ids: Sequence[int] = ()) -> None:
        """``context_ids`` come before the first id; their text is not repeated."""
        self._tokenizer = tokenizer
        self._context = list(context_ids)[-CONTEXT_TOKENS:]
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this id completes, perhaps none."""
        self._held.append(token_id)
        text = self._text()
        if text.endswith("\ufffd") and len(self._held) < MAX_HELD_TOKENS:
            return ""
        return self._release(text)

    def finish(self) -> str:
        """What is still held back, broken characters as U+FFFD."""
        return self._release(self._text()) if self._held else ""

    def _text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._held)[len(before) :]

    def _release(self, text: str) -> str:
        self._context = (self._context + self._held)[-CONTEXT_TOKENS:]
        self._held = []
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
