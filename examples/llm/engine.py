"""One forward pass after another over a streamed model, with its KV cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from layer_streamer import LayerStreamer

from .attention import attend
from .config import ModelConfig
from .dequant import Unpacker
from .kv_cache import KVCache
from .model import decoder_layer, rms_norm
from .names import WeightNames
from .rope import Rotary
from .weights import StepWeights, embed_tokens, norm_weight, project, widest_row


class Engine:
    """A model whose layers are streamed in every pass, and the one sequence it is working on.

    The streamer must have been opened with ``dtype=dtype`` and ``tail=[names.head]``: the output
    head, often the largest matrix of all, is streamed in pieces after the last layer.
    """

    def __init__(
        self,
        streamer: LayerStreamer,
        config: ModelConfig,
        names: WeightNames,
        *,
        max_positions: int,
        dtype: torch.dtype,
    ) -> None:
        self.streamer, self.config, self.max_positions = streamer, config, max_positions
        self._names = names
        manifest, device = streamer.manifest, streamer.device
        self._specs = manifest.static
        self._table = streamer.host_tensor(names.embedding)
        self._norm = norm_weight(streamer.load_static(names.norm).to(dtype), names)
        factors = streamer.load_static(names.rope_factors) if names.rope_factors else None
        self._rotary = Rotary(config, device, factors=factors)
        self._unpacker = Unpacker(device, dtype, widest_row(manifest))
        self.cache = KVCache(config, max_positions, dtype=dtype, device=device)

    def forward(
        self,
        ids: Sequence[int],
        *,
        every_position: bool = False,
        on_layer: Callable[[int], object] | None = None,
    ) -> torch.Tensor:
        """Append tokens to the sequence, in one pass over the model.

        Returns the float32 logits of what follows the last of them (1, vocab_size), or of what
        follows each (len(ids), vocab_size). ``on_layer`` hears of each layer as it starts.
        """
        start, end = self.cache.length, self.cache.length + len(ids)
        if not ids or end > self.max_positions:
            raise ValueError(f"{len(ids)} tokens after {start}: room is for {self.max_positions}")
        positions = torch.arange(start, end)
        logits: list[torch.Tensor] = []

        def step(
            x_TD: torch.Tensor, tensors: Mapping[str, torch.Tensor], layer_idx: int
        ) -> torch.Tensor:
            if layer_idx < self.config.num_layers:
                if on_layer is not None:
                    on_layer(layer_idx)
                layer = self.streamer.manifest.layers[layer_idx]
                weights = StepWeights(tensors, layer, self._names, self._unpacker)
                table = self._rotary.rows(layer_idx, positions)
                return decoder_layer(x_TD, weights, self.config, table, self._attention)
            if layer_idx == self.config.num_layers:
                x_TD = x_TD if every_position else x_TD[-1:]
                x_TD = rms_norm(x_TD, self._norm, self.config.norm_eps)
            logits.append(self._head(x_TD, tensors))
            return x_TD

        with torch.inference_mode():
            self.streamer.run_pass(self._embed(ids), step)
        self.cache.advance(len(ids))
        return torch.cat(logits, -1)

    def _attention(
        self, layer_idx: int, q_HTE: torch.Tensor, k_GTE: torch.Tensor, v_GTE: torch.Tensor
    ) -> torch.Tensor:
        keys, values = self.cache.append(layer_idx, k_GTE, v_GTE)
        config = self.config
        scale, window = config.attention_scale, config.window(layer_idx)
        return attend(q_HTE, keys, values, scale=scale, window=window)

    def _embed(self, ids: Sequence[int]) -> torch.Tensor:
        spec = self._specs[self._names.embedding]
        return embed_tokens(torch.tensor(ids), self._table, spec, self.config, self._unpacker)

    def _head(self, x_TD: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits of the piece of the vocabulary whose rows this step carries."""
        head = self._names.head
        return project(x_TD, tensors[head], self._specs[head].ggml_type, self._unpacker).float()
