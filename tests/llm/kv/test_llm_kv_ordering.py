"""The order of the key-value cache's transfers, over a streamer on a device that works late."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_safetensors
from fake_device import FakeDevice
from late_transfers import Interrupted, LateTransfers
from ordering import HANG_SECONDS, NUM_LAYERS, TENSORS, open_on

from layer_streamer.llm.kv.host import HostTier, Slot, TokenShape
from layer_streamer.llm.kv.moves import Move
from layer_streamer.llm.kv.rows import Row, Rows, make_spans

TOKENS = 1024
WAITS = [
    ("copier", "barrier"),
    ("copier", "drained"),
    ("back", "used"),
    ("host", ""),
]
"""Who waits for what: taking out any of them must be seen."""


class LateEngine:
    """Passes whose work, when it runs, checks the tokens of each row and appends new ones."""

    def __init__(
        self, seed: int, missing: tuple[str, str] | None, *, there: bool = False, moves: bool = True
    ) -> None:
        """``there``: the host computes some of the layers, in some passes. ``moves``: tokens do."""
        self._random, self._moves = random.Random(seed), moves
        self.device = FakeDevice(seed)
        self.transfers = LateTransfers(self.device, seed, missing)
        spans = make_spans([None], TOKENS, 4)
        self.rows = Rows(spans, 4)
        self.texts: dict[Row, list[int]] = {}
        layers = self._random.choice([range(NUM_LAYERS), [1], [0, 2, 3]])
        self.host = HostTier(
            {i: spans[0] for i in layers}, TokenShape(1, 8, torch.float32),
            self.device.torch_device, self.transfers,
        )  # fmt: skip
        self._layers, self._span = list(layers), spans[0]
        self.there = self._layers[:: self._random.choice([1, 2])] if there else []
        self._on_host = False
        self._fails_at: int | None = None
        self._fails_inside = False
        """With the layer's slot in use."""

    def allocate(self, num_slots: int) -> None:
        self.host.allocate(num_slots)
        for slot in self.host._slots:
            assert isinstance(slot, Slot)
            for name in ("used", "drained"):
                self.transfers.names[id(getattr(slot, name))] = name
        self.transfers.names[id(self.host._barrier)] = "barrier"

    def run(self, streamer: Any, passes: int) -> None:
        for _ in range(passes):
            self._change_rows()
            rows = [row for row in self.texts if self._random.random() < 0.7]
            batch = [(row, self._random.choice([1, 1, 5])) for row in rows or self.texts]
            new = {row: [self._random.randrange(1 << 20) for _ in range(n)] for row, n in batch}
            self.host.begin([row for row, _ in batch])
            self.transfers.interrupts = self._random.choice([0.0, 0.0, 0.02])
            self._fails_at = self._random.choice([None, None, 0, 1, 3])
            self._fails_inside = self._random.random() < 0.5
            self._on_host = bool(self.there) and self._random.random() < 0.5

            def layer_fn(x: Any, w: Any, i: int, b: Any = batch, n: Any = new) -> int:
                return self._layer(i, b, n)

            try:
                streamer.run_pass(0, layer_fn, on_host=self._on_host)
            except Interrupted:
                continue
            finally:
                self.transfers.interrupts = 0.0
            for row, count in batch:
                row.length += count
                row.moved_from = None
                self.texts[row] += new[row]
                if self._moves and count > 1 and self._random.random() < 0.5:
                    self._keep_some(row, count)

    def _change_rows(self) -> None:
        dice = self._random
        if self.texts and dice.random() < 0.3:
            gone = dice.choice(list(self.texts))
            self.rows.drop(gone)
            del self.texts[gone]
        if self.texts and dice.random() < 0.3:
            row = dice.choice(list(self.texts))
            del self.texts[row][self.rows.truncate(row, dice.randint(0, row.length)) :]
        while not self.texts or (len(self.texts) < 3 and dice.random() < 0.4):
            row = self.rows.add(256)
            assert row is not None
            self.texts[row] = []

    def _keep_some(self, row: Row, count: int) -> None:
        """The last tokens were a tree, and some of them follow, perhaps none that is in place."""
        first = row.length - count
        kept = sorted(self._random.sample(range(first, row.length), self._random.randint(1, 3)))
        self.host.move([Move(row, first, tuple(kept))])
        row.moved_from = first
        text = self.texts[row]
        text[first:] = [text[place] for place in kept]
        self.rows.truncate(row, len(text))

    def _layer(self, layer_idx: int, batch: Any, new: dict[Row, list[int]]) -> int:
        fails = layer_idx == self._fails_at
        if fails and not (self._fails_inside and layer_idx in self._layers):
            raise Interrupted
        if layer_idx not in self._layers:
            return 0
        there = self._on_host and layer_idx in self.there
        if there:
            self.device.current_stream().synchronize()  # which residuals have to come from
            memory = self.host.open_home(layer_idx, batch)
        else:
            memory = self.host.open(layer_idx, [row for row, _ in batch])
        for row, _ in batch:
            start = row.place(self._span, 0)  # these rows' blocks follow one another
            work = self._work(memory[start:], layer_idx, list(self.texts[row]), new[row])
            for one in work:  # the host does not work late
                one() if there else self.device.launch(one)
        if fails:
            raise Interrupted
        (self.host.close_home if there else self.host.close_layer)(layer_idx, batch)
        return 0

    def _work(self, memory: Any, layer_idx: int, known: list[int], added: list[int]) -> Any:
        def expected(tokens: list[int]) -> torch.Tensor:
            return (torch.tensor(tokens) * 8.0 + layer_idx)[:, None, None, None].expand(-1, 2, 1, 8)

        def look() -> None:
            if known and not torch.equal(memory[: len(known)], expected(known)):
                self.device.errors.append(f"layer {layer_idx}: not the row's tokens")

        def append() -> None:
            memory[len(known) : len(known) + len(added)] = expected(added)

        return look, append, look


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ordering") / "model.safetensors"
    return write_safetensors(path, TENSORS).parent


def find_errors(
    checkpoint: Path, seed: int, missing: tuple[str, str] | None = None, **kind: bool
) -> list[str]:
    engine = LateEngine(seed, missing, **kind)
    options = {"n_gpu": seed % 4, "n_cpu_pinned": 2, "on_copy": engine.host.prefetch}
    options |= {"host_layers": engine.there}
    streamer = open_on(engine.device, checkpoint, options)
    guard = threading.Timer(HANG_SECONDS, streamer.close)
    guard.start()
    try:
        with streamer:
            engine.allocate(streamer.plan.placement.device_slots[0].count)
            engine.run(streamer, passes=10)
    finally:
        guard.cancel()
    engine.device.drain()
    return engine.device.errors


@pytest.mark.parametrize("seed", range(30))
def test_a_row_only_ever_sees_its_own_tokens(checkpoint: Path, seed: int) -> None:
    assert find_errors(checkpoint, seed) == []


@pytest.mark.parametrize("missing", WAITS, ids=" ".join)
def test_without_any_one_wait_a_row_sees_something_else(
    checkpoint: Path, missing: tuple[str, str]
) -> None:
    # Of some waits one schedule in twenty tells, and which one is not always the same.
    assert any(find_errors(checkpoint, seed, missing) for seed in range(4000))


@pytest.mark.parametrize(
    "seeds", [range(15), pytest.param(range(15, 400), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_rows_see_their_own_tokens_whoever_computes_a_layer(checkpoint: Path, seeds: range) -> None:
    for seed in seeds:
        assert find_errors(checkpoint, seed, there=True) == [], seed


def test_a_host_that_does_not_wait_for_what_is_sent_home_sees_something_else(
    checkpoint: Path,
) -> None:
    missing = ("host", "")
    assert any(
        find_errors(checkpoint, seed, missing, there=True, moves=False) for seed in range(1000)
    )
