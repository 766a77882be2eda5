"""Why a pass gave no numbers: the same pass once more, looked at after every layer.

Passes are not looked into while all is well, for that would cost time in each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from layer_streamer import TensorSpec

from .batch import Batch, Entry

if TYPE_CHECKING:
    from .runner import Runner, Step

TOO_SMALL = (
    "float16 is too small for this model: compute in float32 (dtype=torch.float32, --dtype float32)"
)


def why_not_finite(runner: Runner, entries: Sequence[Entry]) -> list[str]:
    """What was no number first, in each row of a pass, in words.

    The rows are as they were before that pass, and stay so. Waits for the device at every layer.
    """
    look = _Look(runner, [len(ids) for _, ids in entries])
    runner.repeat(entries, look.around)
    return look.words()


class _Look:
    """The step of a pass, with a look at every row's part of what it leaves."""

    def __init__(self, runner: Runner, counts: Sequence[int]) -> None:
        ends = [0, *accumulate(counts)]
        self._parts = [slice(first, end) for first, end in pairwise(ends)]
        self._runner = runner
        self._found: list[str | None] = [None] * len(counts)

    def around(self, step: Step, batch: Batch, x_ND: torch.Tensor) -> Step:
        """The step that looks; before the first one, at the embeddings of all tokens."""
        for chunk in batch.chunks:
            self._runner.embed(batch, chunk, x_ND)
        self._see(x_ND, "the embedding")

        def looked_at(
            x_ND: torch.Tensor, tensors: Mapping[str, torch.Tensor], layer_idx: int
        ) -> torch.Tensor:
            result = step(x_ND, tensors, layer_idx)
            layers = self._runner.streamer.manifest.layers
            if layer_idx < len(layers):
                specs = layers[layer_idx].tensors
                self._see(result, f"layer {layer_idx}", tensors, specs)
            else:
                self._see_head(tensors)
            return result

        return looked_at

    def words(self) -> list[str]:
        """Of each row."""
        head = f"that of the final norm or the output head{self._cause({}, {})}"
        return [found if found is not None else head for found in self._found]

    def _see(
        self,
        x_ND: torch.Tensor,
        what: str,
        tensors: Mapping[str, torch.Tensor] | None = None,
        specs: Mapping[str, TensorSpec] | None = None,
    ) -> None:
        """Note which rows have come to be not finite here."""
        new = [
            i
            for i, part in enumerate(self._parts)
            if self._found[i] is None and extreme(x_ND[part]) is not None
        ]
        if new:
            cause = self._cause(tensors or {}, specs or {})
            for i in new:
                self._found[i] = f"that of {what}{cause}"

    def _see_head(self, tensors: Mapping[str, torch.Tensor]) -> None:
        cause = _of_tensors(tensors, self._runner.streamer.manifest.static)
        if cause is not None:
            for i, found in enumerate(self._found):
                if found is None:
                    self._found[i] = f"that of the output head{cause}"

    def _cause(self, tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec]) -> str:
        named = _of_tensors(tensors, specs)
        if named is not None:
            return named
        return f"; {TOO_SMALL}" if self._runner.dtype == torch.float16 else ""


def _of_tensors(tensors: Mapping[str, torch.Tensor], specs: Mapping[str, TensorSpec]) -> str | None:
    """The first of these tensors that is not finite itself, with its file; None if all are."""
    for key, tensor in tensors.items():
        kind = extreme(tensor)
        if kind is not None and key in specs:
            spec = specs[key]
            named = f": its tensor {spec.name!r} has a value that is {kind} ({spec.path})"
            small = kind == "infinite" and tensor.dtype == torch.float16
            return f"{named}; {TOO_SMALL}" if small else named
    return None


def extreme(tensor: torch.Tensor) -> str | None:
    """nan or infinite, if one of these floats is; None if all are finite, or of another kind."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not tensor.numel():
        return None
    low, high = (float(x) for x in torch.aminmax(tensor))
    if math.isnan(low):
        return "nan"
    return "infinite" if math.isinf(low) or math.isinf(high) else None
