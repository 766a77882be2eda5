"""What a block's parameter is while its block has no weights: right in all but its values.

Plain tensors on meta would be computed with: a product of one on meta and one that is not raises
nothing, and gives what nobody has computed.
"""

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
        "is_complex", "is_contiguous", "is_signed", "is_inference", "is_shared", "get_device",
        "type", "requires_grad_", "detach", "_make_subclass",
    }
)  # fmt: skip
"""Names of functions that ask for a tensor's form, not for its values."""
_VALUES = frozenset({"T", "mT", "H", "mH"})
"""Attributes that lead to the values."""
OF_BLOCK = (
    "while its block has no weights: they are there from the begin of the block's forward to its "
    "end"
)
OF_EXPERTS = (
    "as a whole, and its experts are brought on demand: experts='whole' streams all of them"
)


class Unbound(torch.Tensor):
    """A parameter or buffer on meta that says its name when it is computed with.

    Shape, dtype and the like can be asked for; its ``device`` is where its block's weights will be,
    since that is where others put what belongs beside it (peft its adapters). To torch it is a
    Parameter if it stands for one.
    """

    full_name: str
    why: str
    """What is wrong with its use."""
    stands_for: torch.Tensor
    """The plain tensor on meta."""
    comes_to: torch.device

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        found = [leaf for leaf in tree_leaves([args, kwargs]) if isinstance(leaf, Unbound)]
        if attribute == "device" and found and "comes_to" in vars(found[0]):
            return found[0].comes_to
        asked = getattr(func, "__name__", "")
        writes = (attribute, asked) == ("data", "__set__")  # as who merges an adapter does
        if asked in _LOOKS and attribute not in _VALUES and not writes:
            if attribute == "requires_grad" or asked == "requires_grad_":
                _note_wish(asked, found, args, kwargs or {})
            # One call, for an interrupt must not leave it disabled, as it might a ``with``.
            return torch._C._disabled_torch_function_impl(
                func, types, tuple(args), dict(kwargs or {})
            )
        own = vars(found[0]) if found else {}
        raise StreamerError(
            f"{own.get('full_name', 'a weight')} is used {own.get('why', OF_BLOCK)}"
        )


def as_unbound(
    tensor: torch.Tensor, name: str, device: torch.device | None, why: str = OF_BLOCK
) -> torch.Tensor:
    """What stands for ``tensor``, the parameter or buffer ``name``: without gradients.

    ``device``: where its weights will be; None: it says that it is on meta. ``why``: the end of the
    error of its use.
    """
    meta = _on_meta(without_name(tensor))
    with torch.inference_mode(False), torch.no_grad():
        unbound = torch.Tensor._make_subclass(Unbound, meta.detach(), False)
    own: dict[str, Any] = {"full_name": name, "stands_for": meta, "why": why}
    if device is not None:
        own["comes_to"] = device
    if isinstance(meta, nn.Parameter):
        own["_is_param"] = True  # what torch goes by for such classes
    unbound.__dict__.update(vars(meta), **own)
    return unbound


def is_wanted(tensor: torch.Tensor) -> bool:
    """True for one that gradients are asked for: it is to be trained."""
    return bool(vars(tensor).get("wanted")) if isinstance(tensor, Unbound) else tensor.requires_grad


def _note_wish(
    asked: str, found: Sequence[Unbound], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    if found and asked != "__get__":
        wish = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
        vars(found[0])["wanted"] = bool(wish)


def is_brought(tensor: torch.Tensor) -> bool:
    """True for what stands for experts that are brought on demand: its block never has it."""
    return isinstance(tensor, Unbound) and vars(tensor).get("why") == OF_EXPERTS


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
