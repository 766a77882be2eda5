"""How well a model predicts a text: its perplexity, in one pass over the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from ..opening import Model
from ..passes.attention import fast_kernels
from ..weights.arithmetic import project
from ..weights.scale_check import ScaleCheck
from ..weights.weights import StepWeights
from .texts import TextPass, float_unpacker, open_streamer

LOGIT_TOKENS = 256
"""Tokens whose logits are made at a time."""

Progress = Callable[[int], object]


def perplexity(
    model: Model, ids: Sequence[int], device: torch.device, on_layer: Progress | None = None
) -> float:
    """exp of the mean negative log-likelihood of each token given those before it in its window.

    The first token of a window is given, not predicted. Computed in float32, in one pass over the
    weights; logits are made for a few tokens and a piece of the vocabulary at a time, so memory is
    bounded by the residual stream of the text. ``on_layer`` hears of each layer as it starts.
    """
    with open_streamer(model, device, head=True) as streamer:
        unpacker, check = float_unpacker(model, device), ScaleCheck()
        with torch.inference_mode(), fast_kernels(device):
            text = TextPass(model, streamer, unpacker, ids)
            matrix, names = model.names.head_matrix, model.names
            resident = {name: streamer.load_static(name) for name in names.head_parts}
            x_ND, likelihood = text.embed(), _Likelihood(text, ids, device)
            layers = model.manifest.layers
            for step, tensors in streamer.sweep():
                if step < len(layers):
                    if on_layer is not None:
                        on_layer(step)
                    weights = StepWeights(tensors, layers[step], names, unpacker, check)
                    text.layer(x_ND, weights)
                    continue
                if step == len(layers):
                    x_ND = text.final_norm(x_ND[likelihood.positions])
                pieces: Mapping[str, torch.Tensor] = {**resident, **tensors}
                piece = matrix.packed(pieces, first_row=likelihood.rows)
                likelihood.add(x_ND, partial(project, packed=piece, unpacker=unpacker))
            check.end()
            return math.exp(-likelihood.mean())


class _Likelihood:
    """Log-likelihoods of tokens, from logits that come piece by piece of the vocabulary."""

    def __init__(self, text: TextPass, ids: Sequence[int], device: torch.device) -> None:
        places = [i for window in text.windows for i in range(window.start, window.stop - 1)]
        self.positions = torch.tensor(places, device=device)
        """Of the tokens after which one is predicted."""
        self._targets = torch.tensor([ids[i + 1] for i in places], device=device)
        self.rows = 0
        """Rows of the head that have been taken in."""
        self._total = torch.full((len(places),), -torch.inf, dtype=torch.float32, device=device)
        self._own = torch.zeros(len(places), dtype=torch.float32, device=device)

    def add(self, x_TD: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Take in the next piece of the head, of which ``head`` makes the logits."""
        count = 0
        for at in range(0, len(x_TD), LOGIT_TOKENS):
            part = slice(at, at + LOGIT_TOKENS)
            logits = head(x_TD[part])
            count = logits.shape[1]
            self._total[part] = torch.logaddexp(self._total[part], logits.logsumexp(-1))
            target = self._targets[part] - self.rows
            here = (target >= 0) & (target < count)
            own = logits.gather(1, target.clamp(0, count - 1)[:, None])[:, 0]
            self._own[part] = torch.where(here, own, self._own[part])
        self.rows += count

    def mean(self) -> float:
        """In nats."""
        return float((self._own - self._total).double().mean())
