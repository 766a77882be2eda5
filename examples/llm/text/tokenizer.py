"""Text to token ids and back, for prompts that go in and text that streams out.

Works on any tokenizer of transformers; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import one_line_errors

CONTEXT_TOKENS = 8
"""Tokens before the new ones, at least, that are decoded with them: a token's text depends on its
left."""
MAX_HELD_TOKENS = 8
"""Tokens in a row that may add nothing to the text before what they are is shown, broken or not: a
character has 4 bytes at most."""
BROKEN = "\ufffd"
"""What decoders write for bytes that make no character, or none yet."""


def has_chat_template(tokenizer: Any) -> bool:
    return bool(tokenizer.chat_template)


def template_of(tokenizer: Any) -> str | None:
    """The chat template's text; of several the one for tools, whose marks are looked for."""
    found = tokenizer.chat_template
    if isinstance(found, Mapping):
        found = found.get("tool_use") or found.get("default")
    return found if isinstance(found, str) else None


def shown_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids, special tokens with it; ValueError, in one line, if it has none."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    with one_line_errors("the tokenizer cannot decode them", ValueError):
        return str(tokenizer.decode(list(ids), **options))


def raw_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text to be continued, with what the tokenizer itself puts before one."""
    return _encode(tokenizer, text)


def rendered_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of what a chat template has written, which has put every special token there itself."""
    return _encode(tokenizer, text, add_special_tokens=False)


def chat_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a user's message in the model's chat template, up to where the answer begins."""
    messages = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return rendered_ids(tokenizer, rendered)


def _encode(tokenizer: Any, text: str, **options: bool) -> list[int]:
    """ValueError, in one line, for a text that has no ids."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"character {error.start + 1} of the prompt is U+{code:04X}, half of a pair: "
            "an emoji was cut in two, or the text was not UTF-8"
        ) from error
    try:
        return [int(i) for i in tokenizer.encode(text, **options)]
    except Exception as error:  # tokenizers raises nothing narrower
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"the tokenizer cannot encode the prompt ({reason})") from error


class StreamingDetokenizer:
    """Turns ids into text one by one; holds back bytes that do not make a character yet.

    All pieces together are what decoding all ids at once gives. Only where bytes make no character
    can they differ: some decoders then give up the characters beside those bytes as well, which are
    shown here by then.
    """

    def __init__(
        self, tokenizer: Any, context_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        """``context_ids`` come before the first id; their text is not repeated."""
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._context, self._held = self._cut(list(context_ids))
        self._groups = [self._context]
        self._before = self._decode(self._context)
        self._shown = self._text() if self._held else ""
        self._stuck = 0

    def push(self, token_id: int) -> str:
        """The text that this id completes, perhaps none."""
        self._held.append(token_id)
        text = self._text()
        if not text.endswith(BROKEN):
            return self._release(len(self._held))
        if self._stuck + 1 >= MAX_HELD_TOKENS:
            # The cut that leaves the least broken is not inside a character that is still coming.
            ends = range(len(self._held), len(self._held) - 4, -1)
            return self._release(min(ends, key=lambda end: len(self._text(end))))
        text = text.rstrip(BROKEN)
        new = text.removeprefix(self._shown) if text.startswith(self._shown) else ""
        self._shown += new
        self._stuck = 0 if new else self._stuck + 1
        return new

    def finish(self) -> str:
        """What is still held back, broken characters as U+FFFD."""
        return self._release(len(self._held))

    def _cut(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """The end of a prompt that the new text depends on, and the ids of a character that it
        leaves off in: neither begins inside a character."""
        count = CONTEXT_TOKENS
        while count < len(ids) and not self._decode(ids[-count:]):
            count *= 2  # special tokens, without a text
        last = max(0, len(ids) - count)
        cuts = [
            (start, end)
            for end in range(len(ids), max(-1, len(ids) - 4), -1)
            for start in range(min(last, end), max(-1, last - 4), -1)
        ]
        start, end = min(cuts, key=lambda cut: self._decode(ids[slice(*cut)]).count(BROKEN))
        return ids[start:end], ids[end:]

    def _text(self, end: int | None = None) -> str:
        """The text of what is held back, or of as many ids of it."""
        held = self._held[:end]
        whole = self._decode([*self._context, *held])
        if whole.startswith(self._before):
            return whole[len(self._before) :]
        # Bytes that make no character (yet), after others that do: a decoder of runs of bytes gives
        # up all of the run. The bytes stand at the start, so that nothing of their left is missed.
        return self._decode(held)

    def _release(self, count: int) -> str:
        """What of the text of so many held ids is not shown yet; they become context."""
        text = self._text(count)
        released, self._held = self._held[:count], self._held[count:]
        if text or not self._before:  # what has no text is no context, either
            self._groups.append(released)
        # Whole groups: none of them begins inside a character. Nothing goes before there is a text:
        # the first one depends on what has none (a space that begins the text, say).
        trims = bool(text or self._before)
        while trims and len(self._groups) > 1 and sum(map(len, self._groups[1:])) >= CONTEXT_TOKENS:
            del self._groups[0]
        self._context = [i for group in self._groups for i in group]
        self._before = self._decode(self._context)
        shown, self._shown, self._stuck = self._shown, "", 0
        return text.removeprefix(shown)

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False
            )
        )
