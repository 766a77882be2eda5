"""Text that ends at a stop string, and is held back while it could become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .tokenizer import StreamingDetokenizer


class StopStrings:
    """Passes text on up to the first stop string, which may come in several pieces."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        """ValueError for an empty stop string, which every text would contain."""
        if isinstance(stops, str) or any(not isinstance(stop, str) or not stop for stop in stops):
            raise ValueError(f"stop={stops!r}: must be strings of at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self._hidden: list[bool] = []
        """Of each character that is held back."""
        self.found = False

    def push(self, text: str, *, hidden: bool = False) -> str:
        """What of the text so far may be shown, beyond what was before. ``hidden``: the text is not
        to be shown, only to be found."""
        if self.found:
            return ""
        self._hidden.extend([hidden] * len(text))
        text, self._held = self._held + text, ""
        at = min((i for i in map(text.find, self._stops) if i >= 0), default=None)
        if at is not None:
            self.found = True
            return self._take(text[:at])
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        shown = len(text) - keep
        self._held = text[shown:]
        return self._take(text[:shown])

    def finish(self) -> str:
        """What was held back and became no stop string after all."""
        held, self._held = self._held, ""
        return self._take(held)

    def _take(self, text: str) -> str:
        """What of the first of the text that is held back may be shown."""
        hidden, self._hidden = self._hidden[: len(text)], self._hidden[len(text) :]
        if not any(hidden):
            return text
        return "".join(c for c, unseen in zip(text, hidden, strict=True) if not unseen)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0


class TextStream:
    """New tokens to text that may be shown: whole characters, nothing from a stop string on.

    Special tokens are not shown unless ``skip_special_tokens`` is False. A stop string may contain
    them in either case.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[int],
        stops: Sequence[str],
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._characters = StreamingDetokenizer(
            tokenizer, prompt_ids, skip_special_tokens=skip_special_tokens
        )
        self._stops = StopStrings(stops)
        self._skip = skip_special_tokens
        self._hidden = special_in(tokenizer, stops) if skip_special_tokens else {}

    @property
    def stopped(self) -> bool:
        """True once a stop string has come."""
        return self._stops.found

    def push(self, token_id: int, *, ends: bool = False) -> str:
        """The text that this token completes, perhaps none. ``ends``: the token is one that ends
        the text, which is shown only where special tokens are."""
        if ends and self._skip:
            return ""
        if token_id in self._hidden:
            text = self._stops.push(self._characters.finish())
            return text + self._stops.push(self._hidden[token_id], hidden=True)
        return self._stops.push(self._characters.push(token_id))

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        text = self._stops.push(self._characters.finish())
        return text + ("" if self.stopped else self._stops.finish())


def special_in(tokenizer: Any, stops: Sequence[str]) -> dict[int, str]:
    """The special tokens that stop strings contain, by their ids."""
    if not any(stops):
        return {}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {
        int(i): token.content
        for i, token in added.items()
        if token.special and any(token.content in stop for stop in stops)
    }
