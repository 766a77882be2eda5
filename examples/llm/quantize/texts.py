"""A text through a streamed model in one pass over its weights: to calibrate, and to judge.

The text is cut into windows that do not see each other. Each layer takes them one after the other,
so that memory is bounded by one window's temporaries and the residual stream of the whole text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from layer_streamer import LayerStreamer

from ..attention import attend, fast_kernels
from ..dequant import Unpacker
from ..model import decoder_layer, rms_norm
from ..opening import Model
from ..rope import Rotary
from ..weights import StepWeights, embed_tokens, norm_weight, project, widest_row

WINDOW = 1024
"""Tokens that see each other."""
LOGIT_TOKENS = 256
"""Tokens whose logits are made at a time."""


class TextPass:
    """The tokens of a text on their way through the layers of a model, in float32.

    The streamer must have been opened with ``dtype=torch.float32``. Thread rules: one thread.
    """

    def __init__(self, model: Model, streamer: LayerStreamer, ids: Sequence[int]) -> None:
        self._model, self._streamer = model, streamer
        config, names, device = model.config, model.names, streamer.device
        factors = streamer.load_static(names.rope_factors) if names.rope_factors else None
        self._rotary = Rotary(config, device, factors=factors)
        self.unpacker = Unpacker(device, torch.float32, widest_row(model.manifest))
        window = min(WINDOW, config.max_positions)
        self.slices = [
            slice(at, min(at + window, len(ids))) for at in range(0, len(ids), window)
        ]
        self.ids = torch.tensor(ids)

    def embed(self) -> torch.Tensor:
        """The residual stream (tokens, hidden size) as the first layer gets it."""
        names, config = self._model.names, self._model.config
        spec, table = self._model.manifest.static[names.embedding], None
        table = self._streamer.host_tensor(names.embedding)
        rows = (embed_tokens(self.ids[s], table, spec, config, self.unpacker) for s in self.slices)
        return torch.cat(list(rows))

    def layer(self, x_ND: torch.Tensor, weights: StepWeights) -> None:
        """All windows through one layer, in place."""
        config = self._model.config
        longest = max(s.stop - s.start for s in self.slices)
        for part in self.slices:
            positions = torch.arange(part.stop - part.start)
            table = self._rotary.rows(weights.layer_idx, positions)
            x_ND[part] = decoder_layer(x_ND[part], weights, config, table, self._attend)
        assert longest

    def weights(self, tensors: Mapping[str, torch.Tensor], layer_idx: int) -> StepWeights:
        """The weights of a layer as the streamer hands them out."""
        layer = self._model.manifest.layers[layer_idx]
        return StepWeights(tensors, layer, self._model.names, self.unpacker)

    def final_norm(self, x_ND: torch.Tensor) -> torch.Tensor:
        """What the output head gets."""
        names = self._model.names
        weight = norm_weight(self._streamer.load_static(names.norm).float(), names)
        return rms_norm(x_ND, weight, self._model.config.norm_eps)

    def _attend(
        self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        config = self._model.config
        return attend(q, k, v, scale=config.attention_scale, window=config.window(layer_idx))
