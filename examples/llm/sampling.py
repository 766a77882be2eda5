"""Choosing the next token from the logits."""

from __future__ import annotations

import torch


class Sampler:
    """Greedy at temperature 0, else draws from softmax(logits / temperature)."""

    def __init__(self, temperature: float = 0.0, *, seed: int | None = None) -> None:
        """The same seed gives the same draws; None takes a new one each time."""
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature={temperature}: must be at least 0 and finite")
        self.temperature = temperature
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, logits_V: torch.Tensor) -> int:
        if self.temperature == 0:
            return int(logits_V.argmax())
        # Drawn on the CPU in float32, so that a seed means the same on every device.
        scaled = logits_V.float().cpu() / self.temperature
        return int(torch.multinomial(scaled.softmax(-1), 1, generator=self._generator))
