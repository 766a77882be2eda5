"""Rows of the embedding, gathered on the host while the device computes.

The embedding stays in the checkpoint's file. The rows of a chunk are gathered into page-locked
memory and copied from there on the stream that computes: the call returns before the copy has
begun, so the next rows are gathered while the device is at work on these.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ..kv.pinned import GrowingMemory
from ..kv.transfers import Transfers, open_transfers
from ..models.config import ModelConfig
from ..weights.dequant import Unpacker
from ..weights.packed import FLOATS, Packed, take_rows
from ..weights.weights import embed_tokens, fill_embedding

STAGE_NBYTES = 16 << 20
"""A stage, at most: 2,340 tokens of 3,584 numbers in 16 bits."""
NUM_STAGES = 2
"""One is gathered into while the other is copied from."""
ALIGNMENT = 64
PAGE = 4096


class Embedding:
    """The embedding of a model, for one device.

    Thread rules: one thread. An interrupted :meth:`put` leaves nothing broken.
    """

    def __init__(
        self,
        table: Packed,
        config: ModelConfig,
        unpacker: Unpacker,
        *,
        chunk: int,
        transfers: Transfers | None = None,
    ) -> None:
        """``table``: over what ``host_tensor`` gives. ``chunk``: tokens that are put at a time.
        ``transfers``: the device's, unless a test brings its own; a CPU needs none."""
        self._table, self._config, self._unpacker = table, config, unpacker
        device = unpacker.device
        if transfers is None and device.type == "cuda":
            transfers = open_transfers(device)
        self._transfers = transfers
        self._stages: list[_Stage] = []
        self._turn = 0
        if transfers is not None:
            one = take_rows(table, torch.zeros(1, dtype=torch.long, device="cpu"))
            row_nbytes = sum(part.nbytes for part in one.parts.values())
            self._rows = max(1, min(chunk, STAGE_NBYTES // row_nbytes))
            nbytes = self._rows * row_nbytes + len(one.parts) * ALIGNMENT
            self._stages = [_Stage(nbytes, device, transfers) for _ in range(NUM_STAGES)]

    @property
    def host_nbytes(self) -> int:
        """Host memory that has been taken."""
        return sum(stage.memory.nbytes for stage in self._stages)

    def put(self, ids_T: torch.Tensor, out_TD: torch.Tensor) -> None:
        """Write what the first layer gets of these tokens, ids on the host, into ``out_TD`` on the
        device, in the order of its current stream."""
        if self._transfers is None:
            out_TD.copy_(embed_tokens(ids_T, self._table, self._config, self._unpacker))
            return
        for first in range(0, len(ids_T), self._rows):
            part = slice(first, first + self._rows)
            self._send(self._transfers, ids_T[part], out_TD[part])

    def close(self) -> None:
        """Give the page locks back, once no copy is under way. Idempotent."""
        if self._stages and self._transfers is not None:
            self._transfers.finish()
        for stage in self._stages:
            stage.memory.close()
        self._stages = []

    def _send(self, transfers: Transfers, ids_T: torch.Tensor, out_TD: torch.Tensor) -> None:
        """Of no more tokens than a stage holds."""
        stage = self._stages[self._turn]
        self._turn = (self._turn + 1) % NUM_STAGES
        transfers.block(stage.sent)
        stage.end = 0
        rows = take_rows(self._table, ids_T, stage.take)
        if rows.format in FLOATS and rows.parts["weight"].dtype == out_TD.dtype:
            there = {"weight": out_TD}
        else:
            there = {
                name: torch.empty(part.shape, dtype=part.dtype, device=out_TD.device)
                for name, part in rows.parts.items()
            }
        current = transfers.current()
        # After an interrupt no event may tell of these copies: what they then bring of the stage's
        # next content is of a pass that failed, and nobody looks at it.
        transfers.copy([(there[name], part) for name, part in rows.parts.items()], current)
        transfers.record(stage.sent, current)
        fill_embedding(out_TD, replace(rows, parts=there), self._config, self._unpacker)


class _Stage:
    """Page-locked memory, cut into tensors from the front."""

    def __init__(self, nbytes: int, device: torch.device, transfers: Transfers) -> None:
        self.memory = GrowingMemory(nbytes, PAGE, device)
        self.memory.reach(np.array([[0, nbytes]]))
        self.sent = transfers.event()
        """After the copies from here."""
        self.end = 0

    def take(self, part: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """These rows, gathered without memory in between."""
        shape, nbytes = (len(ids), *part.shape[1:]), len(ids) * part[:1].nbytes
        raw = self.memory.memory[self.end : self.end + nbytes]
        assert raw.numel() == nbytes, "the stage is too small"
        self.end += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return torch.index_select(part, 0, ids, out=raw.view(part.dtype).view(shape))
