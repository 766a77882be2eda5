"""What a layer does to few tokens beside its products, on a processor, each in one call.

All in float32. torch needs three to six calls for each, which take longer than their work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .library import SCALE_TYPES, Library, Look, library

FEW = 1 << 16
"""Numbers. With more, torch's calls have enough to do, on all threads."""
FEW_TOKENS = 8
"""That look back, likewise."""
LANES = 16
"""Widths are multiples of the widest vectors."""
MOST_WIDTH = 256
"""Of a head that is looked at."""


def _serving(x: torch.Tensor) -> Library | None:
    """What computes x, or a part of it; None: torch does."""
    if not x.is_cpu or x.dtype != torch.float32 or x.numel() > FEW or x.requires_grad:
        return None
    return library()


def rms_norm(
    x_TD: torch.Tensor, added_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """x + added, or x, and its norm (T, D), as ``Arithmetic.add_rms_norm``; None: not served."""
    found = _serving(x_TD) if x_TD.dim() == 2 else None
    if found is None:
        return None
    rows, width = x_TD.shape
    own = [x_TD, weight_D] if added_TD is None else [x_TD, weight_D, added_TD]
    if width % LANES or not all(map(_plain, own)):
        return None
    out_TD, total_TD = torch.empty_like(x_TD), x_TD
    added = None
    if added_TD is not None:
        total_TD, added = torch.empty_like(x_TD), added_TD.data_ptr()
    pointers = x_TD.data_ptr(), added, weight_D.data_ptr(), total_TD.data_ptr(), out_TD.data_ptr()
    found.norm(*pointers, rows, width, eps)
    return total_TD, out_TD


def gated(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor | None:
    """silu(gate) * up, in the memory of ``gate``; None: not served."""
    found = _serving(gate_TF)
    if found is None or gate_TF.numel() % LANES or not (_plain(gate_TF) and _plain(up_TF)):
        return None
    found.gate(gate_TF.data_ptr(), up_TF.data_ptr(), gate_TF.numel())
    return gate_TF


def rotate(
    x_HTE: torch.Tensor, table_2TE: torch.Tensor, *, interleaved: bool
) -> torch.Tensor | None:
    """As ``rope.rotate``; None: not served."""
    heads, tokens, width = x_HTE.shape
    found = _serving(x_HTE)
    whole = table_2TE.shape[1:] == (tokens, width // 2) and _plain(table_2TE)
    if found is None or x_HTE.stride(2) != 1 or not whole:
        return None
    out_HTE = x_HTE.new_empty(heads, tokens, width)
    cos, sin = table_2TE
    strides = x_HTE.stride()[:2]
    pointers = x_HTE.data_ptr(), cos.data_ptr(), sin.data_ptr(), out_HTE.data_ptr()
    found.rotate(*pointers, *strides, heads, tokens, width // 2, interleaved)
    return out_HTE


def looks(q_HTE: torch.Tensor, memory: torch.Tensor) -> bool:
    """True: ``look_back`` serves."""
    _, tokens, width = q_HTE.shape
    if tokens > FEW_TOKENS or width % LANES or width > MOST_WIDTH or q_HTE.stride(2) != 1:
        return False
    if memory.dtype not in SCALE_TYPES or not (memory.is_cpu and memory.is_contiguous()):
        return False
    return _serving(q_HTE) is not None


def look_back(
    q_HTE: torch.Tensor,
    memory: torch.Tensor,
    runs: Sequence[tuple[int, int]],
    *,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Mixed values (H, T, E) of a row's last T tokens, of which each sees those before it and
    itself, as far back as ``window`` says. Where it ``looks``.

    ``memory`` (places, 2, G, E), float32 or of sixteen bits, has their keys and values, too;
    ``runs``: (place, count) of all positions that any of them sees, in order.
    """
    heads, tokens, width = q_HTE.shape
    found = library()
    assert found is not None
    mixed_THE = q_HTE.new_empty(tokens, heads, width)
    runs_R2 = torch.tensor(runs, dtype=torch.int64, device="cpu")
    found.look(
        Look(
            q=q_HTE.data_ptr(),
            memory=memory.data_ptr(),
            runs=runs_R2.data_ptr(),
            mixed=mixed_THE.data_ptr(),
            q_head=q_HTE.stride(0),
            q_token=q_HTE.stride(1),
            heads=heads,
            groups=memory.shape[2],
            width=width,
            tokens=tokens,
            positions=sum(count for _, count in runs),
            window=window or 0,
            num_runs=len(runs),
            kind=SCALE_TYPES[memory.dtype],
            scale=scale,
        )
    )
    return mixed_THE.transpose(0, 1)


def _plain(x: torch.Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32 and x.is_contiguous()
