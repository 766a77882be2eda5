"""The hooks of one block: all that a model is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...errors import StreamerError
from ...passes.inputs import move


class Hooks:
    """Calls ``enter(i, module)`` before block ``i``'s forward, ``leave(i, module, output)`` after.

    ``leave`` is called after an Exception, too, with None; what it returns, if not None, is the
    block's output. After a KeyboardInterrupt it is not called, nor where torch compiles the call.
    """

    __slots__ = ("_device", "_enter", "_i", "_leave")

    def __init__(
        self,
        i: int,
        enter: Callable[[int, nn.Module], None],
        leave: Callable[[int, nn.Module, Any], Any],
        device: torch.device | None,
    ) -> None:
        """``device``: where the block's inputs are moved to; None: they stay where they are."""
        self._i = i
        self._enter = enter
        self._leave = leave
        self._device = device

    def register(self, module: nn.Module) -> list[RemovableHandle]:
        """Before all hooks that there are; they hold whatever ``enter`` and ``leave`` do."""
        moves = self._device is not None
        before = self._move_before if moves else self._before
        return [
            module.register_forward_pre_hook(before, prepend=True, with_kwargs=moves),
            module.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, module: nn.Module, args: Any) -> None:
        self._enter(self._i, module)

    def _move_before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._enter(self._i, module)
        assert self._device is not None
        return move(args, self._device), move(kwargs, self._device)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._leave(self._i, module, output)

    def __reduce__(self) -> NoReturn:
        raise StreamerError(
            "a model whose weights stream cannot be copied or pickled: stream it a second time"
        )
