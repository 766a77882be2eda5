"""What single tokens stand for: their text, and their bytes where these make no character."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from ..text.tokenizer import BROKEN
from .working.pieces import ScoredToken

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@cache
def _alphabet() -> dict[str, int]:
    """The characters that stand for bytes in vocabularies of bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(256 + number): byte for number, byte in enumerate(hidden)
    }


class TokenTexts:
    """Remembers what it has been asked. Thread rules: one thread at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def scored(self, token: int, logprob: float, *others: ScoredToken) -> ScoredToken:
        """A token with its logprob, and ``others`` that were as near."""
        if token not in self._known:
            self._known[token] = self._look_up(token)
        text, raw = self._known[token]
        return ScoredToken(text, list(raw), logprob, others)

    def _look_up(self, token: int) -> tuple[str, bytes]:
        # After itself: some decoders leave out the space that a text begins with.
        alone, twice = self._decode(token), self._decode(token, token)
        text = twice[len(alone) :] if twice.startswith(alone) else alone
        if BROKEN not in text:
            return text, text.encode("utf-8", "replace")
        spelt = str(self._tokenizer.convert_ids_to_tokens(token))
        if (byte := _BYTE.fullmatch(spelt)) is not None:
            return text, bytes([int(byte[1], 16)])
        alphabet = _alphabet()
        if all(character in alphabet for character in spelt):
            return text, bytes(alphabet[character] for character in spelt)
        return text, text.encode("utf-8", "replace")

    def _decode(self, *ids: int) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(list(ids), **options))
