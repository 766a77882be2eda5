"""One prompt on its way to a text."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import overload

from .drafts.drafted import Drafted
from .drafts.tree import NOTHING, Tree
from .errors import told_in_one_line, without_frames
from .kv.rows import Row
from .text.logprobs import TokenLogprob
from .text.sampling import Sampler
from .text.stopping import TextStream

logger = logging.getLogger(__name__)

_uids = count()


class Known(Sequence[int]):
    """A row's ids, prompt and text, one after the other; it grows with the text. Nothing is
    copied."""

    def __init__(self, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> None:
        self._parts = prompt_ids, new_ids

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        (first, second), count = self._parts, len(self._parts[0])
        if isinstance(index, slice):
            begin, end, step = index.indices(len(self))
            if step != 1:
                return [self[i] for i in range(begin, end, step)]
            return [*first[begin:end], *second[max(begin - count, 0) : max(end - count, 0)]]
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(index)
        return first[at] if at < count else second[at - count]

    def __iter__(self) -> Iterator[int]:
        for part in self._parts:
            yield from part


@dataclass(slots=True, eq=False)
class Request:
    """One prompt, and what has become of it."""

    index: int
    """Its place among the prompts of one call."""
    prompt_ids: Sequence[int]
    max_new_tokens: int
    sampler: Sampler
    text: TextStream | None
    """None where there is no tokenizer: ids alone come out."""
    places: int
    """Tokens for which its row is to have room."""
    new_ids: list[int] = field(default_factory=list)
    draft: Tree = NOTHING
    """Tokens that may follow, for the next pass to look at."""
    source: str = ""
    """Who drafted them."""
    uid: int = field(default_factory=lambda: next(_uids))
    """Of this request alone, in this process."""
    finish_reason: str | None = None
    """"stop", "length" or "error", once it has ended."""
    error: Exception | None = None
    """What ended it, if it is an error. A request that comes with one never gets a row."""
    row: Row | None = None
    prompt_seconds: float = 0.0
    """From its first pass on to its first token."""
    decode_seconds: float = 0.0
    """From there to its last."""
    began: float = 0.0
    passes: int = 0
    """That its row has taken part in."""
    drafts: dict[str, Drafted] = field(default_factory=dict)
    """What came of them, by source."""

    @property
    def known(self) -> Known:
        """Its ids so far."""
        return Known(self.prompt_ids, self.new_ids)

    @property
    def logprobs(self) -> Sequence[TokenLogprob] | None:
        """Of each of ``new_ids``, so far; None if they were not asked for."""
        if self.sampler.top_logprobs is None:
            return None
        return self.sampler.logprobs[: len(self.new_ids)]

    @property
    def room(self) -> int:
        """How many tokens of a draft there is room for, in its row and in what it may become."""
        assert self.row is not None
        left = self.max_new_tokens - len(self.new_ids)
        return min(self.row.capacity - len(self.known), left - 1)

    @property
    def behind(self) -> int:
        """How many tokens the next pass appends to its row, its draft among them."""
        known = len(self.prompt_ids) + len(self.new_ids) + len(self.draft)
        return known - (0 if self.row is None else self.row.length)

    @property
    def pending(self) -> Sequence[int]:
        """Those tokens."""
        assert self.row is not None
        known = len(self.prompt_ids)
        if self.row.length < known:
            return [*self.prompt_ids[self.row.length :], *self.new_ids, *self.draft.tokens]
        return [*self.new_ids[self.row.length - known :], *self.draft.tokens]

    def fail(self, error: BaseException) -> None:
        """End with what was raised for this row; an interrupt is raised again."""
        told = told_in_one_line(error, "the row cannot go on")
        if not isinstance(told, Exception):
            raise told
        logger.debug("prompt %d ends with an error", self.index, exc_info=error)
        if told is not error:
            told.__cause__ = error
        self.error, self.finish_reason = without_frames(told), "error"


Event = tuple[Request, str]
"""A request and its next piece of text, perhaps none; the last one if it has a finish_reason."""
