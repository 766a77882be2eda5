"""The loss of a batch in little memory: of logits that have a gradient, that is put in their place.

A row of logits has as many numbers as the vocabulary has tokens. A loss as it is usually written
holds them four times, twice of that in float32. Here all is done chunk by chunk of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from .samples import UNSAID

CHUNK_NBYTES = 128 << 20
"""Of float32 logits at a time."""


class _InPlace(torch.autograd.Function):
    """Sum of the losses of rows; the logits (N, V) become its gradient, and are nothing else then.

    What has kept the logits for its own backward raises torch's error: they were changed.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits_NV.device)
        for begin, end in _chunks(logits_NV):
            labels = labels_N[begin:end]
            scores = logits_NV[begin:end].float().log_softmax(-1)
            total += functional.nll_loss(scores, labels, ignore_index=UNSAID, reduction="sum")
            said = (labels != UNSAID).nonzero().squeeze(-1)
            gradient = scores.exp_()
            gradient[said, labels[said]] -= 1
            gradient[labels == UNSAID] = 0
            logits_NV[begin:end].copy_(gradient)
        ctx.gradient_NV = logits_NV.detach()
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient, ctx.gradient_NV = ctx.gradient_NV, None
        return gradient.mul_(outer[0].to(gradient.dtype)), None


def token_loss(
    logits_BTV: torch.Tensor, labels_BT: torch.Tensor, learned: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Mean negative log-likelihood of labels, float32, each by the logits of the token before.

    ``learned``: what the sum is divided by, where several batches make a step; None: the labels of
    this one that are not UNSAID. The logits are written to if they have a gradient, and must not be
    looked at then.
    """
    width = logits_BTV.shape[-1]
    labels_N = functional.pad(labels_BT, (0, 1), value=UNSAID)[:, 1:].reshape(-1)
    labels_N = labels_N.to(logits_BTV.device)
    logits_NV = logits_BTV.reshape(-1, width)
    if learned is None:
        learned = (labels_N != UNSAID).sum().clamp(min=1)
    if torch.is_tensor(learned):
        learned = learned.to(logits_BTV.device)
    if logits_NV.requires_grad:
        total: torch.Tensor = _InPlace.apply(logits_NV, labels_N)  # type: ignore[no-untyped-call]
        return total / learned
    total = torch.zeros((), dtype=torch.float32, device=logits_BTV.device)
    for begin, end in _chunks(logits_NV):
        total += functional.cross_entropy(
            logits_NV[begin:end].float(), labels_N[begin:end], ignore_index=UNSAID, reduction="sum"
        )
    return total / learned


def _chunks(logits_NV: torch.Tensor) -> list[tuple[int, int]]:
    count, width = logits_NV.shape
    size = max(CHUNK_NBYTES // (4 * width), 1)
    return [(begin, min(begin + size, count)) for begin in range(0, count, size)]
