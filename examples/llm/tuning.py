"""What the tuner asks of an engine: how it would share out memory, and a piece of work to measure.

The tuner knows this module by its name alone, and imports it in processes of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from layer_streamer import LayerStreamer, StreamerError

from .engine import StreamingEngine
from .memory.wishes import Wishes
from .models.config import ModelConfig
from .opening import Limits, Model, place, plan_memory
from .request import Request
from .scheduling.client import Client
from .text.sampling import Sampler

logger = logging.getLogger(__name__)


def plan_engines(
    path: str | Path, candidates: Sequence[Mapping[str, Any]], **options: Any
) -> Iterator[dict[str, Any] | str]:
    """By candidate, the streamer's options that the engine would open it with; nothing is opened.

    Or, in a line, why there can be no such engine. ``options`` are those of :func:`open_workload`,
    the same for all. Raises what reading the model raises: ValueError, OSError, StreamerError.
    """
    pattern = {name: options.pop(name) for name in ("layer_pattern",) if name in options}
    model = Model.read(path, logger.info, **pattern)
    for candidate in candidates:
        try:
            yield _plan(model, {**options, **candidate})
        except (ValueError, TypeError, StreamerError) as error:
            yield " ".join(str(error).split())


def open_workload(
    path: str | Path,
    *,
    prompt_tokens: int,
    new_tokens: int,
    alive: Callable[[], object],
    **options: Any,
) -> Workload:
    """An engine with ``options``, and a prompt for it. ``alive()`` is called after every pass.

    Raises what StreamingEngine raises, and ValueError if it has no room for so many tokens.
    """
    engine = StreamingEngine(path, notify=logger.info, **options)
    try:
        check_room(engine.config, engine.max_length, prompt_tokens, new_tokens)
    except ValueError:
        engine.close()
        raise
    return Workload(engine, prompt_tokens, new_tokens, alive)


class Workload:
    """A prompt of made-up tokens, and some tokens after it. Thread rules: one thread."""

    def __init__(
        self,
        engine: StreamingEngine,
        prompt_tokens: int,
        new_tokens: int,
        alive: Callable[[], object],
    ) -> None:
        self._engine, self._new_tokens, self._alive = engine, new_tokens, alive
        # Spread over the vocabulary, as a text's are: where experts are chosen by token, it counts.
        vocab_size = engine.config.vocab_size
        self._ids = [(1 + 7919 * i) % vocab_size for i in range(prompt_tokens)]

    @property
    def streamer(self) -> LayerStreamer:
        return self._engine.streamer

    def run(self) -> dict[str, float]:
        """One prompt: its pass, which gives the first new token, and a pass for each further one.

        Seconds of both parts. No token ends the text, so that every run is as long.
        """
        places = len(self._ids) + self._new_tokens
        request = Request(0, self._ids, self._new_tokens, Sampler(), None, places)
        self._engine.scheduler.places.forget()  # or the run before had computed the prompt
        # No more than the engine's own loop, without a tokenizer.
        for _ in Client(self._engine.scheduler, [request]).events():
            self._alive()
        if request.error is not None:
            raise request.error
        return {"prompt": request.prompt_seconds, "decode": request.decode_seconds}

    def close(self) -> None:
        """Return all memory. Idempotent."""
        self._engine.close()


def check_room(config: ModelConfig, length: int, prompt_tokens: int, new_tokens: int) -> None:
    """ValueError unless a row of ``length`` tokens holds prompt and text."""
    if prompt_tokens + new_tokens > length:
        raise ValueError(
            f"prompt_tokens={prompt_tokens} and new_tokens={new_tokens}: max_length={length} "
            f"(the model's context is {config.max_positions}) has no room for them"
        )


def _plan(model: Model, options: dict[str, Any]) -> dict[str, Any]:
    """The streamer's options in an engine with these options."""

    def take(*names: str) -> dict[str, Any]:
        return {name: options.pop(name) for name in names if name in options}

    tokens = take("prompt_tokens", "new_tokens")
    limits = Limits(**take(*(field.name for field in fields(Limits))))
    check_room(model.config, limits.length(model.config), **tokens)
    wishes = take(*(field.name for field in fields(Wishes) if field.name != "options"))
    chosen = {"device": None, "dtype": None, **take("device", "dtype")}
    streamed, dtype = place(model, chosen["device"], chosen["dtype"], options)
    plan, _ = plan_memory(model, limits, Wishes(options=streamed, **wishes), dtype)
    return dict(plan.options)
