"""What a block's parameter is while its block has no weights: right in shape, on meta."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..errors import StreamerError

_LOOKS = frozenset(
    {
        "__get__", "__set__", "__repr__", "__format__", "__hash__", "__len__", "size", "dim",
        "ndimension", "numel", "nelement", "element_size", "stride", "is_floating_point",
        "is_complex", "is_contiguous", "get_device", "requires_grad_", "detach", "_make_subclass",
    }
)  # fmt: skip
"""Names of functions that ask for a tensor's form, not for its values."""
_VALUES = frozenset({"T", "mT", "H", "mH"})
"""Attributes that lead to the values."""


class Unbound(torch.Tensor):
    """A parameter or buffer that says its name when it is computed with.

    Shape, dtype and the like can be asked for; torch sees a Parameter in that of a parameter.
    """

    full_name: str

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if getattr(func, "__name__", "") in _LOOKS and attribute not in _VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        found = [leaf for leaf in tree_leaves([args, kwargs]) if isinstance(leaf, Unbound)]
        raise StreamerError(
            f"{found[0].full_name if found else 'a weight'} is used while its block has no weights:"
            " they are there from the begin of the block's forward to its end"
        )


def as_unbound(tensor: torch.Tensor, name: str, *, strict: bool) -> torch.Tensor:
    """What stands for ``tensor``, the module's parameter or buffer ``name``: meta, no gradients.

    A tensor that is on meta by now stays the same object, unless ``strict`` asks for one that
    raises a StreamerError with its name when it is used.
    """
    is_parameter = isinstance(tensor, nn.Parameter)
    with torch.inference_mode(False), torch.no_grad():
        meta = tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")
        if strict:
            unbound = torch.Tensor._make_subclass(Unbound, meta.detach(), False)
            unbound.__dict__.update(vars(tensor), full_name=name)
            if is_parameter:
                unbound.__dict__["_is_param"] = True  # what torch goes by for such classes
            return unbound
        if not is_parameter:
            return meta
        if meta is tensor:
            return tensor.requires_grad_(False)
        return as_parameter(meta, type(tensor), vars(tensor))


def as_parameter(
    tensor: torch.Tensor, kind: type[torch.Tensor], attributes: Mapping[str, Any]
) -> torch.Tensor:
    """A parameter of class ``kind`` over the memory of ``tensor``, whose version it shares.

    ``attributes``: what it carries beside its data.
    """
    with torch.inference_mode(False):
        made = torch.Tensor._make_subclass(kind, tensor, False)
    made.__dict__.update(attributes)
    return made
