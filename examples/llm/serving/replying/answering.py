"""An accepted order to its reply: whole, or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field

from layer_streamer import StreamerError

from ...errors import EngineError, QueueFullError
from ..api_error import ApiError
from ..working.pieces import Account
from ..working.worker import Answer
from .replies import Envelope, Json, timings, usage
from .sse import DONE, PING, event
from .writers import Writer


def error_of(error: Exception) -> ApiError:
    """What ended a text, for its client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers={"retry-after": "1"})
    if isinstance(error, ValueError) and not isinstance(error, StreamerError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, StreamerError):
        return ApiError(500, str(error), code="engine")
    return ApiError(500, str(EngineError(type(error).__name__)), code="engine")


@dataclass(slots=True)
class Reply:
    """Of one order. Ask for one of both, once."""

    answer: Answer
    writer: Writer
    envelope: Envelope
    n: int = 1
    """Texts that share a prompt."""
    usage_asked: bool = False
    """A stream is to say at its end what was used."""
    accounts: dict[int, Account] = field(default_factory=dict)

    async def whole(self) -> Json:
        """The document; ApiError if one of its texts has failed."""
        async for _ in self._choices(None):
            pass
        accounts = self._in_order()
        more = {"usage": usage(accounts, self.n), "timings": timings(accounts)}
        return self.envelope.document(self.writer.whole(), **more)

    async def stream(self, ping_seconds: float) -> AsyncGenerator[bytes]:
        """Events, and pings where there is none for so long. If a text fails, the last event says
        why."""
        more: Json = {}
        if self.usage_asked:
            more["usage"] = None
        for opening in self.writer.opening():
            yield event(self.envelope.chunk([opening], **more))
        try:
            async for choice, last in self._choices(ping_seconds):
                if choice is None:
                    yield PING
                    continue
                told: Json = {}
                if last:
                    told["timings"] = timings(self._in_order())
                yield event(self.envelope.chunk([choice], **more, **told))
        except ApiError as error:
            yield event(error.body)
            return
        if self.usage_asked:
            yield event(self.envelope.chunk([], usage=usage(self._in_order(), self.n)))
        yield DONE

    async def _choices(self, seconds: float | None) -> AsyncIterator[tuple[Json | None, bool]]:
        """Choices as they come, and whether one is the last of all; None where there is none for so
        long. ApiError."""
        mailbox = self.answer.mailbox
        while not mailbox.ended:
            pieces = await mailbox.take(seconds)
            if not pieces:
                yield None, False
            choices: list[Json] = []
            errors = [piece.error for _, piece in pieces if piece.error is not None]
            for index, piece in pieces:
                if piece.account is not None:
                    self.accounts[index] = piece.account
                choices += self.writer.advance(index, piece)
            for number, choice in enumerate(choices, 1):
                yield choice, number == len(choices) and not (mailbox.open or errors)
            if errors:
                raise error_of(errors[0]) from errors[0]

    def _in_order(self) -> list[Account]:
        return [self.accounts[index] for index in sorted(self.accounts)]
