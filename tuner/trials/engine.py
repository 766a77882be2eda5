"""Engines over streamed layers, known by the name of a module that opens them.

A name is no import: the tuner knows nothing of engines, and its own process, which opens no device,
never loads one. The processes that need it import the module, which has

* ``plan_engines(path, candidates, **options)``: by candidate, the options of
  ``LayerStreamer.from_checkpoint`` that an engine with these settings would stream with, or a line
  that says why there can be none; nothing is opened;
* ``open_workload(path, alive=, **options)``: an engine, opened, as a :class:`Workload`. ``alive()``
  is to be called now and then, so that a run that takes long is not taken for one that hangs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, Protocol, cast

from ...streamer import LayerStreamer


class Workload(Protocol):
    """An engine with a piece of work to measure."""

    @property
    def streamer(self) -> LayerStreamer: ...

    def run(self) -> Mapping[str, float]:
        """Do the work once; the seconds of its parts."""
        ...


class EngineModule(Protocol):
    """What such a module has."""

    plan_engines: Callable[..., Iterator[Mapping[str, Any] | str]]
    open_workload: Callable[..., Workload]


def load_engine(name: str) -> EngineModule:
    """Import the module. ImportError if it, or what it needs, is not installed."""
    return cast(EngineModule, import_module(name))
