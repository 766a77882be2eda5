"""Prompts of every kind to token ids: text, messages of a chat, ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

from .messages import checked_messages, takes_parts, text_of
from .tokenizer import has_chat_template, raw_ids, rendered_ids

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
    return not isinstance(prompt[0], Mapping | Integral)


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
        self._takes_parts: bool | None = None

    def encode(self, prompt: Prompt, template_options: Mapping[str, Any]) -> list[int]:
        """Token ids; ValueError, in one line, for a prompt that is empty, malformed or not text,
        or that has an id which the model lacks.

        ``template_options`` go to the chat template.
        """
        if isinstance(prompt, str):
            ids = raw_ids(self._tokenizer(), prompt)
        elif all(isinstance(item, Integral) for item in prompt):
            ids = [int(item) for item in prompt if isinstance(item, Integral)]
        else:
            ids = self._encode_messages(prompt, template_options)
        if not ids:
            raise ValueError("the prompt is empty")
        for item in ids:
            if not 0 <= item < self._vocab_size:
                raise ValueError(self._lacking(item, prompt))
        return ids

    def _lacking(self, item: int, prompt: Prompt) -> str:
        what = f"token id {item}: must be from 0 to {self._vocab_size - 1}"
        if not isinstance(prompt, str) and isinstance(prompt[0], Integral):
            return what
        token = self._tokenizer().decode(
            [item], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return f"{what} (it is {token!r}: the tokenizer has tokens that the model lacks)"

    def _encode_messages(
        self, messages: Sequence[Any], template_options: Mapping[str, Any]
    ) -> list[int]:
        messages = checked_messages(messages)
        tokenizer = self._tokenizer()
        if not has_chat_template(tokenizer):
            if not self._noted:
                self._notify("the model has no chat template: continuing the prompt as it is")
            self._noted = True
            return raw_ids(tokenizer, "\n".join(text_of(message) for message in messages))
        if self._takes_parts is None:
            self._takes_parts = takes_parts(tokenizer)
        if not self._takes_parts:
            messages = [
                message | {"content": text_of(message)}
                if isinstance(message.get("content"), list)
                else message
                for message in messages
            ]
        options = {"add_generation_prompt": not template_options.get("continue_final_message")}
        try:
            rendered = tokenizer.apply_chat_template(
                messages, tokenize=False, **(options | dict(template_options))
            )
        except Exception as error:  # a template is a program, and may raise what it likes
            reason = " ".join(str(error).split())
            raise ValueError(f"the chat template refuses the messages: {reason}") from error
        return rendered_ids(tokenizer, rendered)
