"""What is asked of a generation, and what comes of it."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from ..constraints.constraint import Schema, constraint_of
from ..constraints.matcher import Matcher
from ..constraints.vocabulary import Vocabulary
from ..drafts.drafted import Drafted
from ..errors import ConstraintError, RowsError
from ..request import Event, Request
from .logprobs import MOST, TokenLogprob
from .sampling_options import Sampling, merge_options, whole
from .stopping import StopStrings

T = TypeVar("T")


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
    """"stop": an end of text or a stop string; "length": no more tokens were allowed; "error"."""
    prompt_seconds: float
    """From the first pass over the prompt to its first token."""
    decode_seconds: float
    """From the first token to the last."""
    passes: int = 0
    """That its row has taken part in: over the model, one after the other."""
    drafts: Mapping[str, Drafted] = field(default_factory=dict)
    """What came of them, by source: "grammar" (what has to follow), "lookup", "draft" (a model),
    "self"."""
    error: Exception | None = None
    """What ended the row before its time; text and ids are what there was by then."""
    cached_tokens: int = 0
    """Of the prompt, those that another text had begun with: they were not computed again."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """How likely each of ``ids`` was; None if they were not asked for."""

    @property
    def drafted(self) -> int:
        """Tokens of all its drafts."""
        return sum(some.tokens for some in self.drafts.values())

    @property
    def agreed(self) -> int:
        """Those of them that are among ``ids``."""
        return sum(some.agreed for some in self.drafts.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The options of a generation. ValueError for one that makes no sense."""

    sampling: Sampling
    max_new_tokens: int = 128
    stop: Sequence[str] = ()
    """One string will do, and None is none."""
    seed: int | None = None
    """Row i draws from the random stream of seed + i; None: a new one each."""
    reuse_prefix: bool = False
    skip_special_tokens: bool = True
    """False shows special tokens, the one that ends the text as well."""
    logprobs: bool = False
    """Tell how likely each token was, by the model's own account."""
    top_logprobs: int = 0
    """So many of the likeliest tokens beside each."""
    schema: Schema | None = None
    """The text is a JSON document as this JSON schema says; one of the three at most."""
    regex: str | None = None
    """The text is one that this regular expression matches."""
    grammar: str | None = None
    """The text is one of this grammar, in Lark or GBNF."""

    @classmethod
    def of(cls, defaults: Sampling, options: Mapping[str, Any]) -> Asked:
        """The options of one call; what it does not say of sampling is ``defaults``."""
        own = {option.name for option in fields(cls)} - {"sampling"}
        given = {name: options[name] for name in options if name in own}
        rest = {name: value for name, value in options.items() if name not in own}
        return cls(sampling=merge_options(defaults, rest), **given)

    def __post_init__(self) -> None:
        count = whole("max_new_tokens", self.max_new_tokens, 1)
        object.__setattr__(self, "max_new_tokens", count)
        if self.seed is not None:
            object.__setattr__(self, "seed", whole("seed", self.seed))
        self._check_logprobs()
        stop: Any = () if self.stop is None else self.stop
        try:
            stop = (stop,) if isinstance(stop, str) else tuple(stop)
        except TypeError as error:
            raise ValueError(f"stop={reprlib.repr(stop)}: must be strings") from error
        object.__setattr__(self, "stop", stop)
        StopStrings(stop)

    def _check_logprobs(self) -> None:
        if not isinstance(self.logprobs, bool | None):
            shown = reprlib.repr(self.logprobs)
            raise ValueError(f"logprobs={shown}: must be true or false (how many: top_logprobs)")
        object.__setattr__(self, "logprobs", bool(self.logprobs))
        top = 0 if self.top_logprobs is None else self.top_logprobs
        top = whole("top_logprobs", top, 0, f" and at most {MOST}")
        if top > MOST:
            raise ValueError(f"top_logprobs={top}: must be at most {MOST}")
        if top and not self.logprobs:
            raise ValueError(f"top_logprobs={top}: belongs to logprobs=True")
        object.__setattr__(self, "top_logprobs", top)

    def matcher(self, vocabulary: Callable[[], Vocabulary]) -> Matcher | None:
        """What the rows' texts are held to. ConstraintError in one line for what is wrong with it;
        ImportError with the extra that it takes."""
        try:
            constraint = constraint_of(self.schema, self.regex, self.grammar)
            return None if constraint is None else Matcher.of(constraint, vocabulary())
        except ValueError as error:
            raise ConstraintError(str(error)) from error


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
        passes=request.passes,
        drafts=request.drafts,
        error=request.error,
        cached_tokens=request.cached,
        logprobs=None if request.logprobs is None else tuple(request.logprobs),
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


def raising(events: Iterator[Event]) -> Iterator[Event]:
    """The events of rows that do not fail. What fails is raised when all others have ended: a
    single prompt's error as it is, otherwise a RowsError."""
    errors: dict[int, Exception] = {}
    last = 0
    for request, piece in events:
        last = max(last, request.index)
        if request.error is None:
            yield request, piece
        else:
            errors[request.index] = request.error
    if errors:
        raise errors[0] if last == 0 else RowsError(errors)


@dataclass(frozen=True, slots=True)
class Shape:
    """How the texts of a call are returned. ValueError for what does not go together."""

    several: bool
    """A list of prompts, not one."""
    n: int | None
    """So many texts of each prompt, as if it stood in the list n times; None: one."""
    stream: bool
    details: bool
    """Completions, not texts alone."""

    def __post_init__(self) -> None:
        if self.stream and self.details:
            raise ValueError("return_details=True: not together with stream=True")
        if self.n is not None:
            object.__setattr__(self, "n", whole("n", self.n, 1))

    @property
    def is_one(self) -> bool:
        """True: one text, in no list."""
        return not self.several and self.n is None

    def rows(self, prompts: Sequence[T]) -> list[T]:
        """Each prompt as often as there are to be texts of it."""
        return [prompt for prompt in prompts for _ in range(self.n or 1)]

    def pieces(self, events: Iterator[Event]) -> Iterator[Any]:
        """What is streamed: pieces of the one text, else (row, piece)."""
        pairs = ((request.index, piece) for request, piece in events if piece)
        return (piece for _, piece in pairs) if self.is_one else pairs

    def results(self, completions: Sequence[Completion]) -> Any:
        """What is returned of all rows: of each prompt a Completion or a text, or a list of n.

        The one's error is raised, and where texts are asked for a RowsError that has everything.
        """
        errors = {done.index: done.error for done in completions if done.error is not None}
        if errors and (self.is_one or not self.details):
            raise errors[0] if self.is_one else RowsError(errors, completions)
        found = list[Any](completions if self.details else [done.text for done in completions])
        if self.n is not None:
            found = [found[i : i + self.n] for i in range(0, len(found), self.n)]
        return found if self.several else found[0]
