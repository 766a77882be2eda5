"""One row that is held to a constraint, token by token."""

from __future__ import annotations

from typing import Any

import torch

from .constraint import Constraint
from .explanation import explain
from .library import told
from .vocabulary import Allowed, Vocabulary

DEAD_END = "no text goes on from here"


class Matcher:
    """Which tokens may follow in a row.

    Where all that can follow is one text for a while, llguidance allows its next token, as the
    tokenizer cuts that text, and no other: models have learned such tokens, and drafts of them are
    right.
    What is chosen is accepted in its order, so that a draft, of which tokens are chosen one after
    the other, needs no way back.

    Ownership: one row's. Thread rules: the thread that runs passes.
    """

    def __init__(self, automaton: Any, vocabulary: Vocabulary, kind: str) -> None:
        """``automaton``: llguidance's, in no error; ``kind`` names it in errors."""
        self._automaton, self._vocabulary, self._kind = automaton, vocabulary, kind
        self.acts = True
        self._count = 0
        self._consumed = 0
        """Tokens that the automaton has: those accepted, but for one that ends the text."""
        self._complete: int | None = None
        self._allowed: Allowed | None = None

    @classmethod
    def of(cls, constraint: Constraint, vocabulary: Vocabulary) -> Matcher:
        """At the beginning, to be copied for rows; ValueError in one line for a constraint that is
        wrong, with where it is, or that nothing satisfies."""
        automaton = vocabulary.automaton(constraint)
        if automaton.is_error():
            raise ValueError(explain(constraint, vocabulary, str(automaton.get_error())))
        found = cls(automaton, vocabulary, constraint.kind)
        if not found.allowed().any():
            raise ValueError(f"{constraint.kind}: no text is like that, but perhaps an empty one")
        return found

    def copy(self) -> Matcher:
        """Another row's, at the same place."""
        found = Matcher(self._automaton.deep_copy(), self._vocabulary, self._kind)
        found._count, found._consumed = self._count, self._consumed
        found._complete, found._allowed = self._complete, self._allowed
        return found

    @property
    def ended(self) -> bool:
        """True: the text is complete, and nothing else may follow."""
        return self._complete is not None

    def ends_at(self, count: int) -> bool:
        """True if the first ``count`` accepted tokens are the complete text."""
        return self._complete == count

    def allowed(self) -> Allowed:
        """Of each of the model's tokens, whether it may follow; not to be written to. ValueError in
        one line where the constraint has become too large to follow."""
        if self._allowed is None:
            self._allowed, may_end = self._vocabulary.allowed(self._automaton)
            self._check()
            if may_end and self._count and not self._allowed.any():
                self._complete = self._count
            if may_end:
                self._allowed[self._vocabulary.stops] = True
        return self._allowed

    def mask(self, scores_V: torch.Tensor) -> torch.Tensor:
        """Scores, float32, with those of tokens that may not follow at -inf, and no others there.

        On the scores' device, to which one byte a token is copied. ValueError as of
        :meth:`allowed`, and where nothing may follow.
        """
        if self.ended:
            return scores_V
        allowed = self.allowed()
        if not allowed.any():
            raise ValueError(f"{self._kind}: {DEAD_END}")
        there_V = torch.from_numpy(allowed).to(scores_V.device)
        return torch.where(there_V, scores_V.clamp(min=torch.finfo(torch.float32).min), -torch.inf)

    def accept(self, token: int) -> None:
        """The row goes on with this token; behind the end of its text none counts. ValueError for
        one that may not follow."""
        if self.ended:
            return
        if not (0 <= token < self._vocabulary.size and self.allowed()[token]):
            raise ValueError(f"{self._kind}: token {token} may not follow here")
        self._count += 1
        if token in self._vocabulary.stops:
            self._complete = self._count
            return
        self._automaton.consume_token(token)
        self._consumed, self._allowed = self._count, None
        self._check()
        if not self._automaton.is_stopped():
            self.allowed()  # by which an end shows that is not seen before
        elif self._automaton.is_accepting():
            self._complete = self._count

    def lead(self, text: bytes) -> bool:
        """Begin behind this text, however the tokenizer cuts it; False, and of no use any more, if
        no text begins so."""
        tokens = self._vocabulary.cut(text)
        taken: int = self._automaton.try_consume_tokens(tokens)
        self._count, self._consumed = taken, taken
        self._complete = self._allowed = None
        return taken == len(tokens) and not self._automaton.is_error()

    def rollback(self, count: int) -> None:
        """The last so many accepted tokens are none. ValueError for more than there are."""
        if not 0 <= count <= self._count:
            raise ValueError(f"{count} of {self._count} tokens cannot be taken back")
        if count:
            self._count -= count
            self._automaton.rollback(max(self._consumed - self._count, 0))
            self._consumed = min(self._consumed, self._count)
            self._complete = self._allowed = None
            self._check()

    def forced(self) -> list[int]:
        """Tokens that have to follow, one after the other, as the tokenizer cuts their text."""
        if self.ended:
            return []
        found: list[int] = self._automaton.compute_ff_tokens()
        self._check()
        for i, token in enumerate(found):
            if token >= self._vocabulary.most:
                return found[:i]
        return found

    def _check(self) -> None:
        if self._automaton.is_error():
            message = told(str(self._automaton.get_error()))
            if message.startswith("NoExtensionBias"):
                raise ValueError(f"{self._kind}: {DEAD_END}")
            raise ValueError(f"{self._kind}: it cannot be followed any further ({message})")
