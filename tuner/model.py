"""What is tuned: the streamer's arguments that no candidate changes, and what is measured."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..checkpoint.manifest import Manifest
from ..planning.options import OPTIONS, OnCopy
from ..planning.settings import Settings as StreamerSettings
from .options import TuneOptions
from .search.space import AXES
from .trials.model_args import encode_model
from .trials.record import TrialSpec
from .trials.setup_fn import name_function

SetupFn = Callable[[Any], Callable[[], object]]
"""``setup_fn(streamer) -> run``: what ``run()`` does is measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """What is tuned. ConfigError for an option that the streamer does not take."""

    arguments: Mapping[str, Any]
    """Of the streamer, without what is searched; with "path", those of from_checkpoint."""
    read_manifest: Callable[[], Manifest]
    setup_fn: SetupFn | None = None
    on_copy: OnCopy | None = None
    has_defaults: bool = False
    """True if settings without values have values to try all the same."""
    engine: str | None = None
    """Dotted name of the module that opens an engine in place of a streamer; "path" and all other
    arguments are the engine's then."""

    def __post_init__(self) -> None:
        StreamerSettings(**self.fixed)

    @property
    def name(self) -> str:
        """Of the checkpoint, for people."""
        return Path(self.arguments.get("path", self.arguments.get("model_dir", ""))).name

    @property
    def fixed(self) -> dict[str, Any]:
        """The part of the streamer's settings that all candidates have."""
        found = {name: value for name, value in self.arguments.items() if name in OPTIONS}
        if "path" not in self.arguments:
            found.pop("dtype", None)  # of the tables: nothing is cast
        return found

    def spec(self, options: TuneOptions) -> TrialSpec:
        """A trial of it, without settings. ConfigError for what a process cannot be handed."""
        return TrialSpec(
            model=encode_model(self.arguments),
            settings={},
            setup_fn=None if self.setup_fn is None else name_function(self.setup_fn),
            on_copy=None if self.on_copy is None else name_function(self.on_copy, "on_copy"),
            engine=self.engine,
            tokens=options.tokens,
            n_runs=options.n_runs,
            sleep_seconds=options.sleep_seconds,
            cache=options.cache,
        )


def split_options(
    options: Mapping[str, Any], door: Callable[..., Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``options`` in two: those of what ``door`` opens, and the rest, a tune's.

    Those at their default are left out. TypeError for a name that neither has; without a ``door``
    that is for the engine to say.
    """
    known = inspect.signature(door).parameters if door is not None else {}
    tune = {field.name for field in fields(TuneOptions)}
    own, rest = dict[str, Any](), dict[str, Any]()
    for name, value in options.items():
        if name in tune:
            rest[name] = value
        elif name in AXES:
            raise TypeError(f"{name}: is searched; name {name}_values=[{value!r}] to fix it")
        elif door is not None and name not in known:
            raise TypeError(f"{name}: is no option of the tuner, nor of {door.__qualname__}")
        elif value is not None and (door is None or value != known[name].default):
            own[name] = value
    return own, rest
