"""What computes layers where they lie: the processor's side of a runner."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from .choice import FEW, MOST_TOKENS, Choice
from .crew import Crew
from .host_pass import CPU, HostPass, Place

if TYPE_CHECKING:
    from layer_streamer import LayerStreamer

    from ..passes.runner import Runner


class HostSide:
    """Computes the layers of ``host_layers``, in float32, over keys and values that stay there.

    Thread rules: those of the runner.
    """

    def __init__(self, runner: Runner, streamer: LayerStreamer) -> None:
        """``streamer``: the runner's, whose ``host_layers`` have keys and values in host memory."""
        self.runner, self.layers = runner, frozenset(streamer.plan.host_layers)
        self._streamer, self._total = streamer, sum(streamer.plan.placement.copy_bytes)
        self.choice, self.threads = Choice(), torch.get_num_threads()
        self.crews: dict[int, Crew] = defaultdict(lambda: Crew(self.threads))
        """By the bits of the number of tokens."""
        self._last: tuple[int, int] | None = None
        """Tokens of the last pass, and how many threads computed here, 0 where none did; None: look
        at no report."""
        self._wants = self._listens = False
        """To hear how long the pass took; and it has ended."""
        names = runner.names
        if names.adapter is not None:
            names = replace(names, adapter=names.adapter.to(CPU, torch.float32))
        self.names = names
        factors = streamer.host_tensor(names.rope_factors) if names.rope_factors else None
        self.rotary = Rotary(runner.config, CPU, factors=factors)
        every = [one for layer in names.layers for one in layer.values()]
        widest = Widest.of((one.format, one.width, one.ordered) for one in every)
        self.unpacker = Unpacker(CPU, torch.float32, widest)
        prepare()
        self.check = ScaleCheck()
        cuda, most = runner.kv.device.type == "cuda", min(runner.most_tokens, MOST_TOKENS)
        with torch.inference_mode(False):
            self.passing_TD = torch.empty(
                most, runner.config.hidden_size, dtype=runner.dtype, device="cpu", pin_memory=cuda
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
        fits = count <= len(self.passing_TD) and chunks == 1
        self._learn()
        crew = self.crews[count.bit_length()]
        there = fits and (self.choice.there(count) or (count <= FEW and crew.tries))
        # The first of its kind finds other layers in the slots.
        follows = self._last is not None and (self._last[1] > 0) == there
        self._last = count, crew.number if there else 0
        self._listens = False
        wants = self.choice.wants(count, there=there)
        self._wants = follows and fits and (wants or (there and crew.tries))
        if not there:
            return None
        crew.count()
        batch = pack(entries, count, CPU, None, drafts)
        (chunk,) = batch.chunks
        runner = self.runner
        look = RowAttention(chunk, runner.config, runner.kv, most_together=0, widened=True)
        places = [
            Place(
                section.first,
                len(section.batch.rows) if section.captured else len(section.batch.ids),
                len(section.batch.ids),
            )
            for section in sections
        ]
        self.passes += 1
        return HostPass(self, chunk, look, places, threads=self._last[1])

    def end(self) -> None:
        """The pass has ended."""
        self.check.end()
        self._listens = self._wants

    def _learn(self) -> None:
        """How long the last pass took, which is over by now."""
        report = self._streamer.last_pass if self._listens and self._last is not None else None
        if report is None or self._last is None:
            return
        tokens, threads = self._last
        there = threads > 0
        if ("host" in report.steps) != there:
            return  # of a pass that nobody asked this about
        if there:
            self.crews[tokens.bit_length()].hear(threads, report.seconds)
        self.choice.hear(tokens, report.seconds, there=there)
        if there and (copy := report.steps.get("copy")) is not None and copy.bytes:
            self.choice.hear_link(copy.busy_seconds * self._total / copy.bytes)


@dataclass(slots=True)
class Residuals:
    """What goes from layer to layer: no tensor to the streamer, which would move it to memory of
    its own."""

    x_ND: torch.Tensor


def run_pass(runner: Runner, x_ND: torch.Tensor, step: Any, host: HostPass | None) -> None:
    """A pass of the runner's streamer."""
    if runner.host is None and len(runner.sides) == 1:
        runner.streamer.run_pass(x_ND, step)
        return

    def work(residuals: Residuals, tensors: Any, layer_idx: int) -> Residuals:
        residuals.x_ND = step(residuals.x_ND, tensors, layer_idx)
        return residuals

    runner.streamer.run_pass(Residuals(x_ND), work, on_host=host is not None)
    if runner.host is not None:
        runner.host.end()
