"""What computes layers where they lie: the processor's side of a runner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..drafts.tree import Tree
from ..host_kernels.products import prepare
from ..models.rope import Rotary
from ..passes.batch import Entry, pack
from ..passes.row_attention import RowAttention
from ..passes.section import Section
from ..weights.dequant import Unpacker, Widest
from ..weights.scale_check import ScaleCheck
from .host_pass import CPU, HostPass, Place

if TYPE_CHECKING:
    from ..passes.runner import Runner

MOST_TOKENS = 8
"""Of a pass whose host layers are computed there: with more, processors take longer than a link."""


class HostSide:
    """Computes the layers of ``host_layers``, in float32, over keys and values that stay there.

    Thread rules: those of the runner.
    """

    def __init__(self, runner: Runner, layers: Sequence[int]) -> None:
        """``layers``: in host memory, as their keys and values are."""
        self.runner, self.layers = runner, frozenset(layers)
        names, streamer = runner.names, runner.streamer
        factors = streamer.host_tensor(names.rope_factors) if names.rope_factors else None
        self.rotary = Rotary(runner.config, CPU, factors=factors)
        every = [one for layer in names.layers for one in layer.values()]
        widest = Widest.of((one.format, one.width, one.ordered) for one in every)
        self.unpacker = Unpacker(CPU, torch.float32, widest)
        prepare(kind for kind, _ in widest.kinds)
        self.check = ScaleCheck()
        self.most_tokens = MOST_TOKENS
        """Of a pass that computes them there; others stream them."""
        cuda = runner.kv.device.type == "cuda"
        shape = (runner.most_tokens if runner.most_tokens < MOST_TOKENS else MOST_TOKENS,)
        with torch.inference_mode(False):
            self.passing_TD = torch.empty(
                *shape, runner.config.hidden_size, dtype=runner.dtype, device="cpu", pin_memory=cuda
            )
            """Where residuals come to from the device, page-locked."""
        self.passes = 0
        """How many have been computed here, in part."""

    def take(
        self, entries: Sequence[Entry], drafts: Sequence[Tree] | None, sections: Sequence[Section]
    ) -> HostPass | None:
        """What computes a pass's host layers; None: they are to be streamed."""
        count = sum(len(ids) for _, ids in entries)
        chunks = max(len(section.batch.chunks) for section in sections)
        if count > min(self.most_tokens, len(self.passing_TD)) or chunks > 1:
            return None
        batch = pack(entries, count, CPU, None, drafts)
        (chunk,) = batch.chunks
        runner = self.runner
        look = RowAttention(chunk, runner.config, runner.kv, most_together=0)
        places = [
            Place(
                section.first,
                len(section.batch.rows) if section.captured else len(section.batch.ids),
                len(section.batch.ids),
            )
            for section in sections
        ]
        self.passes += 1
        return HostPass(self, chunk, look, places)


@dataclass(slots=True)
class Residuals:
    """What goes from layer to layer: no tensor to the streamer, which would move it."""

    x_ND: torch.Tensor


def run_pass(runner: Runner, x_ND: torch.Tensor, step: Any, host: HostPass | None) -> None:
    """A pass of the runner's streamer."""
    if runner.host is None:
        runner.streamer.run_pass(x_ND, step)
        return

    def work(residuals: Residuals, tensors: Any, layer_idx: int) -> Residuals:
        residuals.x_ND = step(residuals.x_ND, tensors, layer_idx)
        return residuals

    runner.streamer.run_pass(Residuals(x_ND), work, on_host=host is not None)
    if host is not None:
        runner.host.check.end()
