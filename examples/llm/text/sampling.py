"""Choosing the next token of each row from its logits.

Filters come in the order that transformers applies them: repetition penalty, temperature, top_k,
top_p, min_p. Every row draws from a random stream of its own, so that its text does not depend on
what else is in the batch.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import torch

TOP_K_OF_TRANSFORMERS = 50
"""Where neither the caller nor the model's generation_config.json names a top_k."""
LEAST = torch.finfo(torch.float32).tiny
"""The smallest number that float32 has with all its digits, and that has a reciprocal."""


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
        for name, high in BOUNDS.items():
            object.__setattr__(self, name, _real(name, getattr(self, name), high))
        top_k = whole("top_k", self.top_k, 0, " (0: all tokens)")
        object.__setattr__(self, "top_k", top_k)
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}=0: must be above 0")


BOUNDS = {"temperature": math.inf, "top_p": 1.0, "min_p": 1.0, "repetition_penalty": math.inf}
"""Numbers of Sampling that are from 0 to here, and finite."""
OPTIONS = tuple(field.name for field in fields(Sampling))


def merge_options(defaults: Sampling, options: Mapping[str, Any]) -> Sampling:
    """``defaults`` with what ``options`` names; None leaves a default. ValueError for others."""
    for name in options:
        if name not in OPTIONS:
            raise ValueError(f"unknown sampling option {name!r} (there are: {', '.join(OPTIONS)})")
    given = {name: value for name, value in options.items() if value is not None}
    return Sampling(**({name: getattr(defaults, name) for name in OPTIONS} | given))


def default_sampling(
    generation_config: Mapping[str, Any], complain: Callable[[str], object] = lambda text: None
) -> Sampling:
    """What a model's generation_config.json asks for, and transformers where that names nothing:
    greedy unless it says ``do_sample``.

    ``complain`` hears, in a line each, of values that make no sense: they count as not named.
    """
    found: dict[str, Any] = {"temperature": 1.0, "top_k": TOP_K_OF_TRANSFORMERS}
    for name in OPTIONS:
        value = generation_config.get(name)
        if name == "top_k":
            value = as_whole(value)
        if value is None:
            continue
        try:
            Sampling(**{name: value})
        except ValueError as error:
            complain(str(error))
        else:
            found[name] = value
    samples = generation_config.get("do_sample")
    if samples is not None and samples not in (True, False):
        complain(f"do_sample={reprlib.repr(samples)}: must be true or false")
        samples = False
    return Sampling(**(found if samples else found | {"temperature": 0.0}))


def whole(name: str, value: Any, least: int | None = None, meaning: str = "") -> int:
    """A whole number of any kind, such as numpy's, as an int; ValueError for anything else."""
    fits = isinstance(value, Integral) and not isinstance(value, bool)
    if not fits or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name}={reprlib.repr(value)}: must be an int{bound}{meaning}")
    return int(value)


def as_whole(value: Any) -> Any:
    """A number of JSON, which does not tell 20.0 from 20, as an int if it is whole."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _real(name: str, value: Any, high: float) -> float:
    """A number from 0 to ``high`` as a float; ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}={reprlib.repr(value)}: must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (0.0 <= number <= high and math.isfinite(number)):
        bound = f"from 0 to {high:g}" if high < math.inf else "at least 0 and finite"
        raise ValueError(f"{name}={number}: must be {bound}")
    return number


class Sampler:
    """Chooses the tokens of one row.

    Ownership: the thread that runs passes. The random stream is on the CPU, one number a token, so
    that a seed means the same on every device.
    """

    def __init__(self, sampling: Sampling | None = None, *, seed: int | None = None) -> None:
        """The same seed, of which 64 bits count, gives the same draws; None takes a new one each
        time."""
        self.sampling = sampling if sampling is not None else Sampling()
        self._generator = torch.Generator("cpu")
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(whole("seed", seed) % (1 << 64))
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
            scores = self._punish(scores, self._seen_V)
        token = scores.argmax() if self.sampling.temperature == 0 else self._draw(scores)
        if self._seen_V is not None:
            self._seen_V.index_fill_(0, token.view(1), True)
        return token

    def _punish(self, scores_V: torch.Tensor, seen_V: torch.Tensor) -> torch.Tensor:
        """Logits with those of tokens that have been seen less likely; what is finite stays so."""
        penalty, most = in_range(self.sampling.repetition_penalty), torch.finfo(torch.float32).max
        punished = torch.where(scores_V > 0, scores_V / penalty, scores_V * penalty)
        return torch.where(seen_V & scores_V.isfinite(), punished.clamp_(-most, most), scores_V)

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


def in_range(value: float) -> float:
    """A number that float32 can be multiplied with and divided by: one beyond is as good as the
    nearest that it can."""
    return min(max(value, LEAST), 1 / LEAST)


Choice = int | Exception | None
"""The token of a row; what its sampler raised; None: its logits are not numbers."""


def choose_tokens(logits_RV: torch.Tensor, samplers: Sequence[Sampler]) -> list[Choice]:
    """What follows in every row: the one place where generation waits for the device.

    Logits are not numbers if one of a row is nan or +inf, or if none is finite; single ones of
    -inf are legitimate. The largest of a row tells, before samplers change anything: it is found
    together with the likeliest token, and travels to the host beside the tokens.
    """
    count, failed = len(samplers), dict[int, Exception]()
    both = torch.empty(count * 12, dtype=torch.uint8, device=logits_RV.device)
    tokens_R = both[: count * 8].view(torch.int64)
    largest_R = both[count * 8 :].view(torch.float32)
    torch.max(logits_RV.float(), -1, out=(largest_R, tokens_R))
    for i, sampler in enumerate(samplers):
        if sampler.takes_likeliest:
            continue
        try:
            tokens_R[i] = sampler.choose(logits_RV[i])
        except Exception as error:  # of this row: the others go on
            failed[i] = error
    both = both.cpu()
    tokens = both[: count * 8].view(torch.int64).tolist()
    largest = both[count * 8 :].view(torch.float32).tolist()
    return [failed.get(i, tokens[i]) if math.isfinite(largest[i]) else None for i in range(count)]
