"""Passes in which every row takes one token, captured.

Where the GPU computes a layer faster than Python launches its kernels, launching is what takes the
time. Such a pass is launched once for each number of rows, captured in a CUDA graph, and replayed:
what differs from pass to pass, tokens, positions and places, is in device memory. Where nothing
streams that is the whole pass. Where layers do, or their keys and values, it is what each computes,
once for each place where the layer has been handed out: slots are few, and taken in turn. So it is
over several devices, each of which has a decoder of its own for its layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import takewhile

import torch

from ..kernels.triton_support import triton_serves
from ..kv.cache import KVCache
from ..kv.rows import BlockTable, Row
from ..models.config import ModelConfig
from ..models.rope import Rotary
from ..models.rope_config import Rope
from .batch import Batch, Chunk, Entry
from .captured_mixture import CapturedMixture
from .captured_part import CapturedPart
from .chunking import Chunking
from .decode_attention import DecodeAttention
from .graphs import Graphs
from .layers import Layers
from .splits import STATS, block_of, fewer_splits, fits_kernels, splits_of

logger = logging.getLogger(__name__)

MOST_ROWS = 8
"""Rows up to which whole passes are captured: with more, the work outgrows the launches."""
MOST_ROWS_STREAMED = 64
"""The same where something streams: Python then launches copies, too."""
MOST_GRAPHS = 512
"""Captures of layers; whatever would need more is launched. Each takes some device memory."""


def captured_rows(
    device: torch.device, config: ModelConfig, most: int = MOST_ROWS, *, on_demand: bool = False
) -> int:
    """Rows, up to ``most``, up to which passes may be captured on this device; 0: none can be.
    ``on_demand``: experts come when they are asked for."""
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    served = device.type == "cuda" and fits_kernels(*heads) and triton_serves(device)
    return most if served and (config.experts is None or on_demand) else 0


def obstacle(streamer: Layers, kv: KVCache, config: ModelConfig) -> str | None:
    """Why no pass over this model can be captured; None: those that decode can."""
    if config.experts is not None and not streamer.plan.expert_slots:
        return "experts come with their layers, and who computes is known only while a pass runs"
    if kv.host is not None and kv.layout.int8:
        return "keys and values are kept in eight bits"
    if not fits_kernels(config.num_heads, config.num_kv_heads, config.head_dim):
        return "its heads are too wide for the kernels"
    return None if all(map(triton_serves, kv.devices)) else "Triton does not serve the device"


class Decoder:
    """Does the passes in which every row takes one token.

    None are done before one of the streamer has ended, in which scales have been checked. On a GPU
    passes are captured; on a CPU, where Triton's interpreter serves, they are only launched.
    """

    def __init__(
        self,
        config: ModelConfig,
        kv: KVCache,
        rotary: Rotary,
        *,
        chunking: Chunking,
        interleaved: bool,
        whole: bool,
    ) -> None:
        """``interleaved``: see ``rope.rotate``. ``whole``: nothing streams, and all experts are in
        slots of their own."""
        self.whole, self.ready, self.led = whole, False, False
        """``led``: only experts do not stay, and the device brings those."""
        device, rows = rotary.device, min(chunking.captured_rows, kv.layout.tokens)
        self.part, self.mixture = (
            (None, None) if whole else _where_something_streams(config, kv, rotary, rows, chunking)
        )
        self.steps: Sequence[tuple[int, Mapping[str, torch.Tensor]]] = ()
        """What a pass of the streamer has handed out, if all of it is resident on the device."""
        self.widths: dict[int, int] = {}
        """By tail step, how many logits it gives."""
        self.passes = 0
        """How many have been done, at least in part, here."""
        self._config, self._rotary, self._rows = config, rotary, rows
        self._interleaved = interleaved
        self._spans = kv.rows.spans
        self._table = BlockTable(self._spans)
        self._filled: list[Row] = []
        """Whose blocks are in the table."""
        block = block_of(config.head_dim, kv.layout.dtype)
        most = kv.layout.tokens
        splits = {s: splits_of(min(s.window or most, most), block) for s in self._spans}
        sizes = [rows] if whole else range(1, rows + 1)
        parts = max(size * self._parts(n, size) for n in splits.values() for size in sizes)
        lines = config.num_heads * parts
        with torch.inference_mode(False):
            self._numbers = torch.zeros(rows, 3, dtype=torch.long, device=device)
            self._blocks = torch.zeros(rows, self._table.width, dtype=torch.int32, device=device)
            self._last = torch.arange(rows, device=device)
            self._logits = torch.empty(rows, config.vocab_size, dtype=torch.float32, device=device)
            self.normed_RD = torch.empty(
                rows, config.hidden_size, dtype=kv.layout.dtype, device=device
            )
            self._sums = torch.empty(lines * config.head_dim, dtype=torch.float32, device=device)
            self._stats = torch.empty(lines * STATS, dtype=torch.float32, device=device)
        self._block, self._splits = block, splits
        self._graphs = Graphs(device) if device.type == "cuda" else None
        self._ropes = {config.rope(i): i for i in reversed(range(config.num_layers))}
        self._rotated: dict[tuple[Rope, int], torch.Tensor] = {}

    def takes(self, entries: Sequence[Entry]) -> int:
        """How many of the first rows of a pass can be done here."""
        if not self.ready or (self._graphs is not None and self._graphs.failed):
            return 0
        count = len(list(takewhile(lambda entry: len(entry[1]) == 1, entries)))
        if self.whole:
            return count if count == len(entries) <= self._rows else 0
        return min(count, self._rows)

    def size(self, rows: int) -> int:
        """How many residuals so many rows take."""
        return rows if self.whole else min(1 << (rows - 1).bit_length(), self._rows)

    def fill(self, entries: Sequence[Entry]) -> Batch:
        """What the pass needs to know, brought to where its launches look for it.

        Captures of layers are many: those of 64 rows serve 33, too, of which the last is computed
        as often as there are rows to fill up, to the same result.
        """
        rows = [row for row, _ in entries]
        more = self.size(len(rows)) - len(rows)
        values = [[row.length, line, row.length + 1] for line, row in enumerate(rows)]
        values += values[-1:] * more
        numbers = self._numbers[: len(values)]
        # From pageable memory, which the driver has read when this returns.
        numbers.copy_(torch.tensor(values, device="cpu"), non_blocking=True)
        if rows != self._filled:
            lines = torch.tensor(self._table.lines(rows), dtype=torch.int32, device="cpu")
            self._blocks[: len(lines)].copy_(lines, non_blocking=True)
            self._filled = rows
        chunk = Chunk(0, (), numbers[:, 0], numbers[:, 2])
        tokens = [int(ids[0]) for _, ids in entries]
        ids = torch.tensor(tokens + tokens[-1:] * more, device="cpu")
        return Batch(ids, tuple((row, 1) for row in rows), (chunk,), self._last[: len(ids)])

    def attention(self, batch: Batch, *, whole: bool = False) -> DecodeAttention:
        """How the rows of a pass look back, of one that is captured as a ``whole``, or where none
        other is."""
        from ..kernels.decode_launching import Look

        numbers = self._numbers[: len(batch.ids)]
        looks = {
            span: Look(
                numbers=numbers,
                blocks=self._blocks,
                column=self._table.columns[span],
                window=span.window,
                splits=self._parts(self._splits[span], len(batch.ids)),
                block=self._block,
                sums=self._sums,
                stats=self._stats,
            )
            for span in self._spans
        }
        found = DecodeAttention(
            self._config, self._rotary, batch, looks, interleaved=self._interleaved
        )
        if not (self.whole or whole):
            found.tables = self._rotations(batch)
        return found

    def logits(self, batch: Batch) -> torch.Tensor:
        """Where a pass writes them, (R, V): the same memory in every pass."""
        return self._logits[: len(batch.ids)]

    def forward(self, batch: Batch, work: Callable[[], None]) -> torch.Tensor | None:
        """The logits of a pass whose launches are ``work``; None: it failed, nothing is changed
        but what the same pass will write again."""
        if self._graphs is None:
            work()
        elif not self._graphs.run(len(batch.ids), work):
            return None
        self.passes += 1
        return self.logits(batch).clone()

    def launch(self, size: int, key: Hashable, work: Callable[[], None]) -> None:
        """Do ``work`` of a step of a pass over so many rows (0: of ``part``), which ``key`` tells
        from all others of other addresses."""
        graphs, key = self._graphs, (size, key)
        full = graphs is not None and len(graphs) >= MOST_GRAPHS and key not in graphs
        if graphs is None or graphs.failed or full or not graphs.run(key, work):
            work()

    def _parts(self, splits: int, size: int) -> int:
        """To how many a row's positions are shared out in a pass over so many rows."""
        return splits if self.whole else fewer_splits(splits, size)

    def _rotations(self, batch: Batch) -> dict[Rope, torch.Tensor]:
        """The rotations of a pass, by kind: each where it is in every pass of so many tokens."""
        (chunk,) = batch.chunks
        for rope, layer_idx in self._ropes.items():
            table = self._rotary.rows(layer_idx, chunk.positions, chunk.lengths)
            kept = self._rotated.setdefault((rope, chunk.count), table)
            if kept is not table:
                kept.copy_(table)
        return {rope: self._rotated[rope, chunk.count] for rope in self._ropes}


def _where_something_streams(
    config: ModelConfig, kv: KVCache, rotary: Rotary, rows: int, chunking: Chunking
) -> tuple[CapturedPart | None, CapturedMixture | None]:
    """What does prompts' parts beside so many rows, and what does layers whose experts come on
    demand; None: nothing does."""
    own = kv.layout.dtype, rotary.device
    if config.experts is not None:
        return None, CapturedMixture(config, rows, *own)
    tokens = chunking.captured_part
    return CapturedPart(config, tokens, *own) if tokens else None, None


def open_decoder(
    streamer: Layers,
    config: ModelConfig,
    kv: KVCache,
    rotary: Rotary,
    *,
    chunking: Chunking,
    interleaved: bool,
) -> Decoder | None:
    """A decoder for as many rows as are to be captured, on the device of ``rotary``, where one can
    serve; where not, a line says why."""
    if not chunking.captured_rows:
        return None
    problem = obstacle(streamer, kv, config)
    if problem is not None:
        logger.info("no passes are captured: %s", problem)
        return None
    # No graph spans devices: there it is what each layer computes, though nothing may stream.
    stays = set(streamer.plan.tiers) == {"device"} and len(streamer.devices) == 1
    whole, led = stays and kv.host is None, False
    if whole and config.experts is not None:
        whole = streamer.plan.expert_slots >= config.experts.total
        led = not whole and streamer.most_on_device >= config.experts.per_token
    decoder = Decoder(config, kv, rotary, chunking=chunking, interleaved=interleaved, whole=whole)
    decoder.led = led
    return decoder
