"""One prompt on its way to a text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import overload
from weakref import ref

from .drafts.drafted import Drafted
from .drafts.tree import NOTHING, Tree
from .errors import told_in_one_line, without_frames
from .kv.rows import Row
from .scheduling.events import Events
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
    stop_ids: frozenset[int] = frozenset()
    """Any of them ends the text."""
    keeps: bool = False
    """Its row goes on from the one that was kept, and is kept when it ends."""
    salt: bytes = b""
    """Requests of different salts make no use of what the others have computed."""
    cached: int = 0
    """Tokens of the prompt that were there when it was let in."""
    on_layer: Callable[[int], object] | None = None
    """Hears of the layers of its first pass."""
    events: ref[Events] | None = None
    """Its client's; None: it has not been submitted."""
    cancelled: bool = False
    new_ids: list[int] = field(default_factory=list)
    draft: Tree = NOTHING
    """Tokens that may follow, for the next pass to look at."""
    source: str = ""
    """Who drafted them."""
    part: int = 0
    """How many tokens the next pass appends to its row."""
    uid: int = field(default_factory=lambda: next(_uids))
    """Of this request alone, in this process."""
    finish_reason: str | None = None
    """"stop", "length" or "error", once it has ended."""
    error: Exception | None = None
    """What ended it, if it is an error. A request that comes with one never gets a row."""
    raises: bool = False
    """The error is none of this request, and its client's to raise at once."""
    row: Row | None = None
    """None: it has not been let in."""
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
    def is_whole(self) -> bool:
        """True: its text is what it is held to, and nothing can follow."""
        constraint = self.sampler.constraint
        return constraint is not None and constraint.ends_at(len(self.new_ids))

    @property
    def room(self) -> int:
        """How many tokens of a draft there is room for, in its row and in what it may become."""
        assert self.row is not None
        left = self.max_new_tokens - len(self.new_ids)
        return min(self.row.capacity - len(self.known), left - 1)

    @property
    def waits(self) -> bool:
        """True: it has neither been let in nor ended."""
        return self.row is None and self.finish_reason is None

    @property
    def behind(self) -> int:
        """How many tokens its row lacks, those of its draft among them."""
        known = len(self.prompt_ids) + len(self.new_ids) + len(self.draft)
        return known - (0 if self.row is None else self.row.length)

    @property
    def decodes(self) -> bool:
        """True: of its text, only what its draft has is not in its row; False: its prompt is to be
        taken first."""
        return bool(self.new_ids) and self.behind == 1 + len(self.draft)

    @property
    def completes(self) -> bool:
        """True: after the next pass it is known what follows; False: that takes in a part of the
        prompt."""
        return self.part >= self.behind

    @property
    def pending(self) -> Sequence[int]:
        """The tokens that the next pass appends."""
        assert self.row is not None
        known, first = self.known, self.row.length
        drafted = max(first + self.part - len(known), 0)
        return [*known[first : first + self.part], *self.draft.tokens[:drafted]]

    def drop_draft(self) -> None:
        """The next pass does without."""
        self.part, self.draft = max(self.part - len(self.draft), 1), NOTHING

    def advance(self, choice: int | Exception, now: float) -> str:
        """One more token at that time, or what came in its place: its text, and whether it was the
        last."""
        if isinstance(choice, Exception):
            self.fail(choice)
            return ""
        if not self.new_ids:
            self.prompt_seconds = now - self.began
        else:
            self.decode_seconds = now - self.began - self.prompt_seconds
        self.new_ids.append(choice)
        try:
            return self._push(choice)
        except BaseException as error:  # tokenizers panic, which is no Exception
            self.fail(error)
            return ""

    def _push(self, token: int) -> str:
        ended, text = token in self.stop_ids, self.text
        piece = text.push(token, ends=ended) if text is not None else ""
        reason = self.finish_reason
        if ended or self.is_whole or (text is not None and text.stopped):
            reason = "stop"
        elif len(self.new_ids) >= self.max_new_tokens:
            reason = "length"
        if reason is not None and text is not None:
            piece += text.finish()
            if text.stopped:
                reason = "stop"
        self.finish_reason = reason
        return piece

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
