"""The result of one line, while its texts are being made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

from ..reading.families import family_of
from ..serving.api_error import ApiError
from ..serving.asking.tooling import texts_of
from ..serving.replying.answering import error_of
from ..serving.replying.replies import Envelope, usage
from ..serving.replying.writers import ChatWriter, PlainWriter, Writer
from ..serving.working.pieces import Account, Piece
from ..serving.working.served import Ready
from .asked import Asked

Json = dict[str, Any]


@dataclass(slots=True, eq=False)
class Reply:
    """Of a line whose texts are all in it when it ``ends``."""

    number: int
    """Of the line."""
    custom_id: str | None
    envelope: Envelope
    writer: Writer
    n: int
    """Texts that share a prompt."""
    open: set[int]
    """Texts that have not ended."""
    accounts: dict[int, Account] = field(default_factory=dict)
    error: Exception | None = None
    """What ended the first text that failed."""

    def put(self, index: int, piece: Piece) -> None:
        """All of one of its texts."""
        self.open.discard(index)
        if piece.account is not None:
            self.accounts[index] = piece.account
        if piece.error is not None:
            self.error = self.error or piece.error
            return
        try:
            self.writer.advance(index, piece)
        except Exception as error:  # of this text: the others go on
            self.error = self.error or error

    def record(self) -> Json:
        """The line of the results."""
        if self.error is not None:
            return refusal(self.number, self.custom_id, error_of(self.error))
        accounts = [self.accounts[index] for index in sorted(self.accounts)]
        body = self.envelope.document(self.writer.whole(), usage=usage(accounts, self.n))
        return _record(self.number, self.custom_id, 200, body)


def reply_to(
    asked: Asked, ready: Sequence[Ready], name: str, template: str | None
) -> tuple[Envelope, Writer]:
    """What the texts of an order become, for a model of that name and chat template."""
    if not asked.is_chat:
        plain = PlainWriter(asked.order.count, logprobs=asked.logprobs)
        return Envelope("text_completion", name), plain
    envelope = Envelope("chat.completion", name, family_of(template))
    texts = texts_of(asked.order, ready, template)
    return envelope, ChatWriter(envelope, texts, logprobs=asked.logprobs)


def refusal(number: int, custom_id: str | None, error: ApiError) -> Json:
    """The line of the results for a line that has no answer."""
    return _record(number, custom_id, error.status, error.body)


def _record(number: int, custom_id: str | None, status: int, body: Json) -> Json:
    return {
        "id": f"batch_req_{token_hex(12)}",
        "custom_id": custom_id,
        "line": number,
        "response": {
            "status_code": status, "request_id": f"req_{token_hex(12)}", "body": body,
        },
        "error": None,
    }  # fmt: skip
