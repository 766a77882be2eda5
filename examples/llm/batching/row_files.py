"""Files of rows, as JSON lines or parquet: read in pieces, each by whatever process, and written
anew with what was made of each row. Parquet takes pyarrow (extra ``ray``)."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from ..text.prompt_file import read_line

HELD = 1024
"""Rows that are held at a time when a file is written."""
Piece: TypeAlias = dict[str, int]
"""Where some rows are: ``row``, the number of the first (from 1), ``count``, and what its kind of
file needs to find them."""
Row: TypeAlias = dict[str, Any]


class JsonLines:
    """Rows that are lines of JSON, without those that are blank."""

    def __init__(self, path: Path, names: tuple[str, str]) -> None:
        self._path = path.absolute()

    def pieces(self, size: int) -> Iterator[Piece]:
        """All rows, up to ``size`` of them at a time."""
        row, count, begin, end = 1, 0, 0, 0
        with open(self._path, "rb") as file:
            for line in file:
                end, count = end + len(line), count + bool(line.strip())
                if count == size:
                    yield {"row": row, "count": count, "begin": begin, "end": end}
                    row, count, begin = row + count, 0, end
        if count:
            yield {"row": row, "count": count, "begin": begin, "end": end}

    def read(self, piece: Piece) -> list[bytes]:
        """Its rows, as JSON."""
        with open(self._path, "rb") as file:
            file.seek(piece["begin"])
            lines = file.read(piece["end"] - piece["begin"]).split(b"\n")
        return [line for line in lines if line.strip()]

    def schema(self) -> Any:
        """Arrow's, of columns that have room for all rows."""
        import pyarrow as pa

        schema = pa.schema([])
        for rows in _several(self.rows()):
            names = dict.fromkeys(name for row in rows for name in row)
            columns = {name: pa.array([row.get(name) for row in rows]) for name in names}
            found = pa.schema([(name, column.type) for name, column in columns.items()])
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
        return schema

    def rows(self) -> Iterator[Row]:
        """All of them; one that is no object has its text as ``line``."""
        with open(self._path, "rb") as file:
            for line in file:
                if line.strip():
                    yield _object(line)

    def tables(self, results: Iterator[Row], schema: Any) -> Iterator[Any]:
        """Arrow tables of this schema, of all rows with their results."""
        import pyarrow as pa

        for rows in _several(self.rows()):
            yield pa.Table.from_pylist([{**row, **next(results)} for row in rows], schema)


class Parquet:
    """Rows of a parquet file."""

    def __init__(self, path: Path, names: tuple[str, str]) -> None:
        """``names``: of columns that are read, as far as there are any; ValueError for none."""
        with _told(path, "cannot be read"), self._opened(path.absolute()) as file:
            found = file.schema_arrow.names
        self._path, self._names = path.absolute(), [name for name in names if name in found]
        if not self._names:
            raise ValueError(f"{path}: has no column {' or '.join(names)}, but {', '.join(found)}")

    def pieces(self, size: int) -> Iterator[Piece]:
        """All rows, up to ``size`` of them at a time, each piece of one row group."""
        row = 1
        with self._opened(self._path) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                for index, begin in enumerate(range(0, rows, size)):
                    count = min(size, rows - begin)
                    yield {"row": row, "count": count, "group": group, "index": index, "size": size}
                    row += count

    def read(self, piece: Piece) -> list[bytes]:
        """Its rows, as JSON."""
        with self._opened(self._path) as file:
            batches = file.iter_batches(piece["size"], [piece["group"]], self._names)
            rows = next(islice(batches, piece["index"], None)).to_pylist()
        return [_json(row) for row in rows]

    def schema(self) -> Any:
        """Arrow's."""
        with self._opened(self._path) as file:
            return file.schema_arrow.remove_metadata()

    def rows(self) -> Iterator[Row]:
        """All of them."""
        with self._opened(self._path) as file:
            for batch in file.iter_batches(HELD):
                yield from batch.to_pylist()

    def tables(self, results: Iterator[Row], schema: Any) -> Iterator[Any]:
        """As of JsonLines."""
        import pyarrow as pa

        with self._opened(self._path) as file:
            for batch in file.iter_batches(HELD):
                found = list(islice(results, len(batch)))
                made = {name: [row[name] for row in found] for name in (found or [{}])[0]}
                yield pa.Table.from_arrays(
                    [
                        pa.array(made[field.name], field.type)
                        if field.name in made
                        else batch.column(field.name)
                        for field in schema
                    ],
                    schema=schema,
                )

    @staticmethod
    def _opened(path: Path) -> Any:
        import pyarrow.parquet as pq

        return pq.ParquetFile(path)


RowFile: TypeAlias = JsonLines | Parquet
KINDS: dict[str, type[RowFile]] = {
    ".jsonl": JsonLines, ".ndjson": JsonLines, ".parquet": Parquet,
}  # fmt: skip


def kind_of(path: Path) -> type[RowFile]:
    """ValueError for a name that does not say what it is."""
    if path.suffix not in KINDS:
        raise ValueError(f"{path}: must end in {', '.join(KINDS)}")
    return KINDS[path.suffix]


def writer_of(
    source: RowFile, place: Path, added: Mapping[str, type]
) -> Callable[[Path, Iterable[Row]], None]:
    """What writes each row with its result, in the form that the name of ``place`` asks for.

    ``added``: names of what results have, str or int; they replace those of rows. ValueError, now,
    for rows that fit no columns.
    """
    if kind_of(place) is JsonLines:
        return lambda path, results: _write_lines(source, path, results)
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _told(place, "the rows fit no columns of parquet"):
        kept = [field for field in source.schema() if field.name not in added]
        types = {str: pa.string(), int: pa.int64()}
        schema = pa.schema([*kept, *((name, types[kind]) for name, kind in added.items())])
        pq.ParquetWriter(io.BytesIO(), schema).close()

    def write(path: Path, results: Iterable[Row]) -> None:
        with pq.ParquetWriter(path, schema) as file:
            for table in source.tables(iter(results), schema):
                file.write_table(table)

    return write


def _write_lines(source: RowFile, path: Path, results: Iterable[Row]) -> None:
    with open(path, "wb") as file:
        for row, result in zip(source.rows(), results, strict=True):
            file.write(_json({**row, **result}) + b"\n")


def _json(row: Row) -> bytes:
    """What JSON has no form for becomes a text."""
    return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "replace")


def _object(line: bytes) -> Row:
    try:
        found = read_line(line)
    except ValueError:
        found = None
    if isinstance(found, Mapping):
        return dict(found)
    return {"line": line.strip().decode("utf-8", "replace")}


def _several(rows: Iterable[Row]) -> Iterator[list[Row]]:
    left = iter(rows)
    yield from iter(lambda: list(islice(left, HELD)), [])


@contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    """Context in which Arrow's errors are those of a file, in one line."""
    import pyarrow as pa

    try:
        yield
    except (pa.lib.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise ValueError(f"{path}: {what} ({' '.join(str(error).split())})") from error
