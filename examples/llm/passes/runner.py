"""One forward pass after another over a streamed model, for any rows of its key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from layer_streamer import ClosedError

from ..drafts.tree import Tree
from ..kv.cache import KVCache
from ..models.config import ModelConfig
from ..models.mixing import goes_by_token
from ..models.names import WeightNames
from ..on_device.side import DeviceSide
from ..on_host.host_pass import HostPass
from ..on_host.side import HostSide, run_pass
from .attention import fast_kernels
from .batch import Batch, Chunk, Entry, pack
from .chunking import Chunking
from .embedding import Embedding
from .layers import Layers
from .runner_step import RunnerStep
from .section import Section
from .ways import Attention

Step = Callable[[torch.Tensor, Mapping[str, torch.Tensor], int], torch.Tensor]
"""What the streamer calls for each layer of a pass."""


class Runner:
    """A model whose layers are streamed in every pass.

    The streamer must have been opened with what ``names.cast`` says for its ``dtype``. With
    ``tail=[names.head]`` the output head is streamed in pieces, else it is loaded. If ``kv`` has
    layers in host memory, it needs ``on_copy=kv.host.prefetch``.

    Memory on each device: one residual stream for as many tokens as ``kv`` holds, which its layers
    update in place, and the temporaries of one chunk. Tokens are embedded on the first. With
    ``decoder``, that of captured passes: where nothing streams, these are none of the streamer,
    whose ``last_pass`` knows none of them.
    """

    def __init__(
        self,
        streamer: Layers,
        config: ModelConfig,
        names: WeightNames,
        kv: KVCache,
        *,
        dtype: torch.dtype,
        chunking: Chunking | None = None,
    ) -> None:
        self.streamer, self.config, self.kv = streamer, config, kv
        self.dtype, self.names = dtype, names
        self._chunking = chunking if chunking is not None else Chunking()
        self.head_is_loaded = streamer.num_steps == streamer.manifest.num_layers
        self._led: dict[int, bool] = {}  # by rows, whether the device brings what they ask for
        self.host: HostSide | None = None  # computes layers in host memory, where some may be
        self.on_pass: Callable[[int], object] | None = None
        """Hears of each pass, over so many tokens, once it has ended."""
        self.sides = [DeviceSide(0, streamer, config, names, kv, self._chunking)]
        """By device, in whose turn layers come."""
        chunking = self._chunking
        if self.sides[0].decoder is None:  # and nobody has to say that again
            chunking = replace(chunking, captured_rows=0)
        for number in range(1, len(streamer.devices)):
            self.sides.append(DeviceSide(number, streamer, config, names, kv, chunking))
        self.decoder = self.sides[0].decoder
        """What says which passes are captured; further devices have their own for their layers."""
        matrix = names.embedding_matrix
        table = matrix.packed({k: streamer.host_tensor(k) for k in matrix.keys.values()})
        chunk = min(self._chunking.tokens, kv.layout.tokens)
        unpacker = self.sides[0].unpacker
        self._embedding: Embedding | None = Embedding(table, config, unpacker, chunk=chunk)

    def forward(
        self,
        entries: Sequence[Entry],
        *,
        every_position: bool = False,
        drafts: Sequence[Tree] | None = None,
        on_layer: Callable[[int], object] | None = None,
    ) -> torch.Tensor:
        """Append tokens to rows, in one pass over the model.

        Returns the float32 logits of what follows each row's last token (rows, vocab_size), or each
        token, (tokens, vocab_size), packed as the rows are. ``drafts``: one of each row, whose
        tokens are its last ones; logits are of what follows these, and the token before them.
        ``on_layer`` hears of each layer as it starts. One that fails leaves the rows as they were.
        """
        self._refuse_closed()
        count = sum(len(ids) for _, ids in entries)
        if count > self.most_tokens:
            raise ValueError(f"{count} tokens in one pass: room is for {self.most_tokens}")
        self.kv.begin([(row, len(ids)) for row, ids in entries])
        wanted = None if drafts is None else [1 + len(draft) for draft in drafts]
        if every_position:
            wanted = [len(ids) for _, ids in entries]
        with torch.inference_mode():
            captured = 0 if self.decoder is None or on_layer else self._captured(entries)
            whole = captured == len(entries) and self._is_one_capture(captured)
            logits = self._replay(entries) if whole else None
            if logits is None:
                sections = self._sections(entries, wanted, drafts, captured=captured)
                host = self.host.take(entries, drafts, sections) if self.host else None
                logits = self._stream(sections, on_layer=on_layer, host=host)
        self.kv.end()
        if self.on_pass is not None:
            self.on_pass(count)
        return logits

    @property
    def most_tokens(self) -> int:
        """Of one pass, whatever the rows' windows hold."""
        return self.kv.layout.tokens

    @property
    def takes_trees(self) -> bool:
        """True: a draft may be a tree; False: a chain only."""
        return self.sides[0].ways.takes_trees

    @property
    def captures_passes(self) -> bool:
        """True: one that decodes is captured as a whole, and costs what its tokens do."""
        return self.decoder is not None and self.decoder.whole

    @property
    def keeps_steps(self) -> bool:
        """True: what passes of the streamer hand out serves those that are captured."""
        return self.decoder is not None and (self.decoder.whole or self.decoder.led)

    def repeat(self, entries: Sequence[Entry], around: Callable[[Step, Batch, Any], Step]) -> None:
        """A pass of the streamer that leaves the rows as they are, for who looks at it: its step is
        ``around(step, batch, x_ND)``, where x_ND are the residuals before it."""
        self._refuse_closed()
        self.kv.begin([(row, len(ids)) for row, ids in entries])
        with torch.inference_mode():
            self._stream(self._sections(entries), around=around)

    def close(self) -> None:
        """Let go of all memory on devices, and of the layers, after the streamer has been closed.
        Idempotent; a pass is then a ClosedError."""
        self.decoder = self.host = None
        if self._embedding is not None:
            self._embedding.close()
        self._embedding = None
        self.sides = []
        self.names = replace(self.names, adapter=None)

    def _refuse_closed(self) -> None:
        if not self.sides:
            raise ClosedError("the engine is closed")

    def _captured(self, entries: Sequence[Entry]) -> int:
        """How many of a pass's first rows are done as the decoder does them."""
        decoder = self.decoder
        assert decoder is not None
        if decoder.whole and self.config.experts is not None and not self.streamer.experts_stay:
            return 0
        return decoder.takes(entries)

    def _is_one_capture(self, rows: int) -> bool:
        """True: a pass over so many rows, which take one token each, is captured as a whole."""
        decoder, experts = self.decoder, self.config.experts
        if decoder is None or decoder.whole or not decoder.led or experts is None:
            return self.captures_passes
        size = decoder.size(rows)
        served = self._led.get(size)
        if served is None:
            served = size * experts.per_token <= self.streamer.most_on_device
            served = self._led[size] = served and all(
                goes_by_token(self.sides[0].residuals_ND[:size], self.side(i).weights(tensors, i))
                for i, tensors in decoder.steps
                if self.config.mixture(i) is not None
            )
        return served

    def _sections(
        self,
        entries: Sequence[Entry],
        wanted: Sequence[int] | None = None,
        drafts: Sequence[Tree] | None = None,
        *,
        captured: int = 0,
    ) -> list[Section]:
        """A pass's tokens by how they are computed: those of the first rows may be ``captured``."""
        found, first, decoder = list[Section](), 0, self.decoder
        others = sum(len(ids) for _, ids in entries[captured:])
        if decoder is not None and captured:
            first = decoder.size(captured)
            if self.captures_passes or first + others > self.most_tokens:
                captured = first = 0
            else:
                batch = decoder.fill(entries[:captured])
                found.append(Section(batch, [decoder.attention(batch)], captured=True))
        if entries[captured:]:
            part = decoder.part if decoder is not None and captured else None
            batch = pack(
                entries[captured:],
                self._chunking.tokens if part is None else part.tokens,
                self.kv.device,
                None if wanted is None else wanted[captured:],
                None if drafts is None else drafts[captured:],
            )
            attentions = [self.attention(chunk) for chunk in batch.chunks]
            found.append(Section(batch, attentions, first, in_parts=part is not None))
        return found

    def _stream(
        self,
        sections: Sequence[Section],
        *,
        on_layer: Callable[[int], object] | None = None,
        host: HostPass | None = None,
        around: Callable[[Step, Batch, Any], Step] = lambda step, batch, x_ND: step,
    ) -> torch.Tensor:
        """A pass of the streamer: its logits."""
        decoder, last = self.decoder, sections[-1]
        count = sum(section.count for section in sections)
        with fast_kernels(self.kv.device):
            if decoder is not None and last.captured and len(self.sides) == 1:
                logits = decoder.logits(last.batch)
            else:
                shape = (count, self.config.vocab_size)
                logits = torch.empty(shape, dtype=torch.float32, device=self.kv.device)
            step = RunnerStep(self, sections, logits, on_layer=on_layer, host=host)
            x_ND = self._begin(sections)
            run_pass(self, x_ND, around(step, last.batch, x_ND), host)
            for side in self.sides:
                side.check.end()
        if decoder is not None:
            decoder.passes += sections[0].captured
            decoder.steps, decoder.ready = step.steps, True
        return logits[:count].clone() if last.captured else logits

    def _replay(self, entries: Sequence[Entry]) -> torch.Tensor | None:
        """The logits of a pass that is captured as a whole; None: it failed."""
        decoder = self.decoder
        assert decoder is not None
        batch = decoder.fill(entries)
        embedded_ND = self._begin([Section(batch, ())])

        def launch() -> None:
            section = Section(batch, [decoder.attention(batch, whole=True)])
            step = RunnerStep(self, [section], decoder.logits(batch))
            x_ND = embedded_ND
            for layer_idx, tensors in decoder.steps:
                x_ND = step(x_ND, tensors, layer_idx)

        with self.streamer.experts_on_device() if decoder.led else nullcontext():
            logits = decoder.forward(batch, launch)
        return None if logits is None else logits[: len(entries)]

    def _begin(self, sections: Sequence[Section]) -> torch.Tensor:
        """The residual stream with each section's first chunk. Others follow one by one, so that
        the device computes while their rows are gathered."""
        last = sections[-1]
        x_ND = self.sides[0].residuals_ND[: last.first + len(last.batch.ids)]
        for section in sections:
            self.embed(section.batch, section.batch.chunks[0], section.part(x_ND))
        return x_ND

    def embed(self, batch: Batch, chunk: Chunk, x_ND: torch.Tensor) -> None:
        """What the first layer gets of a chunk, written to its place among the residuals."""
        assert self._embedding is not None
        part = slice(chunk.first, chunk.first + chunk.count)
        self._embedding.put(batch.ids[part], x_ND[part])

    def side(self, step: int) -> DeviceSide:
        """Of the device that a layer, or a piece of the head behind them, is handed out on."""
        return self.sides[step % len(self.sides)]

    def side_of(self, x_ND: torch.Tensor) -> DeviceSide:
        """Where residuals, or what is made of them, are."""
        return next(side for side in self.sides if side.device == x_ND.device)

    def attention(self, chunk: Chunk) -> Attention:
        """How the rows of a chunk look back, on the first device."""
        return self.sides[0].attention(chunk)

    def final_norm(self, x_ND: torch.Tensor) -> torch.Tensor:
        """What the head gets of residuals, where they are."""
        return self.side_of(x_ND).final_norm(x_ND)
