"""Blocks that rows have in common: what is found, what is kept, what goes."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import open_runner, tiny_checkpoint, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer.llm.kv.blocks import BLOCK
from layer_streamer.llm.kv.rows import Row, Rows, make_spans
from layer_streamer.llm.kv.tokens import Part, once
from layer_streamer.llm.passes.chunking import Chunking
from layer_streamer.llm.passes.runner import Runner


def text(*kinds: int, rest: int = 0) -> list[int]:
    """A block for each kind, and the begin of another."""
    return [kind * 1000 + i for kind in kinds for i in range(BLOCK)] + [7] * rest


@dataclass
class Story:
    """Random rows that come and go over few blocks, beside what each place was given."""

    total: int
    seed: int
    rows: Rows = field(init=False)
    texts: dict[Row, list[int]] = field(default_factory=dict)
    salts: dict[Row, bytes] = field(default_factory=dict)
    written: dict[int, tuple[bytes, list[int]]] = field(default_factory=dict)
    """By place: salt and text up to it, when it was written."""

    def __post_init__(self) -> None:
        self.rows = Rows(make_spans([None], self.total * BLOCK, 6), 6)

    def play(self, steps: int) -> tuple[int, int]:
        """Tokens of prompts, and how many of them were there."""
        dice, asked, there = random.Random(self.seed), 0, 0
        for _ in range(steps):
            if self.texts and dice.random() < 0.3:
                self.drop(dice.choice(list(self.texts)))
            prompt = text(*dice.choices((1, 2), k=dice.randrange(4)), rest=dice.randrange(1, 9))
            salt = dice.choice((b"", b"a"))
            row = self.rows.add(len(prompt) + dice.randrange(2 * BLOCK), prompt[:-1], salt)
            if row is not None:
                asked, there = asked + len(prompt), there + row.length
                self.enter(row, prompt, salt)
            for running in list(self.texts):
                self.grow(running, dice)
            self.check()
        return asked, there

    def enter(self, row: Row, prompt: list[int], salt: bytes) -> None:
        assert row.length <= len(prompt) - 1
        self.texts[row], self.salts[row] = prompt[: row.length], salt
        for token in prompt[row.length :]:
            self.write(row, token)

    def grow(self, row: Row, dice: random.Random) -> None:
        for _ in range(min(dice.choice((1, 1, 300)), row.capacity - row.length)):
            self.write(row, dice.choice((7, 1000)))
        if dice.random() < 0.8:
            self.rows.note(row, self.texts[row], self.salts[row])

    def write(self, row: Row, token: int) -> None:
        (span,) = self.rows.spans
        place = row.place(span, row.length)
        for other in self.texts:
            seen = other.length > row.length and other.place(span, row.length) == place
            assert not seen, "a row writes to what another one has"
        self.texts[row].append(token)
        self.written[place] = self.salts[row], list(self.texts[row])
        row.length += 1

    def drop(self, row: Row) -> None:
        self.rows.drop(row)
        del self.texts[row], self.salts[row]

    def check(self) -> None:
        """Every place of every row holds what was computed behind the row's own tokens."""
        (span,) = self.rows.spans
        for row, known in self.texts.items():
            assert row.length == len(known)
            for end in {*range(BLOCK, len(known) + 1, BLOCK), len(known)} - {0}:
                place = row.place(span, end - 1)
                assert self.written[place] == (self.salts[row], known[:end])


@settings(max_examples=40)
@given(st.integers(2, 14), st.integers(0, 10**6))
def test_a_row_has_what_its_own_text_gives_whatever_others_have_done(total: int, seed: int) -> None:
    Story(total, seed).play(25)


def test_most_of_what_was_there_is_found() -> None:
    asked, there = Story(14, 3).play(200)
    assert there > asked / 4


def ended(rows: Rows, *prompts: Sequence[int]) -> None:
    """Rows that have had these texts, one after the other."""
    for prompt in prompts:
        row = rows.add(len(prompt))
        assert row is not None
        row.length = len(prompt)
        rows.note(row, list(prompt))
        rows.drop(row)


def of(total: int) -> Rows:
    return Rows(make_spans([None], total * BLOCK, 9), 9)


def length(rows: Rows, prompt: list[int], salt: bytes = b"") -> int:
    """How many of its tokens a row gets, which is dropped again."""
    row = rows.add(len(prompt), prompt, salt)
    assert row is not None
    rows.drop(row)
    return row.length


def test_whole_blocks_of_the_same_beginning_are_found_and_no_others() -> None:
    rows = of(9)
    ended(rows, text(1, 2, 3, rest=5))
    assert length(rows, text(1, 2, 3)) == 3 * BLOCK
    assert length(rows, text(1, 2, rest=100)) == 2 * BLOCK
    assert length(rows, text(1, 3)) == BLOCK
    assert length(rows, text(2, 3)) == 0, "the same tokens behind others are other keys"
    assert length(rows, text(1, 2)[1:]) == 0
    assert length(rows, text(1, 2), b"someone else") == 0


def test_what_was_unused_longest_goes_first_and_ends_before_beginnings() -> None:
    rows = of(4)
    ended(rows, text(1, 2), text(3, 4))
    assert length(rows, text(1)) == BLOCK  # 1 was of use lately
    assert length(rows, text(5)) == 0  # in the place of 2
    assert length(rows, text(1, 2, rest=1)) == BLOCK  # which takes that of 4, too
    assert length(rows, text(3, 4)) == BLOCK


def test_blocks_of_rows_that_run_are_not_given_to_others() -> None:
    rows = of(3)
    first = rows.add(2 * BLOCK, text(1, 2))
    assert first is not None
    first.length = 2 * BLOCK
    rows.note(first, text(1, 2))
    assert rows.add(2 * BLOCK) is None
    second = rows.add(3 * BLOCK, text(1, 2, 3)[:-1])
    assert second is not None and second.length == 2 * BLOCK
    rows.drop(first)
    assert rows.add(BLOCK) is None, "the other row has them still"


def test_a_row_that_finds_no_room_has_cost_nobody_a_block() -> None:
    rows = of(4)
    ended(rows, text(1, 2))
    running = rows.add(BLOCK)
    assert running is not None and rows.add(4 * BLOCK) is None
    assert length(rows, text(1, 2)) == 2 * BLOCK


def test_a_row_that_is_cut_back_gives_its_blocks_up_unless_others_have_them() -> None:
    rows = of(6)
    first = rows.add(2 * BLOCK + 9)
    assert first is not None
    first.length = 2 * BLOCK
    rows.note(first, text(1, 2))
    assert rows.truncate(first, BLOCK + 1) == BLOCK + 1
    assert length(rows, text(1, 2)) == BLOCK, "it is going to write to the second"
    second = rows.add(2 * BLOCK, text(1, rest=9))
    assert second is not None and second.length == BLOCK
    with pytest.raises(ValueError, match="rows have blocks in common from token 0 on"):
        rows.truncate(first, 7)
    rows.drop(second)
    assert rows.truncate(first, 7) == 7 and length(rows, text(1)) == 0


def test_nothing_is_in_common_where_a_layer_has_a_window() -> None:
    rows = Rows(make_spans([None, 20], 9 * BLOCK, 9), 9)
    assert not rows.shares
    ended(rows, text(1, 2))
    assert length(rows, text(1, 2)) == 0


def test_what_rows_have_in_common_is_copied_once() -> None:
    rows = of(9)
    first = rows.add(3 * BLOCK)
    assert first is not None
    first.length = 3 * BLOCK
    rows.note(first, text(1, 2, 3))
    second, third = rows.add(4 * BLOCK, text(1, 2, 4)), rows.add(BLOCK)
    assert second is not None and third is not None
    assert once([(first, 0, 700), (second, 0, 600), (third, 0, 9)]) == [
        (first, 0, 700), (second, 512, 600), (third, 0, 9),
    ]  # fmt: skip
    assert once([(first, 0, 300), (second, 0, 600)]) == [(first, 0, 300), (second, 300, 600)]
    assert once([(first, 100, 600), (second, 0, 600)])[1] == (second, 0, 600)
    apart = [(first, 500, 600), (second, 0, 300), (first, 0, 600)]
    assert once(apart)[2] == (first, 300, 600), "what lies between was not brought"


@given(st.data())
def test_of_parts_every_place_travels_and_none_twice_where_all_begin_at_the_begin(data) -> None:
    rows = of(12)
    parts = []
    for _ in range(data.draw(st.integers(1, 4))):
        prompt = text(*data.draw(st.sampled_from([(1, 2), (1, 2, 3), (1, 3), ()])), rest=9)
        row = rows.add(len(prompt), prompt)
        assert row is not None
        row.length = len(prompt)
        rows.note(row, prompt)
        begin = data.draw(st.sampled_from([0, 0, 100, 300, 500]))
        parts.append((row, begin, max(begin, data.draw(st.integers(0, len(prompt))))))
    (span,) = rows.spans

    def places(parts: Iterable[Part]) -> list[int]:
        runs = [run for row, first, end in parts for run in row.places(span, first, end)]
        return [place for first, count in runs for place in range(first, first + count)]

    found = places(once(parts))
    assert set(found) == set(places(parts))
    if not any(begin for _, begin, _ in parts):
        assert len(found) == len(set(found))
    assert places(once(parts[:1])) == places(parts[:1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    model = tiny_model("qwen2", max_position_embeddings=2048)
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), model), model


LAST = 6
TIERS: dict[str, dict[str, Any]] = {
    "device": {},
    "host": {"host_layers": (0, 1, 2)},
    "some on the host": {"host_layers": (1,)},
    "eight bits": {"host_layers": (0, 1, 2), "int8": True},
}


@pytest.mark.parametrize(
    "tier",
    [pytest.param(t, marks=pytest.mark.slow if t == "some on the host" else []) for t in TIERS],
)
def test_logits_are_those_of_texts_that_are_computed_anew(
    model: tuple[Path, Any], tier: str
) -> None:
    path, network = model
    options = {"tokens": 8 * BLOCK, "max_rows": 4} | TIERS[tier]
    options["chunking"] = Chunking(tokens=64, reproducible=True)
    dice = random.Random(4)
    with open_runner(path, network.config, **options) as runner:
        texts = [random_text(dice, shared) for shared in (0, 2, 2, 1, 2)]
        anew = [passes(runner, [ids], keep=False) for ids in texts]
        first = passes(runner, texts[:1], keep=True)
        together = passes(runner, texts[1:4], keep=True)  # of a row that has ended
        last = passes(runner, texts[4:], keep=True)
    assert torch.equal(first, anew[0]) and torch.equal(last, anew[4])
    assert torch.equal(together, torch.cat(anew[1:4], 1))


def random_text(dice: random.Random, shared: int) -> list[int]:
    """So many whole blocks that are alike in all texts, and others."""
    common = [random.Random(1).randrange(500) for _ in range(BLOCK)] * 2
    return common[: shared * BLOCK] + [dice.randrange(500) for _ in range(40 + 30 * shared)]


def passes(runner: Runner, texts: list[list[int]], *, keep: bool) -> torch.Tensor:
    """Logits of the LAST tokens of each text, (LAST, R, V): one by one behind a first pass."""
    rows = [runner.kv.rows.add(len(ids), ids[:-LAST] if keep else ()) for ids in texts]
    pairs = [(row, ids) for row, ids in zip(rows, texts, strict=True) if row is not None]
    assert len(pairs) == len(texts)
    runner.forward([(row, ids[row.length : len(ids) - LAST]) for row, ids in pairs])
    found = []
    for at in range(LAST, 0, -1):
        found.append(runner.forward([(row, [ids[-at]]) for row, ids in pairs]).clone())
        for row, ids in pairs:
            if keep:
                runner.kv.rows.note(row, ids)
    for row in rows:
        if row is not None:
            runner.kv.rows.drop(row)
    return torch.stack(found)


def test_a_shared_beginning_travels_once(model: tuple[Path, Any]) -> None:
    path, network = model
    options = {"tokens": 8 * BLOCK, "max_rows": 3, "host_layers": (0, 1, 2)}
    ids = random_text(random.Random(3), 2)
    sent = []
    with open_runner(path, network.config, **options) as runner:
        passes(runner, [ids], keep=True)
        host = runner.kv.host
        assert host is not None
        copy = host._transfers.copy_pieces

        def count(to: Any, source: Any, pieces: Any, stream: Any) -> None:
            sent.append(int(pieces[:, 1].sum()))
            copy(to, source, pieces, stream)

        host._transfers.copy_pieces = count  # type: ignore[method-assign]
        for copies in (1, 3):
            sent.clear()
            passes(runner, [ids] * copies, keep=True)
            sent.append(sum(sent))
            if copies == 1:
                alone = sent[-1]
    # How far prefetch had come as a pass began and ended differs: half of what is sent, at most.
    assert sent[-1] < 2 * alone, "three rows send little more than one"
