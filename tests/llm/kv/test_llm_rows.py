"""Bookkeeping of a cache's rows: blocks, rings, rollback."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer.llm.kv.blocks import BLOCK, free_blocks
from layer_streamer.llm.kv.rows import (
    SLACK,
    BlockTable,
    Row,
    Rows,
    Span,
    make_spans,
    ring_size,
)
from layer_streamer.llm.passes.batch import pack


@settings(max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5 * BLOCK)), max_size=40))
def test_rows_never_overlap_and_any_blocks_that_are_free_are_taken(steps):
    (span,) = make_spans([None], tokens=8 * BLOCK, max_rows=99)
    rows, held = Rows([span], 99), []
    for add, size in steps:
        if not add and held:
            rows.drop(held.pop(size % len(held)))
            continue
        used = {block for row in held for block in row.blocks[span]}
        row, wanted = rows.add(size), -(-size // BLOCK)
        assert (row is None) == (wanted > 8 - len(used))
        if row is not None:
            taken = set(row.blocks[span])
            assert len(taken) == wanted and not taken & used and taken <= set(range(8))
            held.append(row)
    assert list(rows) == held


@given(st.sets(st.integers(0, 11)), st.integers(1, 12))
def test_blocks_that_follow_one_another_are_taken_where_so_many_do(taken, count):
    free = [block for block in range(12) if block not in taken]
    found = free_blocks(taken, 12, count)
    runs = [b for b in range(13 - count) if set(range(b, b + count)) <= set(free)]
    if runs:
        assert found == tuple(range(runs[0], runs[0] + count))
    else:
        assert found == (tuple(free[:count]) if len(free) >= count else None)


def test_layers_of_a_window_share_a_span_that_is_as_large_as_its_rings():
    full, short = make_spans([None, 100, None, 100], tokens=5000, max_rows=2)
    assert (full.window, full.places) == (None, 5120)
    assert (short.window, short.places) == (100, 2 * ring_size(100))
    assert ring_size(100) % BLOCK == 0 and ring_size(100) >= 100 + SLACK
    assert make_spans([100], tokens=256, max_rows=8)[0].places == 256


@st.composite
def scattered(draw, window):
    """A row of up to a dozen blocks, in any order, and its span."""
    blocks = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True))
    span = Span(window, 10_000)
    return span, Row(len(blocks) * BLOCK, {span: tuple(blocks)})


@given(scattered(10), st.integers(0, 3000), st.integers(1, 700))
def test_a_ring_holds_the_last_positions_each_in_one_place(ring, first, count):
    span, row = ring
    places = [
        p for start, n in row.places(span, first, first + count) for p in range(start, start + n)
    ]
    kept = range(max(first, first + count - row.size(span)), first + count)
    assert places == [row.place(span, position) for position in kept]


@given(scattered(None), st.data())
def test_places_that_lie_together_are_one_piece(full, data):
    span, row = full
    first, end = sorted(data.draw(st.tuples(*[st.integers(0, row.size(span))] * 2)))
    pieces = row.places(span, first, end)
    blocks = row.blocks[span]
    each = [blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(first, end)]
    assert [p for start, n in pieces for p in range(start, start + n)] == each
    assert all(n and start + n != after for (start, n), (after, _) in pairwise(pieces))


def test_a_table_of_blocks_has_a_line_for_each_row_and_columns_for_each_span():
    spans = make_spans([None, 20], tokens=4 * BLOCK, max_rows=2)
    rows, table = Rows(spans, 2), BlockTable(spans)
    held = [rows.add(300), rows.add(10)]
    for row, line in zip(held, table.lines(held), strict=True):
        assert len(line) == table.width
        for span in spans:
            size, *blocks = line[table.columns[span] :]
            assert size == row.size(span) and tuple(blocks[: size // BLOCK]) == row.blocks[span]


def make_row(window: int) -> tuple[Rows, Row]:
    rows = Rows(make_spans([None, window], tokens=4096, max_rows=1), 1)
    row = rows.add(4000)
    assert row is not None
    row.length = row.reach = 3000
    return rows, row


def test_a_rollback_within_the_slack_moves_the_length_and_beyond_it_the_row_starts_over():
    rows, row = make_row(20)
    size = ring_size(20)
    assert rows.truncate(row, 3000 - (size - 19)) == 3000 - (size - 19)
    assert row.length == 3000 - (size - 19)
    rows, row = make_row(20)
    assert rows.truncate(row, 3000 - (size - 19) - 1) == 0
    assert (row.length, row.reach) == (0, 0)


def test_a_row_that_fits_its_ring_may_be_cut_back_to_anything():
    rows = Rows(make_spans([600], tokens=1024, max_rows=1), 1)
    row = rows.add(700)
    assert row is not None
    row.length = row.reach = 700
    assert rows.truncate(row, 5) == 5


def test_a_length_that_is_not_there_is_an_error():
    rows, row = make_row(20)
    for length in (-1, 3001):
        with pytest.raises(ValueError, match=f"length={length}: the row holds 3000"):
            rows.truncate(row, length)


def test_rows_come_and_go_and_too_many_wait():
    rows = Rows(make_spans([None, 20], tokens=1024, max_rows=3), 3)
    first, second = rows.add(500), rows.add(500)
    assert first is not None and second is not None
    assert rows.add(1) is None, "there are no places"
    rows.drop(first)
    rows.drop(first)
    small = [rows.add(10), rows.add(10)]
    assert None not in small and rows.add(10) is None, "there are three rows"


def test_a_batch_packs_rows_and_cuts_them_into_chunks():
    span = Span(None, 10_000)
    a, b, c = (Row(100, {span: (0,)}, length=n) for n in (7, 0, 3))
    batch = pack([(a, [1]), (b, [2, 3, 4]), (c, [5, 6])], 4, torch.device("cpu"))
    assert batch.ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.last.tolist() == [0, 3, 5]
    first, second = batch.chunks
    assert (first.first, second.first) == (0, 4)
    assert first.positions.tolist() == [7, 0, 1, 2] and second.positions.tolist() == [3, 4]
    assert first.lengths.tolist() == [8, 3, 3, 3] and second.lengths.tolist() == [5, 5]
    assert [(p.row, p.offset, p.count, p.position) for p in first.pieces] == [
        (a, 0, 1, 7),
        (b, 1, 3, 0),
    ]
    assert [(p.row, p.offset, p.count, p.position) for p in second.pieces] == [(c, 0, 2, 3)]
    halves = pack([(b, list(range(5)))], 3, torch.device("cpu")).chunks
    assert [(p.count, p.position) for chunk in halves for p in chunk.pieces] == [(3, 0), (2, 3)]
