"""What a server needs of an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from ..asking.order import Order
from .pieces import Piece


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What stays as it is while an engine is open."""

    name: str
    """Of the model."""
    max_length: int
    """Tokens of a row, prompt and text."""
    max_rows: int
    template: str | None = None
    """The chat template's text."""
    places: int = 0
    """Tokens whose keys and values there is room for."""
    where: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the model's layers by tier: device, host, disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What an engine is doing at present."""

    rows: int = 0
    waiting: int = 0
    places_used: int = 0
    """Tokens whose keys and values are held."""
    share_of_limit: float | None = None
    """How near the last pass came to what link or disk could give; None: not known."""
    experts: Mapping[str, int] = field(default_factory=dict)
    """Of those that the last pass asked for, where they were ("device"; "brought"), and the bytes
    that were brought ("bytes"); nothing where they come with their layers."""


@dataclass(frozen=True, slots=True)
class Ready:
    """One text of an order, tokenised and checked."""

    ids: Sequence[int]
    request: Any
    """What the engine made of it."""
    inside_reasoning: bool = False
    """The prompt ends where the model begins to think."""
    lead: str = ""
    """The head of a message in which the prompt ends, or the beginning of one, where messages of
    the model have heads."""


Tag: TypeAlias = Any
"""By which a text is known to the one that asked for it."""


class Served(Protocol):
    """An engine as the server's own thread uses it, between passes.

    :meth:`prepare`, :meth:`tokenize` and :meth:`detokenize` are called by another thread, one at a
    time, also while a pass runs.
    """

    @property
    def facts(self) -> Facts:
        """What is known once it is open."""
        ...

    @property
    def load(self) -> Load:
        """As of now."""
        ...

    def prepare(self, order: Order) -> Sequence[Ready]:
        """Tokenise and check: ``n`` texts of the first prompt, then those of the next. ValueError,
        in one line, for what the engine does not take."""
        ...

    def tokenize(self, prompt: Any, *, special: bool) -> Sequence[int]:
        """Ids of a text or of messages; ``special``: with what the tokenizer puts before a text."""
        ...

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ids; ValueError for one that is none."""
        ...

    def embed(self, prompts: Sequence[Sequence[int]]) -> Iterator[Sequence[float]]:
        """A vector of each prompt of token ids; asking for one may take a pass. EngineError if
        there is no room at present."""
        ...

    def submit(self, ready: Ready, tag: Tag) -> None:
        """A text joins the queue. What is raised ends that text."""
        ...

    def cancel(self, tag: Tag) -> None:
        """Nobody wants to hear of it any more. Idempotent."""
        ...

    def step(self) -> Sequence[tuple[Tag, Piece]]:
        """One pass, if there is anything to do, and what it brings. What is raised ends the
        engine."""
        ...

    def close(self) -> None:
        """Return all memory."""
        ...
