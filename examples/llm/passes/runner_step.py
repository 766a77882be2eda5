"""What a streamer calls for each layer of a runner's pass, and for each piece of the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..models.mixing import expect
from ..models.model import Attention as Look
from ..models.model import decoder_layer
from ..models.rope_config import Rope
from ..on_device.side import DeviceSide
from ..on_host.host_pass import HostPass
from ..weights.weights import StepWeights
from .batch import Chunk
from .captured_part import CapturedPart, Launch
from .section import Section

if TYPE_CHECKING:
    from .runner import Runner


class RunnerStep:
    """The ``layer_fn`` of one pass."""

    def __init__(
        self,
        runner: Runner,
        sections: Sequence[Section],
        logits: torch.Tensor,
        *,
        on_layer: Callable[[int], object] | None = None,
        host: HostPass | None = None,
    ) -> None:
        """``logits`` are to be filled: of those that are wanted of each section, in their order;
        where all is captured, of what fills it up, too. ``host`` computes layers that lie in host
        memory; None: none are."""
        self.sections, self.logits = sections, logits
        self.steps: list[tuple[int, Mapping[str, torch.Tensor]]] = []
        """What has been handed out, for a decoder; nobody else may look at it any more."""
        self._runner, self._on_layer = runner, on_layer
        alone = len(sections) == len(runner.sides) == 1
        self._captured = sections[0] if alone and sections[0].captured else None
        """If it is all of the pass, on one device, the head is captured, too."""
        self._host = host
        self._tables: dict[tuple[Rope, int, int], torch.Tensor] = {}
        self._there: dict[int, Sequence[Section]] = {0: sections}
        """The sections, by the number of the device that computes them."""
        self._normed_there: dict[int, torch.Tensor] = {}
        """What the head gets, likewise."""
        self._filled = 0
        self._widths: dict[int, int] = {}
        if self._captured is not None:
            assert runner.decoder is not None
            self._widths = runner.decoder.widths

    def __call__(
        self, x_ND: torch.Tensor, tensors: Mapping[str, torch.Tensor], layer_idx: int
    ) -> torch.Tensor:
        runner = self._runner
        if runner.keeps_steps:
            self.steps.append((layer_idx, tensors))
        last_layer = runner.config.num_layers - 1
        if layer_idx <= last_layer:
            if self._on_layer is not None:
                self._on_layer(layer_idx)
            x_ND = self._layer(x_ND, tensors, layer_idx)
            if layer_idx == last_layer and runner.head_is_loaded:
                self._add_logits(self._normed(x_ND, 0), {}, runner.sides[0], layer_idx + 1)
            return x_ND
        side = runner.side(layer_idx)
        self._add_logits(self._normed(x_ND, side.number), tensors, side, layer_idx)
        return x_ND

    def _layer(
        self, x_ND: torch.Tensor, tensors: Mapping[str, torch.Tensor], layer_idx: int
    ) -> torch.Tensor:
        """All tokens through one layer, in place, where it is computed."""
        runner = self._runner
        if self._host is not None and self._host.takes(layer_idx):
            self._host.compute(x_ND, tensors, layer_idx)
            return x_ND
        side = runner.side(layer_idx)
        x_ND, decoder = side.take(x_ND), side.decoder
        memory = runner.kv.open(layer_idx)
        addresses, mixture = (memory, *tensors.values()), None
        if decoder is not None and runner.config.mixture(layer_idx) is not None:
            mixture = decoder.mixture
        for section in self._on(side):
            weights = side.weights(tensors, layer_idx)
            if section.captured and mixture is not None:
                x_RD, launch = section.part(x_ND), self._launches(section, layer_idx, addresses)
                (look,) = self._looks(section, weights, memory)
                mixture.compute(x_RD, weights, look, launch)
            else:
                work = partial(self._compute, section, x_ND, weights, memory)
                self._launch(section, layer_idx, addresses, work)
        runner.kv.close_layer(layer_idx)
        return x_ND

    def _on(self, side: DeviceSide) -> Sequence[Section]:
        """The sections as a device sees them."""
        if side.number not in self._there:
            self._there[side.number] = [section.on(side) for section in self.sections]
        return self._there[side.number]

    def _compute(
        self, section: Section, x_ND: torch.Tensor, weights: StepWeights, memory: torch.Tensor
    ) -> None:
        """A section's tokens through a layer, chunk by chunk."""
        runner, layer_idx, x_ND = self._runner, weights.layer_idx, section.part(x_ND)
        looks = self._looks(section, weights, memory)
        for chunk, attention, look in zip(
            section.batch.chunks, section.attentions, looks, strict=True
        ):
            x_TD = x_ND[chunk.first : chunk.first + chunk.count]
            if layer_idx == 0 and chunk.first:
                runner.embed(section.batch, chunk, x_ND)
            elif layer_idx == 0:
                expect(x_TD, weights, runner.config)
            table = None if attention.rotates else self._table(chunk, layer_idx)
            part = self._part(layer_idx) if section.in_parts else None
            if part is not None and table is not None and part.takes(chunk.count):
                launch = self._launches(None, layer_idx, weights.addresses)
                part.compute(x_TD, weights, table, look, launch)
            else:
                decoder_layer(x_TD, weights, runner.config, table, look, out=x_TD)

    def _looks(self, section: Section, weights: StepWeights, memory: torch.Tensor) -> list[Look]:
        """How its chunks look back in a layer."""
        span, sinks = self._runner.kv.span(weights.layer_idx), weights.sinks()
        return [
            lambda i, *qkv, attention=attention: attention(i, span, memory, qkv, sinks)
            for attention in section.attentions
        ]

    def _launch(
        self,
        section: Section | None,
        layer_idx: int,
        addresses: Sequence[torch.Tensor],
        work: Callable[[], None],
    ) -> None:
        """Do what a step computes of a section; None: of no captured one. Its operands are at these
        addresses, and else where they are in every pass."""
        decoder = self._runner.side(layer_idx).decoder
        if section is None or not section.captured or decoder is None:
            work()
        else:
            key = (layer_idx, *(tensor.data_ptr() for tensor in addresses))
            decoder.launch(len(section.batch.ids), key, work)

    def _part(self, layer_idx: int) -> CapturedPart:
        """Where a layer computes sections that go in parts."""
        decoder = self._runner.side(layer_idx).decoder
        assert decoder is not None and decoder.part is not None
        return decoder.part

    def _launches(
        self, section: Section | None, layer_idx: int, addresses: Sequence[torch.Tensor]
    ) -> Launch:
        """How the parts of a layer with operands at these addresses are done for a section that is
        captured; None: for a prompt's part."""
        decoder = self._runner.side(layer_idx).decoder
        assert decoder is not None
        size = 0 if section is None else len(section.batch.ids)
        at = tuple(tensor.data_ptr() for tensor in addresses)
        return lambda part, work: decoder.launch(size, (part, layer_idx, *at), work)

    def _normed(self, x_ND: torch.Tensor, number: int) -> torch.Tensor:
        """What the head gets of the tokens whose logits are wanted, on a device. ``x_ND`` is what
        the last layer has left, wherever that is."""
        runner, captured, there = self._runner, self._captured, self._normed_there
        if number in there:
            return there[number]
        side = runner.sides[number]
        if there:
            here = next(iter(there.values()))
            found = here.to(side.device, non_blocking=True)
        elif captured is not None and runner.decoder is not None:
            normed = side.final_norm(captured.part(x_ND))
            found = runner.decoder.normed_RD[: len(normed)].copy_(normed)
        else:
            left = self._on(runner.side_of(x_ND))
            wanted = [section.wanted(x_ND) for section in left]
            both = wanted[0] if len(wanted) == 1 else torch.cat(wanted)
            found = side.final_norm(both.to(side.device, non_blocking=True))
        there[number] = found
        return found

    def _add_logits(
        self, x_ND: torch.Tensor, tensors: Mapping[str, torch.Tensor], side: DeviceSide, step: int
    ) -> None:
        """Those of the next piece of the vocabulary."""
        first = self._filled

        def work() -> None:
            piece = side.head(x_ND, tensors, first)
            self.logits[:, first : first + piece.shape[1]] = piece
            self._widths[step] = piece.shape[1]

        self._launch(self._captured, step, tuple(tensors.values()), work)
        self._filled = first + self._widths[step]

    def _table(self, chunk: Chunk, layer_idx: int) -> torch.Tensor:
        """The rotation of a chunk, computed once for all layers that share it."""
        side = self._runner.side(layer_idx)
        key = (self._runner.config.rope(layer_idx), chunk.first, side.number)
        if key not in self._tables:
            self._tables[key] = side.rotation(chunk, layer_idx)
        return self._tables[key]
