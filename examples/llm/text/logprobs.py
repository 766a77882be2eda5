"""How likely a row's tokens were, by the model's own account.

Of the raw logits, in float32: before bias, penalties, temperature and what else chooses a token.
That is what vLLM and llama.cpp give unless they are told otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MOST = 20
"""Of the likeliest tokens beside each."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token of a text: the logarithm of its probability, and of that of the likeliest ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token, logprob), the likeliest first; -inf of one that the model rules out."""


def width(top: int, vocab_size: int) -> int:
    """How many numbers :func:`measure` gives."""
    return 1 + 2 * min(top, vocab_size)


def measure(logits_V: torch.Tensor, token: torch.Tensor, top: int) -> torch.Tensor:
    """What :func:`read` makes a record of: float64, of :func:`width`, on the logits' device, where
    ``token`` is a scalar (below 0: none). Nothing waits for the device.

    Always of one row alone: so the numbers are the same bits whatever is looked at beside it.
    """
    logprobs_V = logits_V.float().log_softmax(0)
    own = logprobs_V.index_select(0, token.clamp(min=0).view(1))
    values, ids = logprobs_V.topk(min(top, len(logprobs_V)))
    return torch.cat((own.double(), ids.double(), values.double()))


def read(token: int, numbers: Sequence[float]) -> TokenLogprob:
    """The record of a token; equally likely ones are in the order of their ids."""
    count = (len(numbers) - 1) // 2
    pairs = zip(map(int, numbers[1 : 1 + count]), numbers[1 + count :], strict=True)
    top = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
    return TokenLogprob(token, numbers[0], tuple(top))
