"""One prompt on its way to a text."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from .errors import told_in_one_line, without_frames
from .kv.rows import Row
from .text.sampling import Sampler
from .text.stopping import TextStream

logger = logging.getLogger(__name__)


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

    @property
    def behind(self) -> int:
        """How many tokens the next pass appends to its row."""
        known = len(self.prompt_ids) + len(self.new_ids)
        return known - (0 if self.row is None else self.row.length)

    @property
    def pending(self) -> Sequence[int]:
        """Those tokens."""
        assert self.row is not None
        known = len(self.prompt_ids)
        if self.row.length < known:
            return [*self.prompt_ids[self.row.length :], *self.new_ids]
        return self.new_ids[self.row.length - known :]

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
