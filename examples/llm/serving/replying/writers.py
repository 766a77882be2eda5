"""What passes bring, as the choices of chunks and of whole replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ...reading.choice_text import ChoiceText
from ..working.pieces import Piece, ScoredToken
from .replies import Envelope, Json, chat_logprobs, delta_message, message, plain_logprobs


class Writer(Protocol):
    """Of one reply."""

    def opening(self) -> list[Json]:
        """What a stream begins with: a choice a text, or nothing."""
        ...

    def advance(self, index: int, piece: Piece) -> list[Json]:
        """The choices that a piece makes, each for a chunk of its own; perhaps none."""
        ...

    def whole(self) -> list[Json]:
        """All choices, when all have ended."""
        ...


class ChatWriter:
    """For /v1/chat/completions."""

    def __init__(self, envelope: Envelope, texts: Sequence[ChoiceText], *, logprobs: bool) -> None:
        self._envelope, self._texts, self._logprobs = envelope, texts, logprobs
        self._scored: list[list[ScoredToken]] = [[] for _ in texts]
        self._reasons: list[str | None] = [None for _ in texts]

    def opening(self) -> list[Json]:
        """Who speaks: so that a client sees life before the prompt has been read."""
        return [
            self._choice(index, {"role": "assistant", "content": ""})
            for index in range(len(self._texts))
        ]

    def advance(self, index: int, piece: Piece) -> list[Json]:
        """One choice, and at the end another with the reason."""
        text, found = self._texts[index], []
        parts = [text.push(piece.text)]
        if piece.finish_reason is not None:
            parts.append(text.finish())
        before = len(text.whole.calls) - sum(len(part.calls) for part in parts)
        self._scored[index] += piece.scored
        scored = piece.scored if self._logprobs else []
        for part in parts:
            if part or scored:
                shape = delta_message(self._envelope, part, before)
                found.append(self._choice(index, shape, scored=scored))
                before, scored = before + len(part.calls), []
        if piece.finish_reason is not None:
            self._reasons[index] = text.reason(piece.finish_reason)
            found.append(self._choice(index, {}, reason=self._reasons[index]))
        return found

    def whole(self) -> list[Json]:
        """Of each text its message."""
        return [
            {
                "index": index,
                "message": message(self._envelope, text.whole),
                "logprobs": chat_logprobs(self._scored[index]) if self._logprobs else None,
                "finish_reason": self._reasons[index],
            }
            for index, text in enumerate(self._texts)
        ]

    def _choice(
        self,
        index: int,
        delta: Json,
        *,
        scored: Sequence[ScoredToken] = (),
        reason: str | None = None,
    ) -> Json:
        logprobs = chat_logprobs(scored) if scored else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


class PlainWriter:
    """For /v1/completions."""

    def __init__(self, count: int, *, logprobs: bool) -> None:
        self._logprobs = logprobs
        self._all = [Piece() for _ in range(count)]

    def opening(self) -> list[Json]:
        """Nothing."""
        return []

    def advance(self, index: int, piece: Piece) -> list[Json]:
        """One choice."""
        known = self._all[index]
        if not (piece.text or piece.ends or (self._logprobs and piece.scored)):
            known.join(piece)
            return []
        offset = sum(len(token.text) for token in known.scored)
        choice = self._choice(index, piece, offset)
        known.join(piece)
        return [choice]

    def whole(self) -> list[Json]:
        """Of each text all of it."""
        return [self._choice(index, piece, 0) for index, piece in enumerate(self._all)]

    def _choice(self, index: int, piece: Piece, offset: int) -> Json:
        return {
            "index": index,
            "text": piece.text,
            "logprobs": plain_logprobs(piece.scored, offset) if self._logprobs else None,
            "finish_reason": piece.finish_reason,
        }
