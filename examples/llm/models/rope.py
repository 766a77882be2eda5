"""Rotary position embedding: the angles of positions, and the rotation of queries and keys."""

from __future__ import annotations

import math

import torch

from ..host_kernels.tokens import rotate as host_rotate
from ..kernels.fused import kernel_rotates, rotate_heads
from .config import ModelConfig
from .rope_config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    Rope,
    YarnScaling,
)


class Rotary:
    """Cosines and sines for any positions of a model, on one device.

    Nothing but the frequencies is kept: the angles of a few thousand tokens cost less than a
    table of the whole context would hold. Layers of one ``config.rope(layer_idx)`` share theirs.
    """

    def __init__(
        self, config: ModelConfig, device: torch.device, *, factors: torch.Tensor | None = None
    ) -> None:
        """``factors`` (head_dim / 2) divide the frequencies; GGUF files carry llama3 scaling this
        way, in a tensor ``rope_freqs.weight``, and it is not applied twice."""
        self._config, self.device = config, device
        self._frequencies: dict[Rope, torch.Tensor] = {}
        for rope in set(config.ropes):
            if factors is not None and isinstance(rope.scaling, Llama3Scaling):
                frequencies = rope_frequencies(Rope(rope.theta), config.head_dim)
            else:
                frequencies = rope_frequencies(rope, config.head_dim)
            if factors is not None:
                frequencies = frequencies / factors.to("cpu", torch.float32)
            self._frequencies[rope] = frequencies.to(device)

    def rows(
        self,
        layer_idx: int,
        positions_T: torch.Tensor,
        lengths_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cosines and sines of T tokens in a layer: (2, T, head_dim / 2), float32.

        ``lengths_T`` is, for each token, how many tokens its sequence has at the end of this pass.
        Only dynamic scaling looks at it, and goes by it as transformers does for one sequence:
        a prompt is rotated for its whole length, and each later token for the length that it
        makes; keys stay as they were rotated. None: one sequence that ends with these tokens.
        """
        rope = self._config.rope(layer_idx)
        positions = positions_T.to(self.device, torch.float32)[:, None]
        frequencies = self._frequencies[rope]
        scaling = rope.scaling
        if isinstance(scaling, DynamicScaling):
            if lengths_T is None:
                lengths_T = (positions_T.max() + 1).expand(len(positions_T))
            lengths = lengths_T.to(self.device, torch.float32)
            frequencies = _dynamic(rope.theta, scaling, lengths, self._config.head_dim)
        angles = positions * frequencies
        table = torch.stack((angles.cos(), angles.sin()))
        if isinstance(scaling, YarnScaling):
            table *= scaling.attention_factor
        return table


def rope_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Angle per position of each pair of elements: (head_dim / 2), float32, on the CPU.

    For dynamic scaling those of the original context, which :class:`Rotary` does not use.
    """
    frequencies = 1.0 / (rope.theta ** _exponents(head_dim, torch.device("cpu")))
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return _llama3(frequencies, scaling)
    if isinstance(scaling, YarnScaling):
        return _yarn(frequencies, scaling, rope.theta)
    return frequencies


def _exponents(head_dim: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim


def _dynamic(
    theta: float, scaling: DynamicScaling, lengths_T: torch.Tensor, head_dim: int
) -> torch.Tensor:
    """Frequencies of each token: (T, head_dim / 2)."""
    original = scaling.original_max_positions
    lengths_T = lengths_T.clamp(min=float(original))
    stretch = scaling.factor * lengths_T / original - (scaling.factor - 1)
    bases = theta * stretch ** (head_dim / (head_dim - 2))
    return 1.0 / (bases[:, None] ** _exponents(head_dim, lengths_T.device))


def _llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / scaling.factor


def _yarn(frequencies: torch.Tensor, scaling: YarnScaling, theta: float) -> torch.Tensor:
    head_dim = 2 * len(frequencies)

    def index(turns: float) -> float:
        """Where among the frequencies is the wave that turns so often over the context."""
        wave = scaling.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wave) / (2 * math.log(theta))

    low, high = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    indices = torch.arange(head_dim // 2, dtype=torch.float32, device=frequencies.device)
    stretched = ((indices - low) / width).clamp(0, 1)
    return frequencies / scaling.factor * stretched + frequencies * (1 - stretched)


def rotate(x_HTE: torch.Tensor, table_2TE: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Rotate each head's pairs of elements by the angle of its token's position.

    ``table_2TE`` holds the :meth:`Rotary.rows` of these T tokens. A pair is (i, i + E/2);
    with ``interleaved`` it is (2i, 2i + 1), which is how the rows of q and k in llama GGUF files
    are permuted. Both give the pairs back as (i, i + E/2): the permutation is undone on a few
    activations for free, where undoing it on the weights would move every row on every pass.
    """
    if kernel_rotates(x_HTE, table_2TE):
        return rotate_heads([x_HTE], table_2TE, interleaved=interleaved)[0]
    return plain_rotate(x_HTE, table_2TE, interleaved=interleaved)


def rotate_both(
    q_HTE: torch.Tensor, k_GTE: torch.Tensor, table_2TE: torch.Tensor, *, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rotate`` of queries and keys of one dtype, T and E: in one launch where a kernel serves."""
    if kernel_rotates(q_HTE, table_2TE) and k_GTE.stride(-1) == 1:
        q_HTE, k_GTE = rotate_heads([q_HTE, k_GTE], table_2TE, interleaved=interleaved)
        return q_HTE, k_GTE
    turned = [host_rotate(x, table_2TE, interleaved=interleaved) for x in (q_HTE, k_GTE)]
    if turned[0] is not None and turned[1] is not None:
        return turned[0], turned[1]
    if q_HTE.shape[1] == 1:  # calls take longer than their work
        both = plain_rotate(torch.cat((q_HTE, k_GTE)), table_2TE, interleaved=interleaved)
        return both[: len(q_HTE)], both[len(q_HTE) :]
    return (
        plain_rotate(q_HTE, table_2TE, interleaved=interleaved),
        plain_rotate(k_GTE, table_2TE, interleaved=interleaved),
    )


def plain_rotate(
    x_HTE: torch.Tensor, table_2TE: torch.Tensor, *, interleaved: bool
) -> torch.Tensor:
    """``rotate`` in torch operations."""
    if interleaved:
        first, second = x_HTE.float().unflatten(-1, (-1, 2)).unbind(-1)
    else:
        first, second = x_HTE.float().chunk(2, -1)
    cos, sin = table_2TE
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return turned.to(x_HTE.dtype)
