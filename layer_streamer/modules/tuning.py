"""What the tuner asks of a streamed model: what a pass goes through, and work to measure.

The tuner imports this module in processes of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from ..checkpoint.manifest import FrozenMapping, Manifest
from ..errors import ConfigError
from ..streamer import LayerStreamer, keys_of
from .handle import ModuleStreamer
from .stream import stream

SetupFn: TypeAlias = Callable[..., tuple[nn.Module, Callable[[], object]]]
"""``setup_fn(**settings) -> (model, run)``: opens the model, by ``stream(..., **settings)``."""


class Streamed(NamedTuple):
    """A streamed model, as far as settings are chosen for it."""

    manifest: Manifest
    """Of its largest sequence of blocks: what is planned and predicted. Experts that are brought
    on demand are no part of it."""
    slot_nbytes: int
    """Bytes of one of its slots."""
    taken_nbytes: int
    """Bytes of a device budget that are taken beside that sequence: what is resident outside of
    blocks, the slots of other sequences and of experts."""
    reserve_nbytes: int
    """What is left to activations and caches where no budget is named."""
    unified: bool
    """True on a CPU."""


def describe(**options: Any) -> Streamed:
    """What :func:`open_workload` would open. The model is opened for that, and closed again."""
    work = open_workload(alive=lambda: None, **options)
    try:
        plan, largest = work.handle.plan, work.streamer
        resident = sum(getattr(plan, "resident_nbytes", {}).values())  # of a pipeline
        return Streamed(
            _handed_out(largest),
            _slots(largest) // max(largest.plan.placement.device_slots[0].count, 1),
            resident
            + sum(handle.plan.outside_nbytes for handle in work.handles)
            + sum(some.plan.expert_bytes for some in work.streamers)
            + sum(_slots(some) for some in work.streamers if some is not largest),
            plan.reserve_nbytes,
            largest.plan.machine.unified,
        )
    finally:
        work.close()


def open_workload(
    *,
    alive: Callable[[], object],
    setup_fn: SetupFn | None = None,
    prompt_tokens: int = 0,
    new_tokens: int = 0,
    **options: Any,
) -> Workload:
    """A streamed model and work for it: what ``setup_fn(**options)`` returns; or, without one, the
    text model ``stream(**options)`` (its "path" names it), and a prompt of made-up tokens with some
    tokens after it. ``alive()`` is called after every forward.

    ConfigError for a setup_fn that returns something else, and for a model that writes no text.
    """
    if setup_fn is None:
        model: Any = stream(options.pop("path"), **options)
        run: Any = None
    else:
        found: Any = setup_fn(**options)
        model, run = found if isinstance(found, tuple) and len(found) == 2 else (None, None)
        if not _streamed_in(model):
            raise ConfigError(
                f"setup_fn returned {type(found).__name__}: must be (model, run), the model by "
                "stream(..., **settings)"
            )
    if run is None:
        run = _Text(model, prompt_tokens, new_tokens)
    if not callable(run):
        model.layer_streamer.close()
        raise ConfigError(f"setup_fn returned run={run!r}: must be a function run()")
    return Workload(model, run, alive)


class Workload:
    """A streamed model and ``run()``, which does a piece of work. Thread rules: one thread."""

    def __init__(self, model: Any, run: Callable[[], object], alive: Callable[[], object]) -> None:
        self._run = run
        self.handle: Any = model.layer_streamer
        self._model = model  # it holds what streams
        parts = _streamed_in(model)
        self.handles: list[ModuleStreamer] = [part.layer_streamer for part in parts]
        for part in parts:
            part.register_forward_hook(lambda *_: alive())

    @property
    def streamers(self) -> list[LayerStreamer]:
        """Of all sequences."""
        return [some for handle in self.handles for some in handle._streamers.values()]

    @property
    def streamer(self) -> LayerStreamer:
        """Of the largest sequence of blocks."""
        return max(self.streamers, key=lambda some: sum(x.nbytes for x in some.manifest.layers))

    def run(self) -> Mapping[str, float]:
        """Do it; seconds of its parts, if it has any."""
        found = self._run()
        return found if isinstance(self._run, _Text) and isinstance(found, dict) else {}

    def close(self) -> None:
        """Return all memory. Idempotent."""
        self.handle.close()


def _streamed_in(model: Any) -> list[Any]:
    """The modules of a model that stream: itself, or a pipeline's components."""
    handle = getattr(model, "layer_streamer", None)
    if isinstance(handle, ModuleStreamer):
        return [model]
    return [getattr(model, name) for name in getattr(handle, "components", ())]


def _handed_out(streamer: LayerStreamer) -> Manifest:
    """Its layers, as far as they are handed out."""
    manifest = streamer.manifest
    layers = [
        replace(layer, tensors=FrozenMapping({key: layer.tensors[key] for key in keys}))
        for layer, keys in zip(manifest.layers, keys_of(streamer), strict=True)
    ]
    return replace(manifest, layers=tuple(layers))


def _slots(streamer: LayerStreamer) -> int:
    """Bytes of a device's slots."""
    return streamer.plan.placement.device_slots[0].total_nbytes


class _Text:
    """A prompt of made-up tokens, and some after it, by the model's own ``generate``."""

    def __init__(self, model: Any, prompt_tokens: int, new_tokens: int) -> None:
        if not (hasattr(model, "can_generate") and model.can_generate()):
            model.layer_streamer.close()
            raise ConfigError(
                f"a {type(model).__name__}, which writes no text: say by setup_fn= what is measured"
            )
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        # Spread over the vocabulary, as a text's are: where experts are chosen by token, it counts.
        ids = [(1 + 7919 * i) % vocabulary for i in range(prompt_tokens)]
        self._ids = torch.tensor([ids], device=model.device)
        self._model, self._new_tokens = model, new_tokens
        self._first: float | None = None

    def __call__(self) -> dict[str, float]:
        """Seconds until the first new token was there ("prompt"), and of the others ("decode")."""
        self._first = None
        began = time.perf_counter()
        with torch.no_grad():
            self._model.generate(
                self._ids,
                attention_mask=torch.ones_like(self._ids),
                max_new_tokens=self._new_tokens,
                min_new_tokens=self._new_tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=[self._note],
            )
        ended = time.perf_counter()
        first = self._first or ended
        return {"prompt": first - began, "decode": ended - first}

    def _note(self, ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        """Called after every token; none ends the text."""
        if self._first is None:
            self._first = time.perf_counter()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
