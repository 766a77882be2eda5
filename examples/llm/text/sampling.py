"""Choosing the next token of each row from its logits.

What changes them comes in this order: constraint, logit bias, repetition penalty, frequency and
presence penalty, temperature, top_k, top_p, min_p; of those that transformers has, that is its own.
Every row draws from a random stream of its own, so that its text does not depend on what else is in
the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from .logprobs import TokenLogprob, measure, read, width
from .penalties import Penalties, in_range
from .sampling_options import Sampling, whole

NONE_LEFT = -1
"""In the place of a token: none may be chosen."""


class Constraining(Protocol):
    """What a row's text is held to, which knows the tokens that were chosen so far."""

    @property
    def acts(self) -> bool:
        """False: any token may follow the last one."""

    def mask(self, scores_V: torch.Tensor) -> torch.Tensor:
        """Scores with those of tokens that may not follow at -inf. Errors are the row's."""

    def accept(self, token: int) -> None:
        """This one was chosen."""

    def ends_at(self, count: int) -> bool:
        """True if the first so many tokens are a whole text."""

    def forced(self) -> Sequence[int]:
        """Tokens that have to follow, one after the other."""


class Sampler:
    """Chooses the tokens of one row, and keeps what it is to tell of them.

    Ownership: the thread that runs passes. The random stream is on the CPU, one number a token, so
    that a seed means the same on every device.
    """

    def __init__(
        self,
        sampling: Sampling | None = None,
        *,
        seed: int | None = None,
        top_logprobs: int | None = None,
        constraint: Constraining | None = None,
    ) -> None:
        """The same seed, of which 64 bits count, gives the same draws; None takes a new one each
        time. ``top_logprobs``: so many of the likeliest tokens are told beside each; None: nothing
        is. ``constraint``: this row's own."""
        self.sampling = sampling if sampling is not None else Sampling()
        self.constraint = constraint
        self.top_logprobs = top_logprobs
        self.logprobs: list[TokenLogprob] = []
        """Of each token that was chosen, in order, if any are to be told."""
        self._generator = torch.Generator("cpu")
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(whole("seed", seed) % (1 << 64))
        self._penalties = Penalties(
            repetition=self.sampling.repetition_penalty,
            presence=self.sampling.presence_penalty,
            frequency=self.sampling.frequency_penalty,
            bias=self.sampling.logit_bias,
        )

    @property
    def takes_likeliest(self) -> bool:
        """True if the choice is the largest logit, as the model gave it."""
        plain = self.sampling.temperature == 0 and not self._penalties.act
        return plain and not self._is_held

    @property
    def _is_held(self) -> bool:
        return self.constraint is not None and self.constraint.acts

    def see(self, ids: Iterable[int]) -> None:
        """Tokens of the prompt, which the repetition penalty counts; before the first choice."""
        self._penalties.see(ids)

    def choose(self, logits_V: torch.Tensor) -> torch.Tensor:
        """The next token, a scalar on the logits' device, which stay as they are; NONE_LEFT where
        all are ruled out. Nothing waits for the device; :meth:`take` is to be called with it."""
        scores, held = logits_V.float(), self._is_held
        if self.constraint is not None and held:
            scores = self.constraint.mask(scores)
        scores = self._penalties.apply(scores)
        token = scores.argmax() if self.sampling.temperature == 0 else self._draw(scores)
        self._penalties.count(token)
        if self._penalties.bans or held:
            token = torch.where(scores.max() > -math.inf, token, NONE_LEFT)
        return token

    def take(self, token: int) -> int | Exception:
        """The token that was chosen, which the constraint has to know, before the next one is;
        ValueError in the place of none. What the constraint raises is the row's."""
        choice = as_choice(token)
        if self.constraint is not None and isinstance(choice, int):
            self.constraint.accept(choice)
        return choice

    def _draw(self, scores_V: torch.Tensor) -> torch.Tensor:
        """One uniform number, looked up in the running sum of the probabilities."""
        uniform = float(
            torch.rand((), dtype=torch.float64, device="cpu", generator=self._generator)
        )
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
    # The largest becomes 0 first: at a temperature next to 0 all others then go to -inf, which
    # leaves the largest, and nothing overflows.
    scores = (scores_V - scores_V.max()) / in_range(sampling.temperature)
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        return scores.softmax(0), None
    count = min(sampling.top_k or len(scores), len(scores))
    values, order = scores.topk(count) if count < len(scores) else scores.sort(descending=True)
    probabilities = values.softmax(0)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if sampling.top_p < 1:
        # What the tokens before one have together decides, so that the first always stays.
        keep &= probabilities.cumsum(0) - probabilities < in_range(sampling.top_p)
    if sampling.min_p:
        keep &= probabilities >= sampling.min_p * probabilities[0]
    return probabilities * keep, order


Choice = int | Exception | None
"""The token of a row; what its sampler raised; None: its logits are not numbers."""


def choose_tokens(logits_RV: torch.Tensor, samplers: Sequence[Sampler]) -> list[Choice]:
    """What follows in every row: the one place where generation waits for the device.

    Logits are not numbers if one of a row is nan or +inf, or if none is finite; single ones of
    -inf are legitimate. The largest of a row tells, before samplers change anything: it is found
    together with the likeliest token, and travels to the host beside the tokens. So do logprobs,
    of rows that ask for them.
    """
    count, failed = len(samplers), dict[int, Exception]()
    asking = {i: s.top_logprobs for i, s in enumerate(samplers) if s.top_logprobs is not None}
    widths = [width(top, logits_RV.shape[-1]) for top in asking.values()]
    first = -(-count * 12 // 8) * 8  # where numbers of eight bytes may begin
    both = torch.empty(first + 8 * sum(widths), dtype=torch.uint8, device=logits_RV.device)
    tokens_R = both[: count * 8].view(torch.int64)
    largest_R = both[count * 8 : count * 12].view(torch.float32)
    measured = dict(zip(asking, _numbers(both[first:], widths), strict=True))
    torch.max(logits_RV.float(), -1, out=(largest_R, tokens_R))
    for i, sampler in enumerate(samplers):
        if sampler.takes_likeliest and i not in asking:
            continue
        try:
            if not sampler.takes_likeliest:
                tokens_R[i] = sampler.choose(logits_RV[i])
            if i in asking:
                measured[i].copy_(measure(logits_RV[i], tokens_R[i], asking[i]))
        except Exception as error:  # of this row: the others go on
            failed[i] = error
    both = both.cpu()
    tokens = both[: count * 8].view(torch.int64).tolist()
    largest = both[count * 8 : count * 12].view(torch.float32).tolist()
    found: list[Choice] = [
        (failed.get(i) or _taken(sampler, tokens[i])) if math.isfinite(largest[i]) else None
        for i, sampler in enumerate(samplers)
    ]
    for i, numbers in zip(asking, _numbers(both[first:], widths), strict=True):
        choice = found[i]
        if isinstance(choice, int):
            samplers[i].logprobs.append(read(choice, numbers.tolist()))
    return found


def _taken(sampler: Sampler, token: int) -> Choice:
    try:
        return sampler.take(token)
    except Exception as error:  # of this row: the others go on
        return error


def as_choice(token: int) -> int | Exception:
    """The token; ValueError in the place of none."""
    if token != NONE_LEFT:
        return token
    return ValueError("no token is left to choose: all that the model gives a chance are banned")


def _numbers(bytes_B: torch.Tensor, widths: Sequence[int]) -> Sequence[torch.Tensor]:
    """Those of each row that asks."""
    return bytes_B.view(torch.float64).split(list(widths)) if widths else ()
