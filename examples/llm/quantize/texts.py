"""A text through a streamed model in one pass over its weights: to calibrate, and to judge.

The text is cut into windows that do not see each other. Each layer takes them one after the other,
so that memory is bounded by one window's temporaries and the residual stream of the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from layer_streamer import LayerStreamer

from ..kernels.fused import rms_norm
from ..models.model import decoder_layer
from ..models.rope import Rotary
from ..opening import Model
from ..passes.attention import attend
from ..weights.dequant import Unpacker, Widest
from ..weights.weights import StepWeights, embed_tokens, norm_weight

WINDOW = 1024
"""Tokens that see each other."""


def open_streamer(model: Model, device: torch.device, *, head: bool = False) -> LayerStreamer:
    """The model's layers as they are stored, with the output head after them if asked for.

    In the least memory: two slots on the device, and none of the files kept in host memory.
    """
    return LayerStreamer.from_checkpoint(
        model.manifest,
        device=device,
        n_gpu=1,
        n_cpu_pinned=0,  # which on a CPU would be more slots
        read_mode="buffered",
        tail=[model.names.head] if head else [],
    )


def float_unpacker(model: Model, device: torch.device) -> Unpacker:
    """Unpacks any matrix of the model to float32, those that are floats of another dtype, too."""
    names = model.names
    matrices = [names.embedding_matrix, names.head_matrix]
    matrices += [matrix for layer in names.layers for matrix in layer.values()]
    widest = Widest.of((matrix.format, matrix.width, matrix.ordered) for matrix in matrices)
    return Unpacker(device, torch.float32, widest)


class TextPass:
    """The tokens of a text on their way through the layers of a model, in float32.

    ``streamer`` is :func:`open_streamer`'s. Thread rules: one thread.
    """

    def __init__(
        self, model: Model, streamer: LayerStreamer, unpacker: Unpacker, ids: Sequence[int]
    ) -> None:
        self._model, self._streamer, self._unpacker = model, streamer, unpacker
        factors = model.names.rope_factors
        self._rotary = Rotary(
            model.config,
            streamer.device,
            factors=streamer.load_static(factors) if factors else None,
        )
        self._ids = torch.tensor(ids, device="cpu")
        self.windows = windows(len(ids), model.config.max_positions)

    def embed(self) -> torch.Tensor:
        """The residual stream (tokens, hidden size) as the first layer gets it."""
        names, config = self._model.names, self._model.config
        matrix = names.embedding_matrix
        table = matrix.packed({k: self._streamer.host_tensor(k) for k in matrix.keys.values()})
        parts = (embed_tokens(self._ids[w], table, config, self._unpacker) for w in self.windows)
        return torch.cat(list(parts))

    def layer(self, x_ND: torch.Tensor, weights: StepWeights) -> None:
        """All windows through one layer, in place."""
        config = self._model.config
        for window in self.windows:
            positions = torch.arange(window.stop - window.start, device="cpu")
            table = self._rotary.rows(weights.layer_idx, positions)
            look = partial(self._attend, sinks_H=weights.sinks())
            x_ND[window] = decoder_layer(x_ND[window], weights, config, table, look)

    def final_norm(self, x_ND: torch.Tensor) -> torch.Tensor:
        """What the output head gets."""
        names = self._model.names
        weight_D = norm_weight(self._streamer.load_static(names.norm).float(), names)
        return rms_norm(x_ND, weight_D, self._model.config.norm_eps)

    def _attend(
        self,
        layer_idx: int,
        q_HTE: torch.Tensor,
        k_GTE: torch.Tensor,
        v_GTE: torch.Tensor,
        *,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor:
        config = self._model.config
        scale, window = config.attention_scale, config.window(layer_idx)
        return attend(q_HTE, k_GTE, v_GTE, scale=scale, window=window, sinks_H=sinks_H)


def windows(tokens: int, most: int) -> list[slice]:
    """Which tokens see each other: up to WINDOW, and no more than the model's context."""
    size = min(WINDOW, most)
    return [slice(at, min(at + size, tokens)) for at in range(0, tokens, size)]
