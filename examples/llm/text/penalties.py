"""What a row's options make of its logits before the temperature: bias and penalties."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch

BAN = -100.0
"""The bias that rules a token out."""
LEAST = torch.finfo(torch.float32).tiny
"""The smallest number that float32 has with all its digits, and that has a reciprocal."""


class Penalties:
    """Of one row, in the order of vLLM and llama.cpp:

    1. ``bias`` of a token is added to its logit; one of -100 rules the token out.
    2. ``repetition``: logits of tokens of prompt and text are divided by it if above 0, else
       multiplied (as in transformers).
    3. ``frequency``, times how often a token is in the text, and ``presence``, if it is in it, are
       subtracted. The prompt does not count: that is OpenAI's rule, which vLLM follows; llama.cpp
       counts the last 64 tokens of both.

    What is finite stays so unless it is ruled out, and -inf stays -inf. Thread rules: one thread.
    Memory on the device is taken when the row's first token is chosen, not while it waits.
    """

    def __init__(
        self,
        *,
        repetition: float = 1.0,
        presence: float = 0.0,
        frequency: float = 0.0,
        bias: Mapping[int, float] = MappingProxyType({}),
    ) -> None:
        self._repetition, self._presence, self._frequency = repetition, presence, frequency
        self._bias = dict(bias)
        self._counts = presence != 0 or frequency != 0
        self.act = self._counts or repetition != 1 or bool(self._bias)
        """False: logits stay as they are."""
        self.bans = BAN in self._bias.values()
        """True: some token is ruled out."""
        self._prompt: frozenset[int] = frozenset()
        self._bias_K: tuple[torch.Tensor, torch.Tensor] | None = None
        """Which tokens, and what is added."""
        self._seen_V: torch.Tensor | None = None
        """Tokens of prompt and text."""
        self._counts_V: torch.Tensor | None = None
        """How often each token is in the text."""
        self._placed = False

    def see(self, ids: Iterable[int]) -> None:
        """Tokens of the prompt, which the repetition penalty counts; before the first choice."""
        if self._repetition != 1:
            self._prompt = frozenset(ids)

    def apply(self, scores_V: torch.Tensor) -> torch.Tensor:
        """What becomes of float32 logits; those given stay as they are. Nothing waits for the
        device. ValueError for a bias of a token that they lack."""
        if not self._placed:
            self._place(len(scores_V), scores_V.device)
        if self._bias_K is not None:
            scores_V = scores_V.index_add(0, *self._bias_K)
        if self._seen_V is not None:
            scores_V = self._punish(scores_V, self._seen_V)
        if self._counts_V is not None:
            counts_V = self._counts_V
            scores_V = scores_V - (counts_V * self._frequency + (counts_V > 0) * self._presence)
        return scores_V

    def count(self, token: torch.Tensor) -> None:
        """One more token of the text, a scalar on the logits' device."""
        if self._seen_V is not None:
            self._seen_V.index_fill_(0, token.view(1), True)
        if self._counts_V is not None:
            one = torch.ones(1, dtype=torch.float32, device=token.device)
            self._counts_V.index_add_(0, token.view(1), one)

    def _place(self, vocab_size: int, device: torch.device) -> None:
        self._placed = True
        check_bias(self._bias, vocab_size)
        if self._bias:
            values = [-torch.inf if value == BAN else value for value in self._bias.values()]
            ids_K = torch.tensor(list(self._bias), dtype=torch.long, device="cpu")
            bias_K = torch.tensor(values, dtype=torch.float32, device="cpu")
            self._bias_K = ids_K.to(device, non_blocking=True), bias_K.to(device, non_blocking=True)
        if self._repetition != 1:
            ids = sorted(token for token in self._prompt if token < vocab_size)
            seen_K = torch.tensor(ids, dtype=torch.long, device="cpu").to(device, non_blocking=True)
            self._seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen_V.index_fill_(0, seen_K, True)
            self._prompt = frozenset()
        if self._counts:
            self._counts_V = torch.zeros(vocab_size, dtype=torch.float32, device=device)

    def _punish(self, scores_V: torch.Tensor, seen_V: torch.Tensor) -> torch.Tensor:
        """Logits with those of tokens that have been seen less likely."""
        penalty, most = in_range(self._repetition), torch.finfo(torch.float32).max
        punished = torch.where(scores_V > 0, scores_V / penalty, scores_V * penalty)
        return torch.where(seen_V & scores_V.isfinite(), punished.clamp_(-most, most), scores_V)


def check_bias(bias: Mapping[int, float], vocab_size: int) -> None:
    """ValueError, in one line, for a token that the model lacks."""
    for token in bias:
        if token >= vocab_size:
            raise ValueError(f"logit_bias of token {token}: must be from 0 to {vocab_size - 1}")


def in_range(value: float) -> float:
    """A number that float32 can be multiplied with and divided by: one beyond is as good as the
    nearest that it can."""
    return min(max(value, LEAST), 1 / LEAST)
