"""Texts to vectors: what the model's final norm gives of a text's tokens, on average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from ..errors import EngineError
from .batch import Batch

if TYPE_CHECKING:
    from .runner import Runner, Step

AT_A_TIME = 256
"""Tokens: of more, what the norm gives has no place in the memory plan."""


def vectors(runner: Runner, prompts: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
    """Of each prompt, in their order, a vector of length 1: float32, (hidden_size,), on the CPU.

    A pass takes as many prompts as there is room for, and is done when its first vector is asked
    for. EngineError if there is no room for one at present. Rows are there during a pass alone.
    """
    at = 0
    while at < len(prompts):
        found = _some(runner, prompts[at:])
        at += len(found)
        yield from found


def _some(runner: Runner, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Of the first ones."""
    kv_rows, rows, count = runner.kv.rows, [], 0
    try:
        for ids in prompts:
            count += len(ids)
            row = kv_rows.add(len(ids)) if count <= runner.most_tokens else None
            if row is None:
                break
            rows.append(row)
        if not rows:
            raise EngineError("there is no room for another text at present: try again later")
        pooling = _Pooling(runner, [len(ids) for ids, _ in zip(prompts, rows, strict=False)])
        runner.repeat(list(zip(rows, prompts, strict=False)), pooling.around)
    finally:
        for row in rows:
            kv_rows.drop(row)
    return pooling.found


class _Pooling:
    """The step of a pass, which also looks at what the last layer leaves."""

    def __init__(self, runner: Runner, counts: Sequence[int]) -> None:
        self._parts = list(pairwise([0, *accumulate(counts)]))
        self._runner = runner
        self.found: list[torch.Tensor] = []

    def around(self, step: Step, batch: Batch, x_ND: torch.Tensor) -> Step:
        def looked_at(
            x_ND: torch.Tensor, tensors: Mapping[str, torch.Tensor], layer_idx: int
        ) -> torch.Tensor:
            result = step(x_ND, tensors, layer_idx)
            if layer_idx == self._runner.config.num_layers - 1:
                self.found = [self._pool(result[first:end]) for first, end in self._parts]
            return result

        return looked_at

    def _pool(self, x_ND: torch.Tensor) -> torch.Tensor:
        sums = [self._runner.final_norm(x_TD).float().sum(0) for x_TD in x_ND.split(AT_A_TIME)]
        mean = torch.stack(sums).sum(0) / len(x_ND)
        return torch.nn.functional.normalize(mean, dim=0).cpu()
