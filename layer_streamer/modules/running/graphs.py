"""Graphs of gradients: how a backward comes back for a block, and what it finds of its weights.

A backward recomputes a block where its activations are checkpointed. Whether the block's hooks run
then depends on who made the checkpoint, so the block's outputs tell when a backward comes to it:
their gradients are there just before. No hook of the module does it as well: it would make views
of what the block takes and returns, which others may write to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

_graph_task = torch._C._current_graph_task_id
_use_count: Callable[[torch.Tensor], int] | None = getattr(torch.Tensor, "_use_count", None)


def in_backward() -> bool:
    """Whether the calling thread is in a backward."""
    return _graph_task() != -1


def at_its_end(callback: Callable[[], None]) -> None:
    """Call it when the backward that this thread is in has ended, unless by an error."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def counts_of(tensors: Sequence[torch.Tensor]) -> list[int]:
    """How often each is held, by graphs, too; zeros where torch does not say it, whose own error
    ("modified by an inplace operation") has to do then."""
    return [0 if _use_count is None else _use_count(tensor) for tensor in tensors]


def nodes_so_far() -> int:
    """How many nodes of graphs this thread has made."""
    return torch._C._autograd._get_sequence_nr()


class Return:
    """What a backward calls when it comes to the outputs of one forward of a block."""

    __slots__ = ("_come_back", "_held", "_i", "_module", "_refuse")

    def __init__(
        self,
        i: int,
        module: nn.Module,
        come_back: Callable[[int, nn.Module], None],
        refuse: Callable[[int], None],
    ) -> None:
        """``refuse``: called with ``i`` where the graph needs weights that have gone."""
        self._i, self._module = i, module
        self._come_back, self._refuse = come_back, refuse
        self._held: list[tuple[torch.Tensor, int]] = []

    def hold(self, tensors: Sequence[torch.Tensor], counts: Sequence[int]) -> None:
        """Note which of the block's weights are held more often than before its forward: by its
        graph, which a checkpoint would have kept from it."""
        for tensor, before, now in zip(tensors, counts, counts_of(tensors), strict=True):
            if now > before:
                self._held.append((tensor, tensor._version))

    def register(self, output: Any, since: int) -> None:
        """Have the outputs tell that were made since then (:func:`nodes_so_far`): not what the
        block was given and gives on, whose gradients come when it is long over."""
        for leaf in tree_leaves(output):
            made = leaf.grad_fn if isinstance(leaf, torch.Tensor) else None
            if made is not None and made._sequence_nr() >= since:
                leaf.register_hook(self)

    def __call__(self, gradient: torch.Tensor) -> None:
        if any(tensor._version != version for tensor, version in self._held):
            self._refuse(self._i)
        self._come_back(self._i, self._module)
