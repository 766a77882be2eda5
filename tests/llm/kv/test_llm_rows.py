"""Bookkeeping of a cache's rows: regions, rings, rollback."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer.llm.kv.regions import BLOCK
from layer_streamer.llm.kv.rows import SLACK, Row, Rows, Span, make_spans, ring_size
from layer_streamer.llm.passes.batch import pack


@settings(max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5 * BLOCK)), max_size=40))
def test_rows_never_overlap_and_a_gap_that_is_large_enough_is_taken(steps):
    (span,) = make_spans([None], tokens=8 * BLOCK, max_rows=99)
    rows, held = Rows([span], 99), []
    for add, size in steps:
        if not add and held:
            rows.drop(held.pop(size % len(held)))
            continue
        used = {b for row in held for b in blocks_of(row.starts[span])}
        row, wanted = rows.add(size), -(-size // BLOCK)
        if row is None:
            gaps = (set(range(b, b + wanted)) for b in range(8 - wanted + 1))
            assert not any(not gap & used for gap in gaps)
            continue
        taken = blocks_of(row.starts[span])
        assert len(taken) == wanted and not taken & used and max(taken) < 8
        held.append(row)
    assert list(rows) == held


def blocks_of(region) -> set[int]:
    start, size = region
    assert start % BLOCK == size % BLOCK == 0
    return set(range(start // BLOCK, (start + size) // BLOCK))


def test_layers_of_a_window_share_a_span_that_is_as_large_as_its_rings():
    full, short = make_spans([None, 100, None, 100], tokens=5000, max_rows=2)
    assert (full.window, full.places) == (None, 5120)
    assert (short.window, short.places) == (100, 2 * ring_size(100))
    assert ring_size(100) % BLOCK == 0 and ring_size(100) >= 100 + SLACK
    assert make_spans([100], tokens=256, max_rows=8)[0].places == 256


@given(st.integers(1, 3000), st.integers(0, 3000), st.integers(1, 700))
def test_a_ring_holds_the_last_positions_each_in_one_place(size, first, count):
    span = Span(10, 10_000)
    row = Row(10_000, {span: (BLOCK, size)})
    places = [
        p for start, n in row.places(span, first, first + count) for p in range(start, start + n)
    ]
    kept = range(max(first, first + count - size), first + count)
    assert places == [BLOCK + position % size for position in kept]


def test_a_row_without_window_lies_in_one_piece():
    span = Span(None, 1000)
    row = Row(1000, {span: (256, 512)})
    assert row.places(span, 3, 300) == [(259, 297)]
    assert row.places(span, 4, 4) == []


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
    a, b, c = (Row(100, {span: (0, 256)}, length=n) for n in (7, 0, 3))
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
