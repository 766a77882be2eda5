"""What a streamer calls for each layer of a runner's pass, and for each piece of the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..models.rope_config import Rope
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
    ) -> None:
        """``logits`` are to be filled: of those that are wanted of each section, in their order;
        where all is captured, of what fills it up, too."""
        self.sections, self.logits = sections, logits
        self.steps: list[tuple[int, Mapping[str, torch.Tensor]]] = []
        """What has been handed out, for a decoder; nobody else may look at it any more."""
        self._runner, self._on_layer = runner, on_layer
        self._captured = sections[0] if len(sections) == 1 and sections[0].captured else None
        """If it is all of the pass, the head is captured, too."""
        self._tables: dict[tuple[Rope, int], torch.Tensor] = {}
        self._filled = 0
        self._widths: dict[int, int] = {}
        if self._captured is not None:
            assert runner.decoder is not None
            self._widths = runner.decoder.widths

    def __call__(
        self, x_ND: torch.Tensor, tensors: Mapping[str, torch.Tensor], layer_idx: int
    ) -> torch.Tensor:
        runner = self._runner
        if runner.captures_passes:
            self.steps.append((layer_idx, tensors))
        last_layer = runner.config.num_layers - 1
        if layer_idx <= last_layer:
            if self._on_layer is not None:
                self._on_layer(layer_idx)
            runner.layer(x_ND, tensors, layer_idx, self)
            if layer_idx == last_layer and runner.head_is_loaded:
                self._add_logits(self._normed(x_ND), {}, layer_idx + 1)
            return x_ND
        if layer_idx == last_layer + 1:
            x_ND = self._normed(x_ND)
        self._add_logits(x_ND, tensors, layer_idx)
        return x_ND

    def launch(
        self,
        section: Section | None,
        layer_idx: int,
        addresses: Sequence[torch.Tensor],
        work: Callable[[], None],
    ) -> None:
        """Do what a step computes of a section; None: of no captured one. Its operands are at these
        addresses, and else where they are in every pass."""
        decoder = self._runner.decoder
        if section is None or not section.captured or decoder is None:
            work()
        else:
            key = (layer_idx, *(tensor.data_ptr() for tensor in addresses))
            decoder.launch(len(section.batch.ids), key, work)

    @property
    def part(self) -> CapturedPart:
        """Where sections that go in parts are computed."""
        decoder = self._runner.decoder
        assert decoder is not None and decoder.part is not None
        return decoder.part

    def halves(self, layer_idx: int, tensors: Mapping[str, torch.Tensor]) -> Launch:
        """How the halves of a layer with these weights are done for a part."""
        decoder = self._runner.decoder
        assert decoder is not None
        addresses = tuple(tensor.data_ptr() for tensor in tensors.values())
        return lambda half, work: decoder.launch(0, (half, layer_idx, *addresses), work)

    def _normed(self, x_ND: torch.Tensor) -> torch.Tensor:
        """What the head gets of the tokens whose logits are wanted."""
        runner, captured = self._runner, self._captured
        if captured is not None and runner.decoder is not None:
            normed = runner.final_norm(captured.part(x_ND))
            return runner.decoder.normed_RD[: len(normed)].copy_(normed)
        wanted = [section.wanted(x_ND) for section in self.sections]
        return runner.final_norm(wanted[0] if len(wanted) == 1 else torch.cat(wanted))

    def _add_logits(
        self, x_ND: torch.Tensor, tensors: Mapping[str, torch.Tensor], step: int
    ) -> None:
        """Those of the next piece of the vocabulary."""
        first = self._filled

        def work() -> None:
            piece = self._runner.head(x_ND, tensors, first)
            self.logits[:, first : first + piece.shape[1]] = piece
            self._widths[step] = piece.shape[1]

        self.launch(self._captured, step, tuple(tensors.values()), work)
        self._filled = first + self._widths[step]

    def table(self, chunk: Chunk, layer_idx: int) -> torch.Tensor:
        """The rotation of a chunk, computed once for all layers that share it."""
        key = (self._runner.config.rope(layer_idx), chunk.first)
        if key not in self._tables:
            self._tables[key] = self._runner.rotation(chunk, layer_idx)
        return self._tables[key]
