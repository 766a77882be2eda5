"""Prompts of every kind to token ids: text, messages of a chat, ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from .tokenizer import has_chat_template, raw_ids

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = "str | Sequence[Message] | Sequence[int]"
"""Text to be continued, messages to be answered, or token ids."""


def is_batch(prompt: Any) -> bool:
    """True for a list of prompts, False for one. ValueError for what is neither."""
    if isinstance(prompt, str):
        return False
    if not isinstance(prompt, Sequence):
        raise ValueError(f"prompt of type {type(prompt).__name__}: must be text, messages or ids")
    if not prompt:
        return True
    return not isinstance(prompt[0], Mapping | int)


class PromptEncoder:
    """Encodes prompts for one model. ``notify`` hears once that there is no chat template."""

    def __init__(
        self,
        tokenizer: Callable[[], Any],
        vocab_size: int,
        notify: Callable[[str], object],
    ) -> None:
        """``tokenizer()`` is asked for only if a prompt needs it."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._notify, self._noted = notify, False

    def encode(self, prompt: Prompt, template_options: Mapping[str, Any]) -> list[int]:
        """Token ids; ValueError for an empty prompt or one that is malformed.

        ``template_options`` go to the chat template.
        """
        if isinstance(prompt, str):
            ids = raw_ids(self._tokenizer(), prompt)
        elif all(isinstance(item, int) for item in prompt):
            ids = [int(item) for item in prompt if isinstance(item, int)]
            for item in ids:
                if not 0 <= item < self._vocab_size:
                    raise ValueError(f"token id {item}: must be from 0 to {self._vocab_size - 1}")
        else:
            ids = self._encode_messages(prompt, template_options)
        if not ids:
            raise ValueError("the prompt is empty")
        return ids

    def _encode_messages(
        self, messages: Sequence[Any], template_options: Mapping[str, Any]
    ) -> list[int]:
        for message in messages:
            content = message.get("content") if isinstance(message, Mapping) else None
            if content is None or not isinstance(message.get("role"), str):
                raise ValueError(f"message {message!r}: must have a role and a content")
        tokenizer = self._tokenizer()
        if not has_chat_template(tokenizer):
            if not self._noted:
                self._notify("the model has no chat template: continuing the prompt as it is")
            self._noted = True
            return raw_ids(tokenizer, "\n".join(str(m["content"]) for m in messages))
        try:
            rendered = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=True,
                **template_options,
            )
        except Exception as error:  # a template is a program, and may raise what it likes
            raise ValueError(f"the chat template refuses the messages: {error}") from error
        # The template has written every special token itself.
        return [int(i) for i in tokenizer.encode(rendered, add_special_tokens=False)]
