"""Device memory that a step takes beside the model's weights, for who shares a device out."""

from __future__ import annotations

from typing import Any

from .settings import Settings

LEAST = 2 << 30
"""As for any streamed model."""
OF_BLOCK = (24, 8)
"""Numbers of a token that one block keeps for its gradients: so many times the model's width, and
that of its feed-forward part."""
STATES = 16
"""Bytes of a number of an adapter: itself, its gradient, and two of the optimizer's."""


def step_nbytes(config: Any, settings: Settings, length: int) -> int:
    """About what adapters, their optimizer, and activations of a batch of so many tokens a row
    take, rather too much. ``config``: transformers', of a language model; LEAST for an odd one."""
    if not all(hasattr(config, name) for name in ("hidden_size", "num_hidden_layers")):
        return LEAST
    tokens = settings.batch * length
    width, layers = int(config.hidden_size), int(config.num_hidden_layers)
    ffn = int(getattr(config, "intermediate_size", None) or 4 * width)
    kept = 4 * tokens * width * layers  # what blocks are given
    block = 2 * tokens * (OF_BLOCK[0] * width + OF_BLOCK[1] * ffn)
    logits = (2 + 4) * tokens * int(config.vocab_size) + (512 << 20)
    adapters = STATES * settings.rank * layers * (8 * width + 3 * (width + ffn))
    return max(LEAST, kept + max(block, logits) + adapters)
