"""How tokens are chosen, as a caller says it or a model's makers."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

TOP_K_OF_TRANSFORMERS = 50
"""Where neither the caller nor the model's generation_config.json names a top_k."""


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
    presence_penalty: float = 0.0
    """Subtracted from logits of tokens in the text so far, the prompt not counted."""
    frequency_penalty: float = 0.0
    """Subtracted from them as often as they are in the text so far."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Token ids, and what is added to their logits before all else: -100 to 100; -100 rules one
    out. An id may be a decimal string, as in JSON, and pairs may stand for a mapping."""

    def __post_init__(self) -> None:
        for name, bounds in BOUNDS.items():
            object.__setattr__(self, name, _real(name, getattr(self, name), *bounds))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        top_k = whole("top_k", self.top_k, 0, " (0: all tokens)")
        object.__setattr__(self, "top_k", top_k)
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}=0: must be above 0")


BOUNDS = {
    "temperature": (0.0, math.inf), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, math.inf), "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}  # fmt: skip
"""The least and the most of the numbers of Sampling, which are finite."""
OPTIONS = tuple(option.name for option in fields(Sampling))
OF_TRANSFORMERS = OPTIONS[: OPTIONS.index("presence_penalty")]
"""Those that a generation_config.json may name."""


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
    for name in OF_TRANSFORMERS:
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


def _real(name: str, value: Any, low: float, high: float) -> float:
    """A number from ``low`` to ``high`` as a float; ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}={reprlib.repr(value)}: must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (low <= number <= high and math.isfinite(number)):
        bound = f"from {low:g} to {high:g}" if high < math.inf else "at least 0 and finite"
        raise ValueError(f"{name}={number}: must be {bound}")
    return number


def _bias(value: Any) -> dict[int, float]:
    """A logit_bias with ids and numbers; ValueError for anything else."""
    try:
        pairs = dict(value).items()
    except (TypeError, ValueError) as error:
        message = f"logit_bias={reprlib.repr(value)}: must be token ids, each with a number"
        raise ValueError(message) from error
    found = dict[int, float]()
    for key, number in pairs:
        digits = isinstance(key, str) and re.fullmatch("[0-9]{1,18}", key)
        token = whole("a token id of logit_bias", int(key) if digits else key, 0)
        found[token] = _real(f"logit_bias of token {token}", number, -100.0, 100.0)
    return found
