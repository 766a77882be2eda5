"""What one key of a layer becomes in a block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


class Entry(NamedTuple):
    """What one key of a layer becomes. Equal entries of two blocks may be the same tensor."""

    key: str
    shape: torch.Size
    kind: type[torch.Tensor]
    """Class of the parameter; ``torch.Tensor`` for a buffer."""
    attributes: str
    """What it carries beside its data, as text: diffusers' GGUF parameters have their type."""
    made: torch.dtype | None
    """Dtype of one that is made by arithmetic, in memory of the binder's; None where it lies in
    the slot."""

    @property
    def made_nbytes(self) -> int:
        """Bytes of memory of the binder's that it takes."""
        return self.shape.numel() * self.made.itemsize if self.made is not None else 0


def entry_of(key: str, plain: torch.Tensor, *, made: bool) -> Entry:
    """Of the parameter or buffer that a block has under this key. ``made``: by arithmetic."""
    is_parameter = isinstance(plain, nn.Parameter)
    carried = sorted((name, repr(value)) for name, value in vars(plain).items())
    return Entry(
        key=key,
        shape=plain.shape,
        kind=type(plain) if is_parameter else torch.Tensor,
        attributes=str(carried) if is_parameter and carried else "",
        made=plain.dtype if made else None,
    )
