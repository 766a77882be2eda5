"""Routing of which one knows how often each expert is chosen, for models of random weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from layer_streamer.llm.models import feed_forward

DRAWS = 1024
"""Tokens, after which the same draws come again."""


class Zipf:
    """Logits in place of a router's, by which the engine chooses as by any: draws that were made
    before, one of each layer for each token in turn, kept on the device, so that captured passes
    look them up there."""

    def __init__(
        self, layers: int, count: int, each: int, exponent: float, most: int, device: torch.device
    ) -> None:
        """``count`` experts in each layer, ``each`` of them a token; ``most`` tokens a pass."""
        dice = np.random.default_rng(0)
        p = (np.arange(count) + 1.0) ** -exponent
        orders = [dice.permutation(count) for _ in range(layers)]
        draws = [
            [
                np.sort(order[dice.choice(count, each, replace=False, p=p / p.sum())])
                for order in orders
            ]
            for _ in range(DRAWS)
        ]
        self.draws = np.array(draws)  # (draws, layers, each)
        logits = np.full((layers, DRAWS, count), -1e4)
        np.put_along_axis(
            logits, self.draws.transpose(1, 0, 2), dice.standard_normal((layers, DRAWS, each)), 2
        )
        self._logits = torch.from_numpy(logits).to(device, torch.bfloat16)
        self._turn = torch.zeros(1, dtype=torch.long, device=device)
        self._turns = torch.zeros(most, dtype=torch.long, device=device)
        self._choose = feed_forward.choose

    def __call__(
        self, x_TD: torch.Tensor, weights: Any, experts: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``feed_forward.choose``."""
        turns, count = self._turns[: len(x_TD)], len(x_TD)
        if weights.layer_idx == 0:
            self._turn.add_(count)
            turns.copy_((self._turn + torch.arange(count, device=x_TD.device)) % DRAWS)
        return self._choose(
            x_TD, Rerouted(weights, self._logits[weights.layer_idx], turns), experts
        )

    def steps(self, turn: int, count: int) -> list[list[tuple[int, int]]]:
        """What ``count`` tokens ask for from this turn on, layer by layer."""
        rows = [self.draws[(turn + i) % DRAWS] for i in range(count)]
        return [[(i, int(e)) for e in ids] for row in rows for i, ids in enumerate(row)]

    @property
    def turn(self) -> int:
        return int(self._turn)


class Rerouted:
    """A layer's weights, whose router's product is computed and not used."""

    def __init__(self, weights: Any, logits_NX: torch.Tensor, turns_T: torch.Tensor) -> None:
        self.arithmetic, self._weights = weights.arithmetic, weights
        self._logits_NX, self._turns_T = logits_NX, turns_T

    def linear(self, x_TD: torch.Tensor, module: str) -> torch.Tensor:
        self._weights.linear(x_TD, module)
        return self._logits_NX.index_select(0, self._turns_T)
