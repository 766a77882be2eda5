"""What is asked of a generation, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..scheduler import Event, Request
from .sampling import Sampling
from .stopping import StopStrings


@dataclass(frozen=True, slots=True)
class Completion:
    """One prompt's text."""

    index: int
    """The prompt's place among those of the call."""
    text: str
    ids: tuple[int, ...]
    """Token ids; the one that ended the text is the last."""
    prompt_tokens: int
    finish_reason: str
    """"stop": an end of text or a stop string; "length": no more tokens were allowed."""
    prompt_seconds: float
    """From the first pass over the prompt to its first token."""
    decode_seconds: float
    """From the first token to the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The options of a generation. ValueError for one that makes no sense."""

    sampling: Sampling
    max_new_tokens: int = 128
    stop: Sequence[str] = ()
    seed: int | None = None
    """Row i draws from the random stream of seed + i; None: a new one each."""
    reuse_prefix: bool = False

    def __post_init__(self) -> None:
        count = self.max_new_tokens
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"max_new_tokens={count!r}: must be an int of at least 1")
        StopStrings(self.stop)


def complete(request: Request, pieces: Sequence[str]) -> Completion:
    """The result of a request that has ended."""
    assert request.finish_reason is not None
    return Completion(
        index=request.index,
        text="".join(pieces),
        ids=tuple(request.new_ids),
        prompt_tokens=len(request.prompt_ids),
        finish_reason=request.finish_reason,
        prompt_seconds=request.prompt_seconds,
        decode_seconds=request.decode_seconds,
    )


def in_order(events: Iterator[Event]) -> Iterator[Completion]:
    """Results in the order of their prompts, each as soon as it and all before it have ended."""
    pieces: dict[int, list[str]] = {}
    ended: dict[int, Completion] = {}
    following = 0
    for request, piece in events:
        pieces.setdefault(request.index, []).append(piece)
        if request.finish_reason is not None:
            ended[request.index] = complete(request, pieces.pop(request.index))
        while following in ended:
            yield ended.pop(following)
            following += 1
