"""What a pass brings one text: the words between the engine and those who write replies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

LEAST_LOGPROB = -9999.0
"""In the place of minus infinity, which JSON does not have."""


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token, and how likely it was."""

    text: str
    bytes: Sequence[int]
    logprob: float
    top: Sequence[ScoredToken] = ()

    @property
    def finite(self) -> float:
        """Its logprob, as JSON can say it."""
        return self.logprob if math.isfinite(self.logprob) else LEAST_LOGPROB


@dataclass(frozen=True, slots=True)
class Account:
    """What a text has taken."""

    prompt_tokens: int
    new_tokens: int
    cached_tokens: int = 0
    """Of the prompt: those whose keys and values were there."""
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    passes: int = 0
    drafted: int = 0
    agreed: int = 0


@dataclass(slots=True)
class Piece:
    """What one pass brings one text, or several passes together."""

    text: str = ""
    tokens: int = 0
    scored: list[ScoredToken] = field(default_factory=list)
    finish_reason: str | None = None
    """"stop" or "length", with the last piece."""
    account: Account | None = None
    """With the last piece."""
    error: Exception | None = None
    """What ended the text, in the place of a reason."""

    @property
    def ends(self) -> bool:
        """True: nothing follows."""
        return self.finish_reason is not None or self.error is not None

    def join(self, later: Piece) -> None:
        """The two as one."""
        self.text += later.text
        self.tokens += later.tokens
        self.scored += later.scored
        self.finish_reason = later.finish_reason
        self.account, self.error = later.account, later.error
