"""What is tuned: the streamer's arguments that no candidate changes, and what is measured."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..checkpoint.formats import read_manifest
from ..checkpoint.manifest import Manifest, manifest_from_tensor_info
from ..planning.options import OPTIONS
from ..planning.settings import Settings
from .options import TuneOptions
from .search.space import AXES, Values
from .trials.model_args import encode_model
from .trials.record import TrialSpec
from .trials.setup_fn import name_function

TABLES = tuple(inspect.signature(manifest_from_tensor_info).parameters)
"""Arguments of the published constructors that say what is in a checkpoint."""
SetupFn = Callable[[Any], Callable[[], object]]
"""``setup_fn(streamer) -> run``: what ``run()`` does is measured."""
AnySetupFn = Callable[..., Any]
"""Or that of a streamed model."""


@dataclass(frozen=True, slots=True)
class Model:
    """What is tuned. ConfigError for an option that the streamer does not take."""

    arguments: Mapping[str, Any]
    """Of the streamer, without what is searched. With "path", those of from_checkpoint: settings
    without values have values to try all the same."""
    setup_fn: AnySetupFn | None = None
    engine: str | None = None
    """Dotted name of the module that opens an engine in place of a streamer; "path" and all other
    arguments are the engine's then."""
    streamed: bool = False
    """True: the engine is a model by ``stream()``, whose own code says what a pass goes through."""

    def __post_init__(self) -> None:
        Settings(**self.fixed)

    def read_manifest(self) -> Manifest:
        """What is in the checkpoint. CheckpointError, ConfigError."""
        if "path" in self.arguments:
            return read_manifest(self.arguments["path"], self.arguments.get("layer_pattern"))
        tables: dict[str, Any] = {name: self.arguments.get(name) for name in TABLES}
        return manifest_from_tensor_info(**tables)

    @property
    def fixed(self) -> dict[str, Any]:
        """The part of the streamer's settings that all candidates have."""
        found = {name: value for name, value in self.arguments.items() if name in OPTIONS}
        if "path" not in self.arguments:
            found.pop("dtype", None)  # of the tables: nothing is cast
        return found

    def spec(self, options: TuneOptions) -> TrialSpec:
        """A trial of it, without settings. ConfigError for what a process cannot be handed."""
        arguments = dict(self.arguments)
        on_copy = arguments.pop("on_copy", None) if self.engine is None else None
        return TrialSpec(
            model=encode_model(arguments),
            settings={},
            setup_fn=None if self.setup_fn is None else name_function(self.setup_fn),
            on_copy=None if on_copy is None else name_function(on_copy, "on_copy"),
            engine=self.engine,
            tokens=options.tokens,
            n_runs=options.n_runs,
            sleep_seconds=options.sleep_seconds,
            cache=options.cache,
        )


def split_options(
    options: Mapping[str, Any], door: Callable[..., Any] | None
) -> tuple[dict[str, Values | None], dict[str, Any], dict[str, Any]]:
    """``options`` in three: by setting, what to try ("n_gpu_values" is about "n_gpu"); those of
    what ``door`` opens; and a tune's.

    Those of a ``door`` at their default are left out. TypeError for a name that none has; without a
    ``door`` that is for the engine to say.
    """
    known = inspect.signature(door).parameters if door is not None else {}
    names = {field.name for field in fields(TuneOptions)}
    values, own, tune = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    for name, value in options.items():
        setting = name.removesuffix("_values")
        if name in names:
            tune[name] = value
        elif name in AXES:
            raise TypeError(f"{name}: is searched; name {name}_values=[{value!r}] to fix it")
        elif setting in AXES:
            values[setting] = value
        elif door is not None and name not in known:
            raise TypeError(f"{name}: is no option of the tuner, nor of {door.__qualname__}")
        elif value is not None and (door is None or value != known[name].default):
            own[name] = value
    return values, own, tune
