"""Rotary position embedding: the table of angles, and the rotation of queries and keys."""

from __future__ import annotations

import math

import torch

from .config import Llama3Scaling, ModelConfig


def rotary_table(
    config: ModelConfig, num_positions: int, *, factors: torch.Tensor | None = None
) -> torch.Tensor:
    """Cosines and sines of every position's angles: (2, num_positions, head_dim / 2), float32.

    ``factors`` (head_dim / 2) divide the frequencies; GGUF files carry llama3 scaling this way,
    in a tensor ``rope_freqs.weight``.
    """
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**steps)
    if factors is not None:
        frequencies = frequencies / factors.cpu().float()
    elif config.rope_scaling is not None:
        frequencies = _llama3(frequencies, config.rope_scaling)
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)
    return torch.stack((angles.cos(), angles.sin()))


def _llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Slow waves are stretched by ``factor``, fast ones kept, those between blended."""
    context = scaling.original_max_positions
    turns = context * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / scaling.factor


def rotate(x_HTE: torch.Tensor, table_2TE: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Rotate each head's pairs of elements by the angle of its token's position.

    ``table_2TE`` holds the rows of :func:`rotary_table` for these T tokens. A pair is (i, i + E/2);
    with ``interleaved`` it is (2i, 2i + 1), which is how the rows of q and k in llama GGUF files
    are permuted. Both give the pairs back as (i, i + E/2): the permutation is undone on a few
    activations for free, where undoing it on the weights would move every row on every pass.
    """
    if interleaved:
        first, second = x_HTE.float().unflatten(-1, (-1, 2)).unbind(-1)
    else:
        first, second = x_HTE.float().chunk(2, -1)
    cos, sin = table_2TE
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return turned.to(x_HTE.dtype)
