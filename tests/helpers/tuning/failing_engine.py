"""An engine for trials that go wrong, each as a setup function of tuner_setups does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tuner_setups

from layer_streamer import LayerStreamer


class Workload:
    def __init__(self, streamer: LayerStreamer, run: Callable[[], object]) -> None:
        self.streamer, self._run = streamer, run

    def run(self) -> Mapping[str, float]:
        self._run()
        return {"prompt": 1.0, "decode": 2.0}


def plan_engines(
    path: str, candidates: Sequence[Mapping[str, Any]], how: str, **options: Any
) -> Iterator[dict[str, Any]]:
    if how == "cannot be planned":
        raise ValueError("a model that\nno engine knows")
    if how == "segfaults when it plans":
        tuner_setups.segfaults(None)()
    return ({"device": "cpu", **candidate} for candidate in candidates)


def open_workload(path: str, how: str, alive: Callable[[], object], **settings: Any) -> Workload:
    settings.pop("prompt_tokens", None), settings.pop("new_tokens", None)
    streamer = LayerStreamer.from_checkpoint(path, device="cpu", **settings)
    return Workload(streamer, getattr(tuner_setups, how)(streamer))
