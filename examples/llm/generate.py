"""Text generation and scoring, token by token, over an engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
import torch.nn.functional as F

from .engine import Engine
from .sampling import Sampler


def generate(
    engine: Engine,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    sampler: Sampler | None = None,
    on_prompt_layer: Callable[[int], object] | None = None,
) -> Iterator[int]:
    """Yield new token ids after the prompt, each as soon as it is known.

    Ends after ``max_new_tokens`` or with the first id of ``stop_ids``, which is yielded too.
    The first pass takes the whole prompt, each later one the token before.
    """
    choose = sampler or Sampler()
    ids = list(prompt_ids)
    for _ in range(max_new_tokens):
        logits = engine.forward(ids, on_layer=on_prompt_layer)
        token, on_prompt_layer = choose(logits[-1]), None
        yield token
        if token in stop_ids:
            return
        ids = [token]


def mean_nll(engine: Engine, ids: Sequence[int]) -> float:
    """Mean negative log-likelihood of each token of a text given those before it, in nats."""
    logits = engine.forward(ids, every_position=True)[:-1]
    targets = torch.tensor(ids[1:], device=logits.device)
    return float(F.cross_entropy(logits.double(), targets))
