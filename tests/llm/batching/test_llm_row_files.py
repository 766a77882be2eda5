"""Files of rows: every row is in one piece, and is written with what it had."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_streamer.llm.batching.row_files import JsonLines, Parquet, kind_of, writer_of

NAMES = ("prompt", "messages")
ADDED = {"text": str, "tokens": int}
LINE = st.sampled_from([b"", b" \t", b"\r", b'{"prompt": "a"}', b"\xff", b'{"a": "\xe2\x80\xa8"}'])


def results(count: int) -> Iterator[dict[str, Any]]:
    return ({"text": f"{i}!", "tokens": i} for i in range(count))


def write(source: Path, place: Path, count: int) -> None:
    writer_of(kind_of(source)(source, NAMES), place, ADDED)(place, results(count))


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@given(st.lists(LINE), st.booleans(), st.integers(1, 4))
def test_every_line_is_in_one_piece(place: Path, lines: list[bytes], ends: bool, size: int) -> None:
    path = place / "any.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * ends)
    source = JsonLines(path, NAMES)
    pieces = list(source.pieces(size))
    found = [source.read(piece) for piece in pieces]
    asked = [line for line in lines if line.strip()]
    assert [line for piece in found for line in piece] == asked
    assert [len(piece) for piece in found] == [piece["count"] for piece in pieces]
    assert [piece["row"] for piece in pieces] == [*range(1, len(asked) + 1, size)]
    assert len(list(source.rows())) == len(asked)


def test_lines_keep_what_they_had_and_bad_ones_their_text(tmp_path: Path) -> None:
    source, place = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"a": {"b": [1, null]}, "text": "\\u2028"}\n\n[1] \nno "json"\n{"c": "\\ud83d"}'
    )
    write(source, place, 4)
    assert lines_of(place) == [
        {"a": {"b": [1, None]}, "text": "0!", "tokens": 0},
        {"line": "[1]", "text": "1!", "tokens": 1},
        {"line": 'no "json"', "text": "2!", "tokens": 2},
        {"c": "?", "text": "3!", "tokens": 3},
    ]
    with pytest.raises(ValueError, match="shorter"):  # as a row too few would be
        write(source, place, 3)


def test_what_a_file_is_its_name_says(tmp_path: Path) -> None:
    assert kind_of(Path("a.b.ndjson")) is JsonLines and kind_of(Path("a.parquet")) is Parquet
    for name in ("jsonl", "a.JSONL.gz", "a.json", ""):
        with pytest.raises(ValueError, match=r"must end in \.jsonl, \.ndjson, \.parquet"):
            kind_of(tmp_path / name)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Rows in groups of 5, of types that JSON lacks."""
    pa = pytest.importorskip("pyarrow", reason="needs the extra [ray]")
    pq = pytest.importorskip("pyarrow.parquet")
    said = [{"role": "user", "content": "Hi"}]
    columns = {
        "id": pa.array([*range(12)], pa.int16()),
        "prompt": [None if i == 7 else f"{i}\0" for i in range(12)],
        "messages": [said if i == 7 else None for i in range(12)],
        "blob": pa.array([b"\xff"] * 12),
        "text": ["old"] * 12,
    }
    pq.write_table(pa.table(columns), tmp_path / "in.parquet", row_group_size=5)
    return tmp_path / "in.parquet"


@pytest.mark.parametrize("size", [1, 3, 5, 100])
def test_every_row_of_a_table_is_in_one_piece(table: Path, size: int) -> None:
    source = Parquet(table, NAMES)
    pieces = list(source.pieces(size))
    rows = [json.loads(line) for piece in pieces for line in source.read(piece)]
    assert [row["prompt"] for row in rows] == [None if i == 7 else f"{i}\0" for i in range(12)]
    assert [row["messages"] is None for row in rows] == [i != 7 for i in range(12)]
    assert {*rows[0]} == {*NAMES}
    counts = [piece["count"] for piece in pieces]
    assert [piece["row"] for piece in pieces] == [1 + sum(counts[:i]) for i in range(len(counts))]
    assert max(counts) == min(size, 5)


def test_a_table_keeps_its_types_and_becomes_lines(table: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    write(table, table.with_name("out.parquet"), 12)
    before, after = (pq.read_table(table.with_name(f"{name}.parquet")) for name in ("in", "out"))
    assert after.column_names == ["id", "prompt", "messages", "blob", "text", "tokens"]
    kept = ["id", "prompt", "messages", "blob"]
    assert after.select(kept).equals(before.select(kept))
    assert after["text"].to_pylist() == [f"{i}!" for i in range(12)]
    write(table, table.with_name("out.jsonl"), 12)
    rows = lines_of(table.with_name("out.jsonl"))
    assert rows[3] == {"id": 3, "prompt": "3\0", "messages": None, "blob": "b'\\xff'",
                       "text": "3!", "tokens": 3}  # fmt: skip


def test_lines_of_many_shapes_become_a_table(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra [ray]")
    rows = [{"a": None}, *[{"a": [{"b": 1}]}] * 1500, {"c": "2026-01-01T00:00:00"},
            {"a": [{"b": 0.5, "d": "x"}]}, 5, {}]  # fmt: skip
    source, place = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    write(source, place, len(rows))
    found = pq.read_table(place).to_pylist()
    assert [row["text"] for row in found] == [f"{i}!" for i in range(len(rows))]
    assert found[0]["a"] is None and found[1500]["a"] == [{"b": 1.0, "d": None}]
    assert found[1501]["c"] == "2026-01-01T00:00:00" and found[1502]["a"][0]["d"] == "x"
    assert found[1503]["line"] == "5" and found[1504]["line"] is None


@pytest.mark.parametrize(
    "lines",
    ['{"a": 1}\n{"a": "x"}', '{"a": {}}', '{"a": 1e999}\n{"a": "x"}', f'{{"a": {2**70}}}',
     '{"a": "\\ud83d"}'],
)  # fmt: skip
def test_lines_that_fit_no_columns_are_told_before_they_are_answered(
    tmp_path: Path, lines: str
) -> None:
    pytest.importorskip("pyarrow", reason="needs the extra [ray]")
    source, place = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    source.write_text(lines)
    with pytest.raises(ValueError, match="the rows fit no columns of parquet") as caught:
        writer_of(JsonLines(source, NAMES), place, ADDED)
    assert "\n" not in str(caught.value) and not place.exists()


def test_a_table_without_prompts_and_a_file_that_is_none_are_refused(table: Path) -> None:
    with pytest.raises(ValueError, match="has no column q or m, but id, prompt"):
        Parquet(table, ("q", "m"))
    table.write_text("no table")
    with pytest.raises(ValueError, match=r"in\.parquet: cannot be read \("):
        Parquet(table, NAMES)


def test_no_rows_are_a_file_without_rows(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra [ray]")
    source = tmp_path / "in.jsonl"
    source.write_text("\n")
    for name in ("out.jsonl", "out.parquet"):
        write(source, tmp_path / name, 0)
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 0
