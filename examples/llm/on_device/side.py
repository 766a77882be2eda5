"""One device's side of a runner: what its layers are computed with, and where their tokens are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ..kernels.triton_support import triton_serves
from ..kv.cache import KVCache
from ..models.config import ModelConfig
from ..models.names import WeightNames
from ..models.rope import Rotary
from ..passes.batch import Chunk
from ..passes.chunking import Chunking
from ..passes.decode import open_decoder
from ..passes.layers import Layers
from ..passes.ways import Attention, fastest, reproducible
from ..weights.dequant import Unpacker
from ..weights.scale_check import ScaleCheck
from ..weights.weights import StepWeights, norm_weight


class DeviceSide:
    """Rotations, norms, scratch and residuals of one device, of which no other one's work knows.

    Thread rules: those of the runner. Work goes to the device's current stream.
    """

    def __init__(
        self,
        number: int,
        streamer: Layers,
        config: ModelConfig,
        names: WeightNames,
        kv: KVCache,
        chunking: Chunking,
    ) -> None:
        """``number``: among the streamer's devices. Computes in the dtype of keys and values."""
        dtype, device = kv.layout.dtype, streamer.devices[number]
        self.number, self.device = number, device
        self._config, self._names, self._streamer = config, names, streamer
        self._specs = streamer.manifest.static
        self.check = ScaleCheck()
        if number and names.adapter is not None:  # which the first device has
            self._names = replace(names, adapter=names.adapter.beside(device, dtype))
        parts = names.head_parts
        if streamer.num_steps == streamer.manifest.num_layers:  # the head is loaded, and one has it
            parts = [] if number else [*parts, names.head]
        self._head_parts = {name: self._load(name) for name in parts}
        self._norm = norm_weight(self._load(names.norm).to(dtype), names)
        factors = self._load(names.rope_factors) if names.rope_factors else None
        self.rotary = Rotary(config, device, factors=factors)
        widest = names.widest(dtype, names.cast(device, dtype))
        self.unpacker = Unpacker(device, dtype, widest, kernels=triton_serves(device))
        self.ways = fastest(config, dtype, kv, group_rows=chunking.group_rows)
        if chunking.reproducible:
            interleaved = names.interleaved_rope
            self.ways = reproducible(config, kv, self.rotary, device, interleaved=interleaved)
        with torch.inference_mode(False):
            self.residuals_ND = torch.empty(
                kv.layout.tokens, config.hidden_size, dtype=dtype, device=device
            )
            """Of all tokens of a pass, while it is in a layer of this device."""
        self.decoder = open_decoder(
            streamer,
            config,
            kv,
            self.rotary,
            chunking=chunking,
            interleaved=names.interleaved_rope,
        )

    def _load(self, name: str) -> torch.Tensor:
        return self._streamer.load_static(name, self.device if self.number else None)

    def take(self, x_ND: torch.Tensor) -> torch.Tensor:
        """A pass's residuals, here: as they are, or copied from where another device left them.

        Between GPUs torch orders such a copy, by events, behind what both devices' current streams
        have to do, and before all that follows on them; the host waits for nothing.
        """
        if x_ND.data_ptr() == self.residuals_ND.data_ptr():
            return x_ND
        return self.residuals_ND[: len(x_ND)].copy_(x_ND, non_blocking=True)

    def weights(self, tensors: Mapping[str, torch.Tensor], layer_idx: int) -> StepWeights:
        """A layer's, over what has been handed out of it."""
        layer, arithmetic = self._streamer.manifest.layers[layer_idx], self.ways.arithmetic
        return StepWeights(tensors, layer, self._names, self.unpacker, self.check, arithmetic)

    def attention(self, chunk: Chunk) -> Attention:
        """How the rows of a chunk look back."""
        return self.ways.attention(chunk)

    def rotation(self, chunk: Chunk, layer_idx: int) -> torch.Tensor:
        """Cosines and sines of a chunk's tokens."""
        return self.rotary.rows(layer_idx, chunk.positions, chunk.lengths)

    def final_norm(self, x_ND: torch.Tensor) -> torch.Tensor:
        """What the head gets."""
        return self.ways.arithmetic.rms_norm(x_ND, self._norm, self._config.norm_eps)

    def head(
        self, x_ND: torch.Tensor, tensors: Mapping[str, torch.Tensor], first_row: int
    ) -> torch.Tensor:
        """Logits of the piece of the vocabulary whose rows, from this one on, a step carries."""
        matrix = self._names.head_matrix
        packed = matrix.packed({**self._head_parts, **tensors}, first_row=first_row)
        self.check.see(packed, self._specs[matrix.scale_key])
        return self.ways.arithmetic.project(x_ND, packed, self.unpacker)
