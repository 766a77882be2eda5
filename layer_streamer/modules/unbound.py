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
    stands_for: torch.Tensor
    """The like of it on meta, as it was or would be without :class:`Unbound`."""

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
        name = vars(found[0]).get("full_name", "a weight") if found else "a weight"
        raise StreamerError(
            f"{name} is used while its block has no weights:"
            " they are there from the begin of the block's forward to its end"
        )


def as_unbound(tensor: torch.Tensor, name: str, *, strict: bool) -> torch.Tensor:
    """What stands for ``tensor``, the module's parameter or buffer ``name``: meta, no gradients.

    A tensor that is on meta by now stays the same object, unless ``strict`` asks for one that
    raises a StreamerError with its name when it is used.
    """
    meta = _on_meta(without_name(tensor))
    if not strict:
        return meta
    with torch.inference_mode(False), torch.no_grad():
        unbound = torch.Tensor._make_subclass(Unbound, meta.detach(), False)
    own: dict[str, Any] = {"full_name": name, "stands_for": meta}
    if isinstance(meta, nn.Parameter):
        own["_is_param"] = True  # what torch goes by for such classes
    unbound.__dict__.update(vars(meta), **own)
    return unbound


def without_name(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor on meta that an unbound one stands for; any other is what it is."""
    return tensor.stands_for if isinstance(tensor, Unbound) else tensor


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        meta = tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")
        if not isinstance(tensor, nn.Parameter):
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
