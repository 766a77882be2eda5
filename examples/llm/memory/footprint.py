"""How much memory the engine itself needs, beside the streamer's layers. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from layer_streamer import TensorSpec

from ..kv.host import CODED, TokenShape
from ..kv.int8 import Int8Rows
from ..kv.rows import Span, make_spans
from ..models.config import ModelConfig
from ..passes.attention import SPARE
from ..passes.embedding import NUM_STAGES, PAGE, STAGE_NBYTES
from ..passes.row_attention import GATHER_NBYTES
from ..passes.splits import STATS, block_of, fewer_splits, splits_of
from ..passes.ways import tiles_nbytes

FLOAT = 4
"""Bytes of a float32, in which norms, rotations and logits are computed."""
SORTED = 6 * 8 + 4 * FLOAT
"""Of each expert that a token passes: int64 numbers, before and after they are sorted, and what it
counts."""
FRAGMENTS = 64 << 20
"""What the device's allocator rounds up and cannot reuse."""
CAPTURED_FRAGMENTS = 128 << 20
"""The same in the pool of captured passes, with what libraries keep for the stream of captures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What an engine is to hold at a time."""

    kv_tokens: int
    """Tokens of all rows together."""
    max_batch: int
    """Rows."""
    drafted: int = 0
    """Tokens of drafts, of all rows together, that a pass looks at."""
    dtype: torch.dtype
    device_type: str
    int8: bool
    """Keys and values in host memory are kept in eight bits."""
    packed_nbytes: int
    """Buffers that packed weights are unpacked into."""
    static_nbytes: int = 0
    """Tensors that stay on each device beside the layers: norms, scales of the head."""
    head_nbytes: int = 0
    """The output head on the first device, where it is loaded."""
    captured_rows: int = 0
    """Rows up to which passes that decode may be captured; 0: none are."""
    captured_rows_streamed: int = 0
    """The same of what each layer computes, where something streams."""
    captured_part: int = 0
    """Tokens of a prompt's part that is captured beside these; 0: none is."""
    draft_nbytes: tuple[int, ...] = ()
    """All that what drafts takes, by device; nothing on those behind."""
    reproducible: bool = False
    """Passes are computed in fixed tiles."""


class Footprint:
    """The bytes of one model's needs."""

    def __init__(self, config: ModelConfig, needs: Needs) -> None:
        self.config, self.needs = config, needs
        self._token = TokenShape(config.num_kv_heads, config.head_dim, needs.dtype)
        spans = make_spans(config.windows, needs.kv_tokens, needs.max_batch)
        by_window: Mapping[int | None, Span] = {span.window: span for span in spans}
        self._places = [by_window[window].places for window in config.windows]

    def layer_on_device(self, layer_idx: int) -> int:
        """A layer's keys and values on the device."""
        return self._places[layer_idx] * self._token.nbytes

    def layer_on_host(self, layer_idx: int) -> int:
        """The same in host memory, at most."""
        return self._places[layer_idx] * self._host_token_nbytes

    def staging(self, host_layers: Sequence[int], num_slots: int) -> int:
        """Device memory through which layers in host memory pass."""
        if not host_layers:
            return 0
        places = max(self._places[i] for i in host_layers)
        slots = max(1, min(num_slots, len(host_layers))) * places * self._host_token_nbytes
        if not self.needs.int8:
            return slots
        coding = CODED * self._token.nbytes // self.needs.dtype.itemsize * FLOAT * 4
        return slots + places * self._token.nbytes + coding

    def gathered(self, chunk: int) -> int:
        """Host memory that rows of the embedding are gathered in, at most."""
        if self.needs.device_type != "cuda":
            return 0
        nbytes = min(chunk, self.needs.kv_tokens) * self.config.hidden_size * FLOAT
        return NUM_STAGES * (min(STAGE_NBYTES, nbytes) + PAGE)

    def residual(self) -> int:
        """The residual stream of all tokens."""
        return self.needs.kv_tokens * self.config.hidden_size * self.needs.dtype.itemsize

    def temporaries(self, chunk: int) -> int:
        """The largest that live at one time, of a chunk of so many tokens."""
        config, needs = self.config, self.needs
        chunk = min(chunk, needs.kv_tokens)
        size = needs.dtype.itemsize
        nbytes = chunk * self._token_temporaries() + self._tables()
        if needs.reproducible:
            nbytes += tiles_nbytes(config, needs.device_type, needs.dtype)
        window = max((w for w in config.windows if w is not None), default=0)
        if window:
            seen = min(window, needs.kv_tokens) + chunk
            nbytes += chunk * seen * (1 + 2 * size) + seen * 2 * self._token.nbytes
        if config.family.sinks:  # a row's keys and values in wider heads; or scores of its query
            wider = (config.head_dim + SPARE) / config.head_dim
            copied = 2 * int(wider * self._token.nbytes)
            nbytes += needs.kv_tokens * max(copied, 4 * FLOAT * config.num_heads)
        if needs.drafted:  # masks of drafts that are trees, in each span; one as floats at a time
            masks = len(set(config.windows)) + 2 * size
            nbytes += (needs.drafted + needs.max_batch) * needs.kv_tokens * masks
        if needs.device_type != "cpu":
            kept = needs.packed_nbytes + needs.static_nbytes + needs.head_nbytes
            nbytes += 2 * GATHER_NBYTES + FRAGMENTS + (nbytes + kept) // 16
        return nbytes

    def captured(self) -> int:
        """What captured passes keep beside all that: their temporaries, in a pool of their own, the
        parts of their attention, and their logits. 0: none may be captured."""
        return self._captured(self.needs.captured_rows, fewer=False)

    def captured_layers(self) -> int:
        """The same of layers that are captured one by one, where something streams."""
        config, needs = self.config, self.needs
        rows = 0 if needs.int8 else needs.captured_rows_streamed
        if not rows:
            return 0
        # Of a part: queries, keys, values and what is mixed of them, beside what a half makes.
        heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
        token = needs.dtype.itemsize * (6 * config.hidden_size + heads + 2 * config.ffn_size)
        return self._captured(rows, fewer=True) + needs.captured_part * token

    def _captured(self, rows: int, *, fewer: bool) -> int:
        config, needs = self.config, self.needs
        if not rows:
            return 0
        splits = splits_of(needs.kv_tokens, block_of(config.head_dim, needs.dtype))
        parts = rows * splits
        if fewer:
            parts = max(size * fewer_splits(splits, size) for size in range(1, rows + 1))
        part = FLOAT * config.num_heads * (config.head_dim + STATS)
        head = config.vocab_size * (2 * needs.dtype.itemsize + FLOAT)
        return rows * (self._token_temporaries() + head) + parts * part + CAPTURED_FRAGMENTS

    def logits(self) -> int:
        """Of one token a row and of drafts, and what it takes to draw from one."""
        vocab = self.config.vocab_size * FLOAT
        return 2 * (self.needs.max_batch + self.needs.drafted) * vocab + 8 * vocab

    def _token_temporaries(self) -> int:
        """The largest that a token has in a layer at one time."""
        config, size = self.config, self.needs.dtype.itemsize
        hidden, ffn = config.hidden_size, config.widest_ffn
        heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        rounded = 2 * kv if self.needs.int8 else 0
        clamped = config.experts is not None and config.experts.clamp is not None
        gated = (8 if clamped else 3) * ffn
        if config.experts is not None and self.needs.device_type != "cpu":
            # All pairs of tokens and experts at a time, where these are in slots.
            pair = hidden + 3 * config.experts.width
            gated = max(gated, config.experts.per_token * pair)
        plain = size * (4 * hidden + 4 * heads + 6 * kv + rounded + gated)
        return plain + FLOAT * max(4 * hidden, 5 * heads) + self._routed()

    def _routed(self) -> int:
        """What a token has beside that in a mixture: logits and shares of all experts, those of
        the chosen ones and what sorts them. The sum in float32 is where a norm was."""
        experts = self.config.experts
        if experts is None:
            return 0
        all_of_them = self.needs.dtype.itemsize + 2 * FLOAT
        return experts.count * all_of_them + experts.per_token * SORTED

    def _tables(self) -> int:
        """Cosines and sines of a pass."""
        return len(set(self.config.ropes)) * self.needs.kv_tokens * self.config.head_dim * FLOAT

    @property
    def _host_token_nbytes(self) -> int:
        if not self.needs.int8:
            return self._token.nbytes
        return Int8Rows(self.config.num_kv_heads, self.config.head_dim).token_nbytes


def loaded_nbytes(spec: TensorSpec, dtype: torch.dtype | None) -> int:
    """Of a tensor that is loaded, cast to ``dtype``."""
    if dtype is None or not spec.dtype.is_floating_point:
        return spec.nbytes
    return math.prod(spec.shape) * dtype.itemsize
