"""A StreamingEngine as a server uses it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from ..constraints.lazy import LazyMatcher
from ..constraints.matcher import Matcher
from ..engine import StreamingEngine
from ..reading.begun import CallForm, matcher_of
from ..reading.families import HARMONY, family_of
from ..reading.heads import HeadText
from ..reading.reasoning import ReasoningSplitter, thinks, thinks_first
from ..reading.turn_marks import TurnMarks
from ..request import Request
from ..scheduling.events import Events
from ..text.logprobs import TokenLogprob
from ..text.tokenizer import raw_ids, rendered_ids, shown_text, template_of
from .asking.order import Order
from .token_text import TokenTexts
from .working.pieces import Account, Piece, ScoredToken
from .working.served import Facts, Load, Ready, Tag


class StreamedEngine:
    """Keeps :class:`.working.served.Served`. Its tokenizer is used by two threads, the one that
    prepares and the one of the passes: none of its methods that are called changes it."""

    def __init__(self, engine: StreamingEngine, name: str) -> None:
        """``name``: of the model, for clients."""
        self._engine, self._scheduler = engine, engine.scheduler
        tokenizer = engine.tokenizer
        _warm_up(engine, template_of(tokenizer))
        self._events = Events()
        self._requests: dict[Tag, Request] = {}
        self._tags: dict[Request, Tag] = {}
        self._told: dict[Request, int] = {}
        self._texts = TokenTexts(tokenizer)
        self._marks = TurnMarks(tokenizer)
        self.facts = Facts(
            name=name,
            max_length=engine.max_length,
            max_rows=engine.max_batch,
            template=template_of(tokenizer),
            places=engine.plan.kv_tokens,
            where=_where(engine),
        )

    @property
    def load(self) -> Load:
        """As of now."""
        running = self._scheduler.running
        held = sum(request.row.length for request in running if request.row is not None)
        return Load(
            rows=len(running),
            waiting=len(self._scheduler.waiting),
            places_used=held,
            share_of_limit=self._share() if running else None,
            experts=self._experts(),
        )

    def prepare(self, order: Order) -> Sequence[Ready]:
        """Tokenise and check."""
        ids = [self._encoded(one, order) for one in order.prompts]
        left = self._engine.max_length - min(map(len, ids))
        options = dict(order.options)
        options["max_new_tokens"] = min(options["max_new_tokens"], max(left, 1))
        rows = [one for one in ids for _ in range(order.n)]
        made = self._engine.requests(rows, **options)
        begun, found = self._begun(order), list[Ready]()
        for prompt, request in zip(rows, made, strict=True):
            if request.error is not None:
                raise request.error
            if order.ignore_eos:
                request.stop_ids = frozenset()
            request.salt = order.owner.encode()
            first = thinks_first(self._engine.tokenizer, prompt)
            ready = Ready(prompt, request, first, self._marks.lead(prompt))
            if begun is not None and order.call_form is not None:
                request.sampler.constraint = self._held(begun, order.call_form, ready)
            found.append(ready)
        return found

    def _encoded(self, prompt: Any, order: Order) -> list[int]:
        ids = self._engine.encode(prompt, order.template_options)
        return self._marks.primed(ids) if order.primed else ids

    def _begun(self, order: Order) -> Matcher | None:
        """What calls are held to; None: nothing."""
        form = order.call_form
        if form is None:
            return None
        if form.whole:
            return matcher_of(form, order.callable_tools, self._engine.vocabulary)
        with suppress(ValueError, ImportError):  # they are read, then, and free
            return matcher_of(form, order.callable_tools, self._engine.vocabulary)
        return None

    def _held(self, begun: Matcher, form: CallForm, ready: Ready) -> Matcher | LazyMatcher:
        """A row's own: from its beginning on, or from where it begins to call."""
        if form.whole:
            return begun.copy()
        heard = answers(self.facts.template, ready)
        held = LazyMatcher(begun, self._engine.vocabulary, form.mark, heard)
        held.ends_the_text = form.ends
        return held

    def tokenize(self, prompt: Any, *, special: bool) -> Sequence[int]:
        """Ids of a text or of messages."""
        if not isinstance(prompt, str):
            return self._engine.encode(prompt)
        encode = raw_ids if special else rendered_ids
        return encode(self._engine.tokenizer, prompt)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        size = self._engine.config.vocab_size
        for item in ids:
            if item >= size:
                raise ValueError(f"token id {item}: must be from 0 to {size - 1}")
        return shown_text(self._engine.tokenizer, ids)

    def embed(self, prompts: Sequence[Sequence[int]]) -> Iterator[Sequence[float]]:
        """A vector of each prompt."""
        found = self._engine.embed(prompts)
        return (vector.tolist() for vector in found)

    def submit(self, ready: Ready, tag: Tag) -> None:
        """A text joins the queue."""
        request: Request = ready.request
        self._scheduler.submit(request, self._events)
        self._requests[tag], self._tags[request], self._told[request] = request, tag, 0

    def cancel(self, tag: Tag) -> None:
        """Nobody wants to hear of it any more."""
        if (request := self._requests.get(tag)) is not None:
            self._scheduler.cancel(request)
            self._forget(request)

    def step(self) -> Sequence[tuple[Tag, Piece]]:
        """One pass, and what it brings."""
        self._scheduler.step()
        found = []
        while self._events:
            request, text = self._events.take()
            if request in self._tags:
                found.append((self._tags[request], self.piece(request, text)))
                if request.finish_reason is not None:
                    self._forget(request)
        return found

    def close(self) -> None:
        """Return all memory."""
        self._engine.close()

    def _forget(self, request: Request) -> None:
        tag = self._tags.pop(request)
        del self._requests[tag], self._told[request]

    def piece(self, request: Request, text: str) -> Piece:
        """What there is of a request beside what has been told of it, with its text."""
        told, known = self._told.get(request, 0), len(request.new_ids)
        if request in self._told:
            self._told[request] = known
        piece = Piece(text, known - told)
        if request.logprobs is not None:
            piece.scored = [self._scored(one) for one in request.logprobs[told:known]]
        if request.error is not None:
            piece.error = request.error
        elif request.finish_reason is not None:
            piece.finish_reason, piece.account = request.finish_reason, _account(request)
        return piece

    def _scored(self, one: TokenLogprob) -> ScoredToken:
        top = [self._texts.scored(token, logprob) for token, logprob in one.top]
        return self._texts.scored(one.token, one.logprob, *top)

    def _experts(self) -> dict[str, int]:
        report = self._engine.streamer.last_experts
        if report is None:
            return {}
        brought = report.asked - report.hits
        return {"device": report.hits, "brought": brought, "bytes": report.copied_bytes}

    def _share(self) -> float | None:
        """By the step that a pass is bound by."""
        last = self._engine.streamer.last_pass
        return None if last is None else last.share_of_limit(last.bound_by)


def answers(template: str | None, ready: Ready) -> Callable[[str], str]:
    """Gives of a text, which comes piece by piece, what is no reasoning; of one in channels, only
    the heads of its messages."""
    if family_of(template) == HARMONY:
        return HeadText(ready.lead).push
    if not thinks(template):
        return lambda text: text
    splitter = ReasoningSplitter(inside=ready.inside_reasoning)
    return lambda text: splitter.push(text)[1]


def _warm_up(engine: StreamingEngine, template: str | None) -> None:
    """Have set up now whatever a tokenizer and its template set up at their first use: some import
    a lot, beside which no pass goes on."""
    tools = [{"type": "function", "function": {"name": "a", "description": "", "parameters": {}}}]
    options = {} if family_of(template) == "generic" else {"tools": tools}
    with suppress(ValueError):
        engine.encode([{"role": "user", "content": "a"}], options)


def _account(request: Request) -> Account:
    drafts = request.drafts.values()
    return Account(
        prompt_tokens=len(request.prompt_ids),
        new_tokens=len(request.new_ids),
        cached_tokens=request.cached,
        prompt_seconds=request.prompt_seconds,
        decode_seconds=request.decode_seconds,
        passes=request.passes,
        drafted=sum(some.tokens for some in drafts),
        agreed=sum(some.agreed for some in drafts),
    )


def _where(engine: StreamingEngine) -> dict[str, int]:
    """Bytes of what a pass goes through, by tier."""
    plan, found = engine.streamer.plan, defaultdict[str, int](int)
    for tier, size in zip(plan.tiers, plan.sizes, strict=True):
        found[tier] += size.read_nbytes
    return dict(found)
