"""Keys and values that live in host memory and travel to the device for each layer of a pass.

A layer's keys and values are copied right after its weights, on the streamer's copy stream, into
one of as many slots as the weights have; the pass appends its new tokens there; and only those go
back to the host, on a stream of their own.

The order of events rests on what the streamer promises of ``on_copy``: with as many slots as it has
itself, it calls for the layer that is to overwrite a slot only after the caller has given back
the layer that was in it; and the pass waits for all that is on the copy stream by then. What an
abort breaks of this is covered twice: a slot whose use did not end is not written before the next
pass has begun, and then only after all that was computed before. Whatever was not prefetched, for
whatever reason, the caller's own stream fetches. A pass that fails may leave copies home under way
from a slot that is then overwritten: they bring nothing that counts, and what replaces it follows
on the same stream.

Which of a draft's tokens follow is known only when they are home, and the next pass's first layers
are on their way: tokens that then move do so in host memory, once all is home, and what was fetched
before the next pass began counts only up to the first of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import torch

from .blocks import BLOCK
from .int8 import Int8Rows
from .moves import Move, moved_places
from .pinned import GrowingMemory
from .rows import Row, Span
from .tokens import Tokens
from .transfers import Transfers

PAGE = 4096
CODED = 4096
"""Tokens that are coded at a time, which bounds the temporaries."""


@dataclass(frozen=True, slots=True)
class TokenShape:
    """One token's keys and values in one layer: (2, num_kv_heads, head_dim)."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """Bytes as (places, 2, G, E)."""
        return memory.view(self.dtype).view(-1, 2, self.num_kv_heads, self.head_dim)


@dataclass(slots=True, eq=False)
class Slot:
    """Device memory for one layer. ``in_use`` belongs to the caller's thread."""

    raw: torch.Tensor
    """(bytes,), as in host memory."""
    used: Any
    """Computed with."""
    drained: Any
    """And new tokens have gone to the host."""
    in_use: bool = False


@dataclass(frozen=True, slots=True)
class Fetch:
    """What the copier's thread has brought for a layer."""

    slot: Slot
    tokens: Tokens | None
    """Of which rows, up to which; None: the slot could not be touched."""
    passes: int
    """How many had begun when it was begun."""

    def there(self, row: Row, passes: int) -> int:
        """Up to which token a row is there in a pass, which is that of so many: what has moved
        before that pass began, and after it was fetched, is not."""
        length = 0 if self.tokens is None else self.tokens.ends.get(row.uid, 0)
        moved_from = None if self.passes == passes else row.moved_from
        return length if moved_from is None else min(length, moved_from)


@dataclass(slots=True, eq=False)
class HostLayer:
    """One layer's home. ``tokens`` is replaced by the caller's thread and read by the copier's."""

    span: Span
    memory: GrowingMemory
    tokens: Tokens = field(default_factory=lambda: Tokens(()))
    """What to prefetch: of each row, what is here."""
    sent: Any = None
    """What is recorded behind the last way home of its tokens."""
    coming: bool = False
    """Some may be under way."""


class HostTier:
    """The layers whose keys and values are in host memory.

    Thread rules: :meth:`prefetch` on the copier's thread; all else on the thread that runs passes.
    """

    def __init__(
        self,
        spans: Mapping[int, Span],
        token: TokenShape,
        device: torch.device,
        transfers: Transfers,
        *,
        int8: bool = False,
    ) -> None:
        """``spans``: the layers that live here. :meth:`allocate` comes before the first pass."""
        self._token, self._device, self._transfers = token, device, transfers
        self._codec = Int8Rows(token.num_kv_heads, token.head_dim) if int8 else None
        self.token_nbytes = self._codec.token_nbytes if self._codec else token.nbytes
        block = BLOCK * self.token_nbytes
        block *= PAGE // gcd(PAGE, block)
        self._layers = {
            i: HostLayer(span, GrowingMemory(span.places * self.token_nbytes, block, device))
            for i, span in spans.items()
        }
        self._places = max(span.places for span in spans.values())
        self._slots: list[Slot] = []
        self._work: torch.Tensor | None = None
        self._calls = self._passes = 0
        self._fetched: dict[int, Fetch] = {}
        self._present = Tokens(())
        """Of the pass's rows, what each layer has as the pass begins."""
        self._sent: tuple[Tokens, Tokens] | None = None
        """What each layer sends home, and what is there then."""
        self._barrier, self._home = transfers.event(), transfers.event()
        self.late_nbytes = 0
        """Bytes that had not been prefetched, of all passes."""

    @property
    def host_nbytes(self) -> int:
        """Host memory that has been taken."""
        return sum(layer.memory.nbytes for layer in self._layers.values())

    def allocate(self, num_slots: int) -> None:
        """Make the slots: as many as the streamer has on the device, or more."""
        new, nbytes = self._transfers.event, self._places * self.token_nbytes
        with torch.inference_mode(False):
            for _ in range(max(1, min(num_slots, len(self._layers)))):
                raw = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
                self._slots.append(Slot(raw, new(), new()))
            if self._codec is not None:
                shape = (self._places * self._token.nbytes,)
                work = torch.empty(shape, dtype=torch.uint8, device=self._device)
                self._work = self._token.view(work)

    def prefetch(self, layer_idx: int, stream: Any) -> None:
        """The streamer's ``on_copy``: bring a layer's keys and values on ``stream``."""
        layer = self._layers.get(layer_idx)
        if layer is None:
            return
        slot, passes = self._slots[self._calls % len(self._slots)], self._passes
        self._calls += 1
        tokens = None
        if not slot.in_use:
            # Before what they were sent home by: whoever sees them has that to wait for.
            tokens = layer.tokens.of_rows_left()
            self._transfers.wait(self._barrier, stream)
            self._transfers.wait(slot.drained, stream)
            if layer.sent is not None:
                self._transfers.wait(layer.sent, stream)
            # The streamer lets the pass wait for all that is on this stream by now.
            self._copy(layer, tokens, to=slot.raw, source=layer.memory.memory, stream=stream)
        self._fetched[layer_idx] = Fetch(slot, tokens, passes)

    def begin(self, rows: Sequence[Row]) -> None:
        """Before a pass over these rows begins, of which each layer gets its present length."""
        # In this order: whoever sees a slot free has the barrier to wait for.
        self._transfers.record(self._barrier, self._transfers.current())
        for slot in self._slots:
            slot.in_use = False
        self._present, self._sent = Tokens((row, 0, row.length) for row in rows), None
        for layer in self._layers.values():
            layer.tokens = self._present
        self._passes += 1  # last: what sees it fetches these rows, as they are now

    def open(self, layer_idx: int, rows: Sequence[Row]) -> torch.Tensor:
        """The layer's keys and values on the device: (places, 2, G, E), all rows' in place."""
        layer, fetch = self._layers[layer_idx], self._fetched[layer_idx]
        slot, current = fetch.slot, self._transfers.current()
        slot.in_use = True
        late = [(row, fetch.there(row, self._passes), row.length) for row in rows]
        if any(first < end for _, first, end in late):
            # It has come home: the copier's stream, which this one follows, has waited for it.
            self.late_nbytes += self._copy(
                layer, Tokens(late), to=slot.raw, source=layer.memory.memory, stream=current
            )
        if self._codec is None:
            return self._token.view(slot.raw)
        assert self._work is not None
        for first, end in self._coded(layer, self._present):
            self._codec.decode(self._tokens(slot)[first:end], self._work[first:end])
        return self._work

    def close_layer(self, layer_idx: int, batch: Sequence[tuple[Row, int]]) -> None:
        """The pass has appended so many tokens to each row: send them home."""
        layer, slot = self._layers[layer_idx], self._fetched[layer_idx].slot
        new, then = self._grown(batch)
        if self._codec is not None:
            assert self._work is not None
            for first, end in self._coded(layer, new):
                self._codec.encode(self._work[first:end], self._tokens(slot)[first:end])
        transfers = self._transfers
        transfers.record(slot.used, transfers.current())
        transfers.wait(slot.used, transfers.back)
        layer.memory.reach(new.runs(layer.span) * self.token_nbytes)
        layer.coming = True
        self._copy(layer, new, to=layer.memory.memory, source=slot.raw, stream=transfers.back)
        transfers.record(slot.drained, transfers.back)
        layer.sent = slot.drained
        layer.tokens = then
        slot.in_use = False

    def open_home(self, layer_idx: int, batch: Sequence[tuple[Row, int]]) -> torch.Tensor:
        """The layer's keys and values at home, (places, 2, G, E), with room for so many tokens more
        of each row: for who computes there."""
        layer = self._layers[layer_idx]
        if layer.coming:
            self._await_home()
        layer.memory.reach(self._grown(batch)[0].runs(layer.span) * self.token_nbytes)
        return self._token.view(layer.memory.memory)

    def close_home(self, layer_idx: int, batch: Sequence[tuple[Row, int]]) -> None:
        """The host has appended so many tokens to each row."""
        _, self._layers[layer_idx].tokens = self._grown(batch)

    def _grown(self, batch: Sequence[tuple[Row, int]]) -> tuple[Tokens, Tokens]:
        """What the pass appends in each layer, and what is there then."""
        if self._sent is None:
            grown = [(row, row.length, row.length + number) for row, number in batch]
            self._sent = Tokens(grown), Tokens((row, 0, end) for row, _, end in grown)
        return self._sent

    def _await_home(self) -> None:
        """Block until all that was sent home is there."""
        transfers = self._transfers
        transfers.record(self._home, transfers.back)
        transfers.block(self._home)
        for layer in self._layers.values():
            layer.coming = False

    def move(self, moves: Sequence[Move]) -> None:
        """Move tokens at home, where a pass has sent them; rows' ``moved_from`` is the caller's."""
        self._await_home()
        for span in {layer.span for layer in self._layers.values()}:
            places = moved_places(moves, span)
            origins, goals = (torch.tensor(numbers, device="cpu") for numbers in places)
            for layer in self._layers.values():
                if layer.span == span:
                    tokens = layer.memory.memory.view(-1, self.token_nbytes)
                    tokens[goals] = tokens[origins]

    def close(self) -> None:
        """Give page locks and slots back, once no transfer is under way."""
        self._transfers.finish()
        self._fetched.clear()
        self._slots.clear()
        self._work = None
        for layer in self._layers.values():
            layer.memory.close()

    def _copy(
        self,
        layer: HostLayer,
        tokens: Tokens,
        *,
        to: torch.Tensor,
        source: torch.Tensor,
        stream: Any,
    ) -> int:
        """Enqueue copies of rows' tokens between their places in a slot and at home: bytes."""
        pieces = layer.memory.pieces(tokens.runs(layer.span) * self.token_nbytes)
        if layer.memory.refused:
            pairs = ((to[i : i + n], source[i : i + n]) for i, n in pieces.tolist())
            self._transfers.copy(pairs, stream)
        else:
            self._transfers.copy_pieces(to, source, pieces, stream)
        return int(pieces[:, 1].sum())

    def _tokens(self, slot: Slot) -> torch.Tensor:
        return slot.raw.view(self._places, self.token_nbytes)

    def _coded(self, layer: HostLayer, tokens: Tokens) -> Iterator[tuple[int, int]]:
        """Places of rows' tokens, a few at a time."""
        for place, number in tokens.runs(layer.span).tolist():
            for offset in range(place, place + number, CODED):
                yield offset, min(offset + CODED, place + number)
