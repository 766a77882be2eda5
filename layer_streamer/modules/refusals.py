"""What a model whose weights stream cannot do: one clear error each, before anything is done."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from ..errors import StreamerError
from .binding import Binder
from .blocks import Block


class _Moves:
    """Stands before a module's ``to``: it may stay where it is, and nothing else."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._dtype = getattr(model, "dtype", None)
        self._device = device

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        here = device is None or _same(device, self._device)
        if here and dtype in (None, self._dtype):
            return module
        raise StreamerError(
            f"the model's weights stream to {self._device} as {self._dtype}: it cannot be moved or "
            "cast; say device= and dtype= to stream()"
        )

    def leaves(self, module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """Whether a change of all of a module's tensors leaves them as they are."""
        found = {tensor.dtype for tensor in (*module.parameters(), *module.buffers())}
        some = [torch.empty(0, dtype=dtype, device=self._device) for dtype in found]
        return all(change(one) is one and not (one.is_cpu and one.is_shared()) for one in some)


def refuse(model: nn.Module, blocks: Sequence[Block], device: torch.device) -> None:
    """Have ``to``, casts, ``state_dict`` and replication of the model and its blocks say so."""
    moves = _Moves(model, device)
    for module in (model, *(block.module for block in blocks)):
        module.__dict__["_apply"] = _apply_to(module, moves)
        module.__dict__["_replicate_for_data_parallel"] = _refuse_replicas
        module.__dict__["state_dict"] = _state_of(module)
    model.__dict__["to"] = _bound_to(model, moves)


def leave_states_without_values(blocks: Sequence[Block], binder: Binder) -> None:
    """In the state of a module that the model is a part of (of peft's, which looks for its adapters
    in it), streamed weights are on meta and have no values."""
    for i, block in enumerate(blocks):
        block.module.register_state_dict_pre_hook(partial(_unbind, binder, i))


def _unbind(binder: Binder, i: int, *args: object) -> None:
    binder.unbind(i)


def note_lack_of_memory(model: nn.Module) -> None:
    """Have an error of a device that is full say which numbers there are to change."""
    model.register_forward_hook(_note, always_call=True)


def _note(module: nn.Module, args: object, output: object) -> None:
    error = sys.exc_info()[1]
    if output is None and isinstance(error, torch.OutOfMemoryError):
        error.add_note(
            "the model's weights stream in what device_budget= says; what its activations and "
            "caches take beside it cannot be known: lower device_budget= or raise reserve_bytes="
        )


def name_block(error: StreamerError, names: Sequence[str]) -> None:
    """An error that begins with a layer's number begins with its block's name."""
    word, _, rest = str(error).partition(" ")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    if word == "layer" and digits and int(digits) < len(names):
        error.args = (f"{names[int(digits)]}: {error}",)


def refuse_gone(name: str) -> NoReturn:
    """Of a block that a backward needs the weights of, which it was not to keep."""
    raise StreamerError(
        f"{name}: a backward needs its weights, which have gone since its forward: switch gradient "
        "checkpointing on (model.gradient_checkpointing_enable() and model.train(), or "
        "torch.utils.checkpoint around the call of each block), or run the forward under "
        "torch.no_grad()"
    )


def refuse_together(name: str) -> NoReturn:
    """Of a block that a backward has run once more with others, before it came to it."""
    raise StreamerError(
        f"{name}: it shares a checkpoint with other blocks, whose weights are not there at once: "
        "checkpoint each block by itself"
    )


def refuse_several(name: str) -> NoReturn:
    """Of a backward over blocks on several GPUs, whose threads do not wait for each other."""
    raise StreamerError(
        f"{name}: a backward over several devices is not possible: stream to one of them"
    )


def _bound_to(model: nn.Module, moves: _Moves) -> Any:
    known = weakref.ref(model)

    def to(*args: Any, **kwargs: Any) -> nn.Module:
        module = known()
        assert module is not None
        return moves(module, args, kwargs)

    return to


def _state_of(module: nn.Module) -> Any:
    known = weakref.ref(module)

    def state_dict(*args: Any, destination: Any = None, **options: Any) -> Any:
        found = known()
        assert found is not None
        if destination is not None or args:  # as a part of another module's
            return type(found).state_dict(found, *args, destination=destination, **options)
        raise StreamerError(
            f"{type(found).__name__}: its weights stream, so there is no state_dict of them, and "
            "nothing to save: the checkpoint has them"
        )

    return state_dict


def _same(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index or 0) == (other.index or 0)


def _apply_to(module: nn.Module, moves: _Moves) -> Any:
    known = weakref.ref(module)

    def apply(change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        found = known()
        assert found is not None
        if moves.leaves(found, change):  # as a trainer does, to the module that this is a part of
            return found
        raise StreamerError(
            "the model's weights stream: it cannot be moved or cast; say device= and dtype= to "
            "stream()"
        )

    return apply


def _refuse_replicas(*args: Any) -> NoReturn:
    raise StreamerError(
        "a model whose weights stream cannot be replicated (DataParallel): name several devices in "
        "stream(device=[...])"
    )
