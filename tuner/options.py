"""How a tune goes about it, as a value: validated once, never changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..errors import ConfigError
from ..planning.budget import parse_bytes
from ..planning.options import Bytes, FixedOptions
from .search.race import Strategy
from .trials.record import CacheState, TrialLimits

MAX_RUNS = 1000
MAX_TOKENS = 1 << 24


class _Common(FixedOptions, total=False):
    tokens: int
    cache: CacheState
    strategy: Strategy
    margin: float | None
    tolerance: float
    max_seconds: float | None
    max_device_bytes: Bytes | None
    max_host_bytes: Bytes | None
    trial_seconds: float
    hang_seconds: float
    results_path: str | Path | None
    track_progress: bool


class TuneKeywords(_Common, total=False):
    """The fields of :class:`TuneOptions` as keyword arguments, and the streamer's own options."""

    layer_pattern: str | None
    n_runs: int
    sleep_seconds: float


class TuneValues(_Common, total=False):
    """What the published constructor takes beside its own arguments."""

    read_mode_values: Sequence[str] | None
    read_threads_values: Sequence[int | None] | None
    read_chunk_values: Sequence[int | None] | None
    device_budget_values: Sequence[Bytes | None] | None
    host_budget_values: Sequence[Bytes | None] | None
    host_layers_values: Sequence[int | Literal["auto"] | None] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneOptions:
    """Every option of a tune that is no candidate's own."""

    n_runs: int = 4
    """Runs of each candidate, of which the first is discarded; >= 2."""
    sleep_seconds: float = 0.0
    """Pause before each measured run (and its untimed one), for machines that grow hot."""
    tokens: int = 1
    """Vectors that each matrix is multiplied by where there is no ``setup_fn``."""
    cache: CacheState = "warm"
    """The page cache before each measured run."""
    strategy: Strategy = "race"
    margin: float | None = 0.1
    """A run is ended once it is slower than the best by this share of it; None: never."""
    tolerance: float = 0.02
    """A race ends once no candidate that is left can be better by more than this share."""
    max_seconds: float | None = None
    """For the whole tune."""
    max_device_bytes: Bytes | None = None
    """The most that a candidate may take of each device."""
    max_host_bytes: Bytes | None = None
    """The same of host memory, page cache that it only maps not counted."""
    trial_seconds: float = 600.0
    """For one trial, from its start to its result."""
    hang_seconds: float = 120.0
    """For any stage of a trial (opening, setup, one run)."""
    results_path: str | Path | None = None
    """The results file; None: in the user's cache directory, under the tune's fingerprint."""
    track_progress: bool = True

    def __post_init__(self) -> None:
        check_int("n_runs", self.n_runs, 2, MAX_RUNS)
        check_int("tokens", self.tokens, 0, MAX_TOKENS)
        for name in ("sleep_seconds", "tolerance"):
            _check_number(name, getattr(self, name), zero=True)
        if self.margin is not None:
            _check_number("margin", self.margin, zero=True)
        for name in ("trial_seconds", "hang_seconds", "max_seconds"):
            if getattr(self, name) is not None or name != "max_seconds":
                _check_number(name, getattr(self, name), zero=False)
        for name in ("max_device_bytes", "max_host_bytes"):
            if getattr(self, name) is not None:
                parse_bytes(name, getattr(self, name))
        for name, kind in (("strategy", Strategy), ("cache", CacheState)):
            if getattr(self, name) not in get_args(kind):
                allowed = " or ".join(map(repr, get_args(kind)))
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be {allowed}")

    def granted(self, name: str) -> int | None:
        """``max_device_bytes`` or ``max_host_bytes`` in bytes."""
        value = getattr(self, name)
        return None if value is None else parse_bytes(name, value)

    @property
    def limits(self) -> TrialLimits:
        """How far the first trial may go."""
        return TrialLimits(
            margin=0.0 if self.margin is None else self.margin,
            trial_seconds=self.trial_seconds,
            hang_seconds=self.hang_seconds,
            max_host_bytes=self.granted("max_host_bytes"),
        )


def check_int(name: str, value: object, low: int, high: int) -> None:
    """ConfigError unless ``value`` is an int from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r}: must be an int from {low} to {high}")


def _check_number(name: str, value: object, *, zero: bool) -> None:
    fits = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (value > 0 or (zero and value == 0))
    )
    if not fits:
        bound = "at least 0" if zero else "above 0"
        raise ConfigError(f"{name}={value!r}: must be a number, {bound}")
