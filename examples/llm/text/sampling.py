"""Choosing the next token of each row from its logits.

Filters come in the order that transformers applies them: repetition penalty, temperature, top_k,
top_p, min_p. Every row draws from a random stream of its own, so that its text does not depend on
what else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen. ValueError for a value out of bounds."""

    temperature: float = 0.0
    """0: always the likeliest token. Else logits are divided by it."""
    top_k: int = 0
    """Only so many of the likeliest tokens may be drawn; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability; 1: all."""
    min_p: float = 0.0
    """Only tokens with at least this share of the likeliest one's probability; 0: all."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt and the text so far are divided by it if above 0, else
    multiplied; 1: as they are."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, math.inf),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name}={value!r}: must be a number")
            if not (low <= value <= high and math.isfinite(value)):
                bound = f"from {low:g} to {high:g}" if high < math.inf else "at least 0 and finite"
                raise ValueError(f"{name}={value}: must be {bound}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k={self.top_k!r}: must be an int of at least 0 (0: all tokens)")
        if self.top_p == 0 or self.repetition_penalty == 0:
            name = "top_p" if self.top_p == 0 else "repetition_penalty"
            raise ValueError(f"{name}=0: must be above 0")


OPTIONS = tuple(field.name for field in fields(Sampling))


def merge_options(defaults: Sampling, options: Mapping[str, Any]) -> Sampling:
    """``defaults`` with what ``options`` names; None leaves a default. ValueError for others."""
    for name in options:
        if name not in OPTIONS:
            raise ValueError(f"unknown sampling option {name!r} (there are: {', '.join(OPTIONS)})")
    given = {name: value for name, value in options.items() if value is not None}
    return Sampling(**({name: getattr(defaults, name) for name in OPTIONS} | given))


def default_sampling(generation_config: Mapping[str, Any]) -> Sampling:
    """What a model's generation_config.json asks for: greedy unless it says ``do_sample``."""
    given = {name: generation_config.get(name) for name in OPTIONS}
    if not generation_config.get("do_sample"):
        return merge_options(Sampling(), {"repetition_penalty": given["repetition_penalty"]})
    return merge_options(Sampling(temperature=1.0), given)


class Sampler:
    """Chooses the tokens of one row.

    Ownership: the thread that runs passes. The random stream is on the CPU, one number a token, so
    that a seed means the same on every device.
    """

    def __init__(self, sampling: Sampling | None = None, *, seed: int | None = None) -> None:
        """The same seed gives the same draws; None takes a new one each time."""
        self.sampling = sampling if sampling is not None else Sampling()
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._seen_V: torch.Tensor | None = None

    @property
    def takes_likeliest(self) -> bool:
        """True if the choice is the largest logit, as the model gave it."""
        return self.sampling.temperature == 0 and self.sampling.repetition_penalty == 1

    def see(self, ids: Iterable[int], vocab_size: int, device: torch.device) -> None:
        """Tokens of the prompt, which the repetition penalty counts; before the first choice."""
        if self.sampling.repetition_penalty != 1:
            self._seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            seen = sorted({i for i in ids if i < vocab_size})
            self._seen_V[torch.tensor(seen, dtype=torch.long, device=device)] = True

    def choose(self, logits_V: torch.Tensor) -> torch.Tensor:
        """The next token, a scalar on the logits' device; nothing waits for the device."""
        scores = logits_V.float()
        if self._seen_V is not None:
            penalty = self.sampling.repetition_penalty
            punished = torch.where(scores > 0, scores / penalty, scores * penalty)
            scores = torch.where(self._seen_V, punished, scores)
        token = scores.argmax() if self.sampling.temperature == 0 else self._draw(scores)
        if self._seen_V is not None:
            self._seen_V.index_fill_(0, token.view(1), True)
        return token

    def _draw(self, scores_V: torch.Tensor) -> torch.Tensor:
        """One uniform number, looked up in the running sum of the probabilities."""
        uniform = float(torch.rand((), dtype=torch.float64, generator=self._generator))
        kept, order = keep_likely(scores_V, self.sampling)
        sums = kept.double().cumsum(0)
        index = torch.searchsorted(sums, sums[-1:] * uniform, right=True)
        index = index.clamp_(max=len(sums) - 1)
        return (index if order is None else order[index]).view(())


def keep_likely(
    scores_V: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities of the tokens that may be drawn, not normed, and which tokens they are.

    (K,) and (K,) with the likeliest first, or (V,) and None where none is left out.
    """
    scores = scores_V / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        return scores.softmax(0), None
    count = min(sampling.top_k or len(scores), len(scores))
    values, order = scores.topk(count) if count < len(scores) else scores.sort(descending=True)
    probabilities = values.softmax(0)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if sampling.top_p < 1:
        # What the tokens before one have together decides, so that the first always stays.
        keep &= probabilities.cumsum(0) - probabilities < sampling.top_p
    if sampling.min_p:
        keep &= probabilities >= sampling.min_p * probabilities[0]
    return probabilities * keep, order


def choose_tokens(logits_RV: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of every row: the one place where generation waits for the device."""
    if all(sampler.takes_likeliest for sampler in samplers):
        return [int(i) for i in logits_RV.argmax(-1).tolist()]
    rows = zip(logits_RV, samplers, strict=True)
    return [int(i) for i in torch.stack([s.choose(row) for row, s in rows]).tolist()]
