"""How much one request, and all of them together, may ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .api_error import ApiError, refused
from .asking.order import Order


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Of one server."""

    max_body: int = 8 << 20
    """Bytes."""
    max_depth: int = 64
    """Of brackets in a body."""
    max_n: int = 16
    """Texts of one prompt."""
    max_texts: int = 64
    """Of one request: its prompts times n."""
    max_inputs: int = 2048
    """Of one request for embeddings, as OpenAI has it."""
    max_prompt: int = 1 << 20
    """Characters of one prompt, or tokens: more than any context that is granted is a waste of the
    tokenizer's time."""
    max_waiting: int = 64
    """Texts that wait for a row."""
    max_connections: int = 512
    """Open at a time."""
    body_seconds: float = 60.0
    """Within which a body has to come."""
    send_seconds: float = 120.0
    """For which a client may not read what it asked for."""
    ping_seconds: float = 15.0
    """After which a silent stream says that it is alive."""
    drain_seconds: float = 60.0
    """For which texts may go on when the server is to end."""

    @property
    def max_answered(self) -> int:
        """Requests that are answered at a time: some connections are left for /health."""
        return self.max_connections - max(self.max_connections // 16, 1)

    def check(self, order: Order) -> None:
        """ApiError for an order that asks for too much. Nothing has been tokenised by then."""
        if order.n > self.max_n:
            raise refused("n", f"must be at most {self.max_n}")
        if order.count > self.max_texts:
            raise refused("prompt", f"{order.count} texts: at most {self.max_texts} a request")
        for prompt in order.prompts:
            self.check_prompt(prompt)

    def check_inputs(self, inputs: Sequence[Any]) -> None:
        """ApiError for more of them than vectors are made of at a time, or for one too long."""
        if len(inputs) > self.max_inputs:
            raise refused("input", f"{len(inputs)} inputs: at most {self.max_inputs} a request")
        for one in inputs:
            self.check_prompt(one)

    def check_prompt(self, prompt: Any) -> None:
        """ApiError for one that is too long to be looked at."""
        if _size(prompt) > self.max_prompt:
            raise ApiError(
                400,
                f"the prompt has more than {self.max_prompt} characters",
                code="context_length_exceeded",
            )


def _size(value: Any) -> int:
    """Characters of all strings, and numbers counted as one each."""
    total, rest = 0, [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            rest += item.values()
        elif isinstance(item, Sequence):
            rest += item
        else:
            total += 1
    return total
