"""Products, norms and activations of a pass: the fastest way, or one of which a token's result does
not depend, to the bit, on how many tokens share the pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F

from ..host_kernels import tokens as host_tokens
from ..kernels import fused
from ..kernels.fused import (
    add_rms_norm,
    kernel_multiplies,
    multiply,
    plain_rms_norm,
    rms_norm,
    swiglu,
)
from ..kernels.triton_support import triton_serves
from .dequant import Unpacker
from .packed import FLOATS, Packed

TILE = 16
"""Tokens of a product on a CPU where results may not depend on their number: always so many, of
zeros if need be. Fewer cost less where one token decodes, more where many share a pass."""
ADDED = 16 * TILE
"""Tokens whose products are added to others at a time: a whole number of tiles."""
BLOCK_ELEMENTS = 1 << 20
"""Weights of such a product, which stay in the cache from tile to tile."""
ALIGNED = 32
"""Numbers of a token in a tile are rounded up to a multiple: whole lines of a cache."""
LEAST_WIDTH = 64
"""Of a matrix, for what its products are counted as."""
GELU = "gelu_pytorch_tanh"

Tensor = torch.Tensor
PerToken = Callable[[Tensor], tuple[Tensor, ...]]
"""Of tensors with a row for each token, from one of them."""


class Arithmetic(Protocol):
    """What computes a pass, beside attention."""

    @property
    def by_slot(self) -> bool:
        """Tokens may be multiplied by experts in their slots, if they are few."""

    def project(
        self, x_TD: Tensor, packed: Packed, unpacker: Unpacker, bias_N: Tensor | None = None
    ) -> Tensor:
        """x times a transposed weight, packed or not, plus a bias: (T, rows).

        The product is rounded to the dtype of x before the bias is added, whoever computes it.
        """

    def add_product(self, y_TN: Tensor, x_TD: Tensor, weight_ND: Tensor) -> Tensor:
        """y plus x times a transposed weight, floats of one dtype, in y and hardly more memory."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Scale each token to a mean square of 1, in float32, then by the weight, in its dtype."""

    def add_rms_norm(
        self, x_TD: Tensor, added_TD: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """x + added, and its norm."""

    def gated(self, gate_TF: Tensor, up_TF: Tensor, activation: str) -> Tensor:
        """activation(gate) * up, perhaps in the memory of ``gate``."""

    def each(self, function: PerToken, x_TD: Tensor) -> tuple[Tensor, ...]:
        """A function of every token by itself, given all at once."""


class Fastest:
    """What is fastest for as many tokens as there are."""

    by_slot = True

    def project(
        self, x_TD: Tensor, packed: Packed, unpacker: Unpacker, bias_N: Tensor | None = None
    ) -> Tensor:
        return project(x_TD, packed, unpacker, bias_N)

    def add_product(self, y_TN: Tensor, x_TD: Tensor, weight_ND: Tensor) -> Tensor:
        return y_TN.addmm_(x_TD, weight_ND.t())

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        found = host_tokens.rms_norm(x_TD, None, weight_D, eps)
        return rms_norm(x_TD, weight_D, eps) if found is None else found[1]

    def add_rms_norm(
        self, x_TD: Tensor, added_TD: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        found = host_tokens.rms_norm(x_TD, added_TD, weight_D, eps)
        return add_rms_norm(x_TD, added_TD, weight_D, eps) if found is None else found

    def gated(self, gate_TF: Tensor, up_TF: Tensor, activation: str) -> Tensor:
        if activation == GELU:
            return F.gelu(gate_TF, approximate="tanh").mul_(up_TF)
        found = host_tokens.gated(gate_TF, up_TF)
        return swiglu(gate_TF, up_TF) if found is None else found

    def each(self, function: PerToken, x_TD: Tensor) -> tuple[Tensor, ...]:
        return function(x_TD)


class Reproducible:
    """One way for any number of tokens, chosen by the device alone.

    Every product is of the same number of tokens, but for those of a processor's own kernels, which
    sum up in one order for any number. On a GPU norms and activations are kernels of
    which a program, or a thread, has one token. On a CPU norms are taken in tiles as products are;
    activations token by token, because torch computes what is left over at the end of a tensor,
    and of a thread's part, by another function than what it takes as vectors.
    """

    by_slot = False

    def __init__(self, device: torch.device) -> None:
        """A GPU must be served by Triton. Where its interpreter serves a CPU, products are those
        of the kernel."""
        self._on_cpu = device.type == "cpu"
        self._multiply: Callable[[Tensor, Tensor, Tensor], None] = multiply_tiles
        self._kernels = triton_serves(device)
        self._compiled = self._on_cpu and not self._kernels
        if self._kernels:
            self._multiply = fused.multiply_tiles

    def project(
        self, x_TD: Tensor, packed: Packed, unpacker: Unpacker, bias_N: Tensor | None = None
    ) -> Tensor:
        x_TD = x_TD.contiguous()
        if self._compiled and kernel_multiplies(packed, x_TD[:1]):
            return multiply(packed, x_TD, bias_N)  # in an order that does not depend on T
        if self._kernels and packed.format not in FLOATS:
            found = fused.multiply_alike(packed, x_TD, bias_N)
            if found is not None:
                return found
        y_TN = x_TD.new_empty(x_TD.shape[0], packed.rows)
        for start, end, rows_ND in _float_blocks(packed, unpacker):
            self._multiply(x_TD, rows_ND, y_TN[:, start:end])
        return y_TN if bias_N is None else y_TN.add_(bias_N)

    def add_product(self, y_TN: Tensor, x_TD: Tensor, weight_ND: Tensor) -> Tensor:
        for y_SN, x_SD in zip(y_TN.split(ADDED), x_TD.split(ADDED), strict=True):
            product_SN = torch.empty_like(y_SN)
            self._multiply(x_SD.contiguous(), weight_ND, product_SN)
            y_SN.add_(product_SN)
        return y_TN

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        if not self._on_cpu:
            return rms_norm(x_TD, weight_D, eps, always=True)
        normed = partial(plain_rms_norm, weight_D=weight_D, eps=eps)
        return torch.cat([normed(tile)[:count] for tile, count in tiles(x_TD)])

    def add_rms_norm(
        self, x_TD: Tensor, added_TD: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        if not self._on_cpu:
            return add_rms_norm(x_TD, added_TD, weight_D, eps, always=True)
        total_TD = x_TD + added_TD
        return total_TD, self.rms_norm(total_TD, weight_D, eps)

    def gated(self, gate_TF: Tensor, up_TF: Tensor, activation: str) -> Tensor:
        if not self._on_cpu and activation != GELU:
            return swiglu(gate_TF, up_TF, always=True)
        gate = partial(F.gelu, approximate="tanh") if activation == GELU else F.silu
        if not self._on_cpu:
            return gate(gate_TF).mul_(up_TF)
        for token in gate_TF.split(1):
            token.copy_(gate(token))
        return gate_TF.mul_(up_TF)

    def each(self, function: PerToken, x_TD: Tensor) -> tuple[Tensor, ...]:
        if not self._on_cpu:
            return function(x_TD)
        found = zip(*(function(token) for token in x_TD.split(1)), strict=True)
        return tuple(torch.cat(parts) for parts in found)


FASTEST = Fastest()


def project(
    x_TD: Tensor, packed: Packed, unpacker: Unpacker, bias_N: Tensor | None = None
) -> Tensor:
    """``Arithmetic.project``, the fastest way."""
    as_x = packed.format in FLOATS and packed.parts["weight"].dtype == x_TD.dtype
    if (x_TD.is_cpu or not as_x) and kernel_multiplies(packed, x_TD):
        return multiply(packed, x_TD, bias_N)
    if as_x:
        weight_ND = packed.parts["weight"]
        y_TN = fused.multiply_floats(weight_ND, x_TD)
        y_TN = F.linear(x_TD, weight_ND) if y_TN is None else y_TN
        return y_TN if bias_N is None else y_TN.add_(bias_N)
    y_TN = x_TD.new_empty(x_TD.shape[0], packed.rows)
    for start, end, rows_ND in unpacker.blocks(packed):
        torch.mm(x_TD, rows_ND.t(), out=y_TN[:, start:end])
    return y_TN if bias_N is None else y_TN.add_(bias_N)


def tiles(x_TD: Tensor) -> Iterator[tuple[Tensor, int]]:
    """TILE tokens at a time in memory of their own, the last of them zeros where there are fewer;
    and how many there are. Every place of a tile is aligned alike: products with few rows go by
    that."""
    width = x_TD.shape[1]
    for part in x_TD.split(TILE):
        tile = x_TD.new_zeros(TILE, -(-width // ALIGNED) * ALIGNED)[:, :width]
        tile[: len(part)] = part
        yield tile, len(part)


def multiply_tiles(x_TD: Tensor, w_ND: Tensor, out_TN: Tensor) -> None:
    """out = x times transposed w, in products of TILE tokens, from and to memory laid out alike."""
    first = 0
    for tile, count in tiles(x_TD):
        out_TN[first : first + count] = torch.mm(tile, w_ND.t())[:count]
        first += count


def _float_blocks(packed: Packed, unpacker: Unpacker) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, end row, weights) in the unpacker's dtype: as they are, if they have it."""
    if packed.format not in FLOATS or packed.parts["weight"].dtype != unpacker.dtype:
        yield from unpacker.blocks(packed)
        return
    weight = packed.parts["weight"]
    step = len(weight) if weight.device.type != "cpu" else rows_at_once(packed.width)
    for start in range(0, len(weight), step):
        part = weight[start : start + step]
        yield start, start + len(part), part


def rows_at_once(width: int) -> int:
    """Rows of a matrix of floats that are multiplied at a time on a CPU."""
    return max(1, BLOCK_ELEMENTS // max(width, LEAST_WIDTH) // 8) * 8


def tile_nbytes(width: int, dtype: torch.dtype) -> int:
    """What a tile takes beside the whole, of tokens of up to so many numbers: itself, in float32
    for a norm, and its product with a block of rows, of which the narrowest matrix has most."""
    product = max(BLOCK_ELEMENTS // LEAST_WIDTH, width)
    return TILE * (4 * 4 * width + dtype.itemsize * product)
