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
        self.found = False

    def push(self, text: str) -> str:
        """What of the text so far may be shown, beyond what was before."""
        if self.found:
            return ""
        text, self._held = self._held + text, ""
        at = min((i for i in map(text.find, self._stops) if i >= 0), default=None)
        if at is not None:
            self.found = True
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        shown = len(text) - keep
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What was held back and became no stop string after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0


class TextStream:
    """New tokens to text that may be shown: whole characters, nothing from a stop string on."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stops: Sequence[str]) -> None:
        self._characters = StreamingDetokenizer(tokenizer, prompt_ids)
        self._stops = StopStrings(stops)

    @property
    def stopped(self) -> bool:
        """True once a stop string has come."""
        return self._stops.found

    def push(self, token_id: int) -> str:
        """The text that this token completes, perhaps none."""
        return self._stops.push(self._characters.push(token_id))

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        text = self._stops.push(self._characters.finish())
        return text + ("" if self.stopped else self._stops.finish())
