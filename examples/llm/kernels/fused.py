"""What has both a kernel and plain torch operations, and which of them serves.

Triton's kernels serve on a GPU if it is there; by the token count where a launch costs more than
the work. On a CPU few tokens are multiplied by ``host_kernels``, if they could be compiled.
Everything here gives what plain torch gives: unpacked weights bit for bit, the rest up to the order
of sums and the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from ..host_kernels import products as host_products
from ..weights.packed import Packed, unpack_rows
from ..weights.scratch import Scratch
from .thresholds import Thresholds, thresholds
from .triton_support import triton_serves

KERNEL_FORMATS = frozenset(
    ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "ct4", "ct8", "int8", "fp8", "awq4")
)
"""What kernels unpack, where columns are in the order of groups of whole chunks of 32."""

WIDEST_TOKEN = 1 << 15
"""Numbers that one program can norm."""
MOST_EXPERTS = 1024
"""Of which one program chooses."""
FEW_ROWS, FEW_TOKENS = 256, 2
"""Of a matrix of floats, as a router's, that a kernel reads faster than a library."""
Pairs = Any
"""``slot_tiles.Routed``, of a module that needs Triton."""


def unpack(
    packed: Packed, start: int, end: int, out: torch.Tensor, scratch: Scratch | None = None
) -> None:
    """``unpack_rows``, by a kernel where there is one, which takes no scratch."""
    if kernel_unpacks(packed, out):
        with current(out):
            _kernels("unpacking").launch_unpack(packed, start, end, out)
    else:
        unpack_rows(packed, start, end, out, scratch)


def kernel_unpacks(packed: Packed, out: torch.Tensor) -> bool:
    """True: a kernel writes rows of this matrix to ``out``."""
    if not triton_serves(out.device) or not out.is_contiguous():
        return False
    return bool(_kernels("unpacking").serves(packed))


def kernel_multiplies(packed: Packed, x_TD: torch.Tensor) -> bool:
    """True: for this many tokens ``multiply`` is faster than unpacking first."""
    if x_TD.is_cpu:
        return host_products.multiplies(packed, x_TD)
    return triton_serves(x_TD.device) and _product(packed, x_TD) is not None


def multiply(
    packed: Packed, x_TD: torch.Tensor, bias_N: torch.Tensor | None = None
) -> torch.Tensor:
    """x times the transposed matrix, plus a bias: (T, rows), without unpacking it to memory.

    To be called only where ``kernel_multiplies``. With few tokens weights are float32, not rounded
    to x's dtype as in unpacked rows; on tensor cores they are what unpacked rows have.
    """
    if x_TD.is_cpu:
        return host_products.multiply(packed, x_TD, bias_N)
    kernels = _product(packed, x_TD)
    assert kernels is not None, packed.format
    with current(x_TD):
        product: torch.Tensor = kernels.multiply(packed, x_TD, bias_N=bias_N)
    return product


def rms_norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, *, always: bool = False
) -> torch.Tensor:
    """Scale each token to a mean square of 1, in float32, then by the weight, in its dtype.

    ``always``, here and below: by the kernel for any number of tokens.
    """
    if _kernel_norms(x_TD, weight_D, always):
        with current(x_TD):
            normed: torch.Tensor = _kernels("launching").launch_norm(x_TD, None, weight_D, eps)[1]
        return normed
    return plain_rms_norm(x_TD, weight_D, eps)


def add_rms_norm(
    x_TD: torch.Tensor,
    added_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    *,
    always: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + added, and its norm."""
    if _kernel_norms(x_TD, weight_D, always) and added_TD.is_contiguous():
        with current(x_TD):
            total_TD, normed = _kernels("launching").launch_norm(x_TD, added_TD, weight_D, eps)
        return total_TD, normed
    total_TD = x_TD + added_TD
    return total_TD, plain_rms_norm(total_TD, weight_D, eps)


def plain_rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """``rms_norm`` in torch operations, of any number of dimensions."""
    x = x_TD.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x.to(weight_D.dtype) * weight_D).to(x_TD.dtype)


def swiglu(gate_TF: torch.Tensor, up_TF: torch.Tensor, *, always: bool = False) -> torch.Tensor:
    """silu(gate) * up, in the memory of ``gate`` where a kernel serves."""
    straight = gate_TF.is_contiguous() and up_TF.is_contiguous()
    if straight and _few_kernels(gate_TF, "swiglu", always):
        with current(gate_TF):
            gated: torch.Tensor = _kernels("launching").launch_swiglu(gate_TF, up_TF)
        return gated
    return F.silu(gate_TF).mul_(up_TF)


def clamped_gates(
    gate_PF: torch.Tensor, up_PF: torch.Tensor, alpha: float, limit: float
) -> torch.Tensor:
    """``mixing.clamped`` in one launch, in the memory of ``gate``, rounded once. Only where Triton
    serves; contiguous."""
    with current(gate_PF):
        gated: torch.Tensor = _kernels("launching").launch_clamped(gate_PF, up_PF, alpha, limit)
    return gated


def multiply_tiles(x_TD: torch.Tensor, w_ND: torch.Tensor, out_TN: torch.Tensor) -> None:
    """out = x times transposed w, of floats, in tiles of a fixed number of tokens. Only where
    Triton serves."""
    with current(x_TD):
        _kernels("fixed_products").launch_tiles(x_TD, w_ND, out_TN)


def multiply_alike(
    packed: Packed, x_TD: torch.Tensor, bias_N: torch.Tensor | None
) -> torch.Tensor | None:
    """x times a packed matrix, plus a bias, in such tiles, without unpacking it to memory; None:
    that is not served, whatever the tokens. Only where Triton serves."""
    tiles = _kernels("tiles")
    if not tiles.multiplies(packed, x_TD):
        return None
    with current(x_TD):
        found: torch.Tensor = tiles.multiply(packed, x_TD, bias_N=bias_N, alike=True)
    return found


def slot_kernels(device: torch.device) -> ModuleType | None:
    """Products with experts that lie in slots, ``slot_tiles``; None: Triton does not serve."""
    return _kernels("slot_tiles") if triton_serves(device) else None


def slots_multiply(bank: Packed, x_TD: torch.Tensor) -> bool:
    """True: ``multiply_slots`` serves."""
    if x_TD.dtype == torch.float64 or not triton_serves(x_TD.device):
        return False
    return bool(_kernels("slot_products").serves(bank, x_TD))


def multiply_slots(
    banks: Sequence[Packed], x_TD: torch.Tensor, slots_P: torch.Tensor, per_x: int = 1
) -> torch.Tensor:
    """Of each bank and pair p, row p // per_x of x times the transposed matrix in slot
    ``slots_P[p]``, rounded, plus the bank's bias (slots, rows) if it has one: (banks, P, rows).
    Only where ``slots_multiply``, of banks of one shape.

    A bank is a matrix as any, but for a first dimension of its parts, the slots. ``slots_P``,
    contiguous, fewer than 65536, is read on the device alone, and must name no slot that is not
    there.
    """
    with current(x_TD):
        found: torch.Tensor = _kernels("slot_products").launch_slots(banks, x_TD, slots_P, per_x)
    return found


def multiply_floats(weight_ND: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor | None:
    """x times a transposed matrix of floats, in float32, rounded: (T, N); None where that is not
    faster than a library: of so few rows and tokens as a router has while it decodes, it is."""
    if weight_ND.shape[0] > FEW_ROWS or len(x_TD) > FEW_TOKENS or x_TD.dtype == torch.float64:
        return None
    if weight_ND.dtype != x_TD.dtype or not triton_serves(x_TD.device):
        return None
    with current(x_TD):
        found: torch.Tensor | None = _kernels("slot_products").multiply_floats(weight_ND, x_TD)
    return found


def combine(y_PD: torch.Tensor, shares_TK: torch.Tensor) -> torch.Tensor:
    """(T, D): what K experts made of each token, y (T * K, D), by their shares: float32 sums in
    the order of k, rounded once to y's dtype. Both are contiguous, shares float32. Only where
    Triton serves."""
    with current(y_PD):
        mixed: torch.Tensor = _kernels("launching").launch_combine(y_PD, shares_TK)
    return mixed


def kernel_chooses(logits_TX: torch.Tensor) -> bool:
    """True: ``choose`` serves."""
    return logits_TX.shape[1] <= MOST_EXPERTS and triton_serves(logits_TX.device)


def choose(
    logits_TX: torch.Tensor,
    per_token: int,
    *,
    normed: bool,
    rounded: bool,
    over_chosen: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``feed_forward.route`` in one launch, experts ascending, the first of equals: ids int64 and
    shares float32, (T, K). Only where ``kernel_chooses``, of contiguous logits. Of logits that are
    NaN, too, K different experts come out: no slot is read that is not there.

    ``over_chosen``: shares are a softmax over the chosen alone.
    """
    with current(logits_TX):
        found: tuple[torch.Tensor, torch.Tensor] = _kernels("launching").launch_choose(
            logits_TX, per_token, normed=normed, rounded=rounded, over_chosen=over_chosen
        )
    return found


def kernel_rotates(x_HTE: torch.Tensor, table_2TE: torch.Tensor) -> bool:
    """True: ``rotate_heads`` serves."""
    if not x_HTE.is_cuda or x_HTE.stride(-1) != 1 or table_2TE.stride(-1) != 1:
        return False
    return triton_serves(x_HTE.device)


def rotate_heads(
    heads: Sequence[torch.Tensor], table_2TE: torch.Tensor, *, interleaved: bool
) -> list[torch.Tensor]:
    """Queries, or queries and keys, rotated in one launch. Only where ``kernel_rotates``."""
    with current(heads[0]):
        turned: list[torch.Tensor] = _kernels("launching").launch_rotate(
            heads, table_2TE, interleaved=interleaved
        )
    return turned


def limits(device: torch.device) -> Thresholds:
    """The thresholds of a GPU."""
    return thresholds(_name(device.index or 0))


def _product(packed: Packed, x_TD: torch.Tensor) -> ModuleType | None:
    """The kernels of the fastest product of so many tokens; None: unpack first."""
    counts, kind, tokens = limits(x_TD.device), packed.format, len(x_TD)
    few, tiles = _kernels("launching"), _kernels("tiles")
    if tokens <= counts.product.get(kind, 0) and few.multiplies(packed, x_TD):
        return few
    if tokens <= counts.tiles.get(kind, 0) and tiles.multiplies(packed, x_TD):
        return tiles
    return None


@lru_cache
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def _kernel_norms(x_TD: torch.Tensor, weight_D: torch.Tensor, always: bool) -> bool:
    if x_TD.dim() != 2 or not (x_TD.is_contiguous() and weight_D.is_contiguous()):
        return False
    return x_TD.shape[1] <= WIDEST_TOKEN and _few_kernels(x_TD, "norm", always)


def _few_kernels(x_TD: torch.Tensor, kind: str, always: bool) -> bool:
    """True: enough tokens that one kernel is faster than several."""
    if not x_TD.is_cuda or not triton_serves(x_TD.device):
        return False
    fewest: int = getattr(limits(x_TD.device), kind)
    return always or len(x_TD) >= fewest


def current(x: torch.Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device: context in which that is the tensor's."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


@cache
def _kernels(name: str) -> ModuleType:
    """A module of kernels, imported when Triton is known to serve, and not looked up again."""
    return import_module(f".{name}", __package__)
