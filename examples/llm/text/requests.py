"""Prompts of one call to requests. What one prompt raises becomes the error of its request."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..constraints.matcher import Matcher
from ..errors import PromptTooLongError, one_line_errors, without_frames
from ..request import Request
from .completion import Asked
from .penalties import check_bias
from .prompts import Prompt, PromptEncoder
from .sampling import Sampler
from .stopping import TextStream

Encoded = Sequence[int] | Exception
"""Token ids of a prompt, or the error that stands in their place."""


@dataclass(frozen=True, slots=True)
class Room:
    """What ids the engine takes."""

    max_length: int
    """Tokens of a row, prompt and text."""
    context: int
    """The most that the model knows."""
    vocab_size: int

    def check(self, ids: Iterable[Any]) -> list[int]:
        """The ids; ValueError for none, for one without an embedding, and for too many."""
        try:
            known = [operator.index(item) for item in ids]
        except TypeError as error:
            raise ValueError(f"token ids must be whole numbers ({error})") from error
        if not known:
            raise ValueError("the prompt is empty")
        for item in known:
            if not 0 <= item < self.vocab_size:
                raise ValueError(f"token id {item}: must be from 0 to {self.vocab_size - 1}")
        if len(known) >= self.max_length:
            limit = f"the model's context is {self.context}"
            if self.max_length < self.context:
                limit = f"max_length={self.max_length} ({limit}): grant more"
            raise PromptTooLongError(f"the prompt has {len(known)} tokens, {limit}")
        return known


class Prompts:
    """Prompts of any kind to the ids that rows begin with."""

    def __init__(self, encoder: PromptEncoder, room: Room) -> None:
        self._encoder, self._room = encoder, room

    def encode(self, prompt: Prompt, template_options: Mapping[str, Any]) -> list[int]:
        """Its ids; ValueError if it is malformed, empty or too long, or if the tokenizer cannot
        take it."""
        with one_line_errors("the tokenizer cannot take the prompt", ValueError):
            return self._room.check(self._encoder.encode(prompt, template_options))

    def take(
        self, prompt: Any, template_options: Mapping[str, Any], *, several: bool
    ) -> list[Encoded]:
        """The one prompt's, whose errors are raised; of each of ``several`` its ids, or what is
        wrong with it."""
        if not several:
            return [self.encode(prompt, template_options)]
        found: list[Encoded] = []
        for item in prompt:
            try:
                found.append(self.encode(item, template_options))
            except (ValueError, OSError) as error:
                found.append(without_frames(error))
        return found


@dataclass(kw_only=True, slots=True)
class RequestMaker:
    """Makes the requests of one call. ValueError for a bias of a token that the model lacks."""

    asked: Asked
    room: Room
    tokenizer: Any
    """None: ids alone come out."""
    notify: Callable[[str], object]
    stop_ids: frozenset[int] = frozenset()
    """Any of them ends a text."""
    matcher: Matcher | None = None
    """What each row has a copy of."""
    noted: bool = False

    def __post_init__(self) -> None:
        check_bias(self.asked.sampling.logit_bias, self.room.vocab_size)

    def requests(self, prompts: Iterable[Encoded]) -> Iterator[Request]:
        """One for each prompt, taken when it is asked for."""
        for index, prompt in enumerate(prompts):
            request = Request(index, (), 0, Sampler(), None, 0)
            try:
                if isinstance(prompt, Exception):
                    raise prompt
                request = self._make(index, prompt)
            except BaseException as error:  # tokenizers panic, which is no Exception
                request.fail(error)
            request.stop_ids, request.keeps = self.stop_ids, self.asked.reuse_prefix
            yield request

    def _make(self, index: int, prompt: Sequence[int]) -> Request:
        asked, ids = self.asked, self.room.check(prompt)
        left = self.room.max_length - len(ids)
        if left < asked.max_new_tokens and not self.noted:
            self.noted = True
            self.notify(f"the context has room for {left} new tokens")
        count = min(left, asked.max_new_tokens)
        seed = None if asked.seed is None else asked.seed + index
        top = asked.top_logprobs if asked.logprobs else None
        held = None if self.matcher is None else self.matcher.copy()
        sampler = Sampler(asked.sampling, seed=seed, top_logprobs=top, constraint=held)
        sampler.see(ids)
        text = None
        if self.tokenizer is not None:
            skip = asked.skip_special_tokens
            text = TextStream(self.tokenizer, ids, asked.stop, skip_special_tokens=skip)
        places = self.room.max_length if asked.reuse_prefix else len(ids) + count
        return Request(index, ids, count, sampler, text, places)
