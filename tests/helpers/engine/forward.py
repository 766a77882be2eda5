"""The engine's model functions over a streamed checkpoint, with textbook attention.

What is tested through it is the models: the engine's own caches, masks and chunks are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from layer_streamer import LayerStreamer, read_manifest
from layer_streamer.llm.kernels.fused import rms_norm
from layer_streamer.llm.models.config import ModelConfig, model_config
from layer_streamer.llm.models.model import decoder_layer
from layer_streamer.llm.models.names import WeightNames, weight_names
from layer_streamer.llm.models.rope import Rotary
from layer_streamer.llm.weights.arithmetic import project
from layer_streamer.llm.weights.dequant import Unpacker
from layer_streamer.llm.weights.weights import StepWeights, embed_tokens, norm_weight


class Forward:
    """One sequence; each call appends tokens and gives the float32 logits after each of them."""

    def __init__(
        self, streamer: LayerStreamer, config: ModelConfig, names: WeightNames, dtype: torch.dtype
    ) -> None:
        self.streamer, self.config, self.names, self.dtype = streamer, config, names, dtype
        cast = names.cast(streamer.device, dtype)
        self.unpacker = Unpacker(streamer.device, dtype, names.widest(dtype, cast))
        factors = streamer.load_static(names.rope_factors) if names.rope_factors else None
        self.rotary = Rotary(config, streamer.device, factors=factors)
        self.stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.sinks: torch.Tensor | None = None
        self.length = 0

    def __call__(self, ids: list[int]) -> torch.Tensor:
        streamer, names = self.streamer, self.names
        logits = []
        positions = torch.arange(self.length, self.length + len(ids))
        final = norm_weight(streamer.load_static(names.norm).to(self.dtype), names)

        def step(x, tensors, layer_idx):
            if layer_idx < self.config.num_layers:
                layer = streamer.manifest.layers[layer_idx]
                weights = StepWeights(tensors, layer, names, self.unpacker)
                table, self.sinks = self.rotary.rows(layer_idx, positions), weights.sinks()
                return decoder_layer(x, weights, self.config, table, self.attention)
            if layer_idx == self.config.num_layers:
                x = rms_norm(x, final, self.config.norm_eps)
            packed = names.head_matrix.packed(tensors)
            logits.append(project(x, packed, self.unpacker).float())
            return x

        table = names.embedding_matrix.packed(
            {names.embedding: streamer.host_tensor(names.embedding)}
        )
        with torch.inference_mode():
            x = embed_tokens(torch.tensor(ids), table, self.config, self.unpacker)
            streamer.run_pass(x, step)
        self.length += len(ids)
        return torch.cat(logits, -1).cpu()

    def attention(
        self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        if layer_idx in self.stored:
            before_k, before_v = self.stored[layer_idx]
            k, v = torch.cat((before_k, k), 1), torch.cat((before_v, v), 1)
        self.stored[layer_idx] = k, v
        group = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        distance = self.distance(q.shape[1], k.shape[1], q.device)
        window = self.config.window(layer_idx)
        hidden = (distance < 0) | (distance >= (window or k.shape[1]))
        scores = q.float() @ k.float().transpose(1, 2) * self.config.attention_scale
        scores = scores.masked_fill(hidden, float("-inf"))
        if self.sinks is not None:
            sinks = self.sinks.float()[:, None, None].expand(-1, q.shape[1], 1)
            scores = torch.cat((scores, sinks), -1)
        weights = scores.softmax(-1)[..., : k.shape[1]]
        return (weights @ v.float()).to(v.dtype)

    def distance(self, tokens: int, positions: int, device: torch.device) -> torch.Tensor:
        """How many tokens each of the last queries is behind each position."""
        steps = torch.arange(positions, device=device)
        return steps[positions - tokens :, None] - steps


@contextmanager
def open_forward(path: Path, config: ModelConfig | Any, **options: Any) -> Iterator[Forward]:
    """A forward over a checkpoint; ``config`` is the engine's or a transformers one.

    ``names`` replaces those that the checkpoint gives; the rest goes to the streamer.
    """
    if not isinstance(config, ModelConfig):
        config = model_config(config)
    names = options.pop("names", None) or weight_names(read_manifest(path), config)
    dtype = options.pop("dtype", torch.float32)
    options = {"device": "cpu"} | options
    cast = names.cast(torch.device(options["device"]), dtype)
    options = {"dtype": cast, "tail": [names.head]} | options
    with LayerStreamer.from_checkpoint(path, **options) as streamer:
        yield Forward(streamer, config, names, dtype)
