"""The rows file: normalised rows as Parquet, from the stage `dataset` to the preflight.

The kind of rows fixes the columns, and none is null, so that a row is read as it was written. Row groups are small: a
reader holds one in memory, and a shard of the contamination scan begins at one.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, pairwise, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.artifacts.keys import canonical_json
from smoltulu.schemas.data import DatasetKind

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet

COLUMNS: dict[DatasetKind, tuple[str, ...]] = {
    "sft": ("id", "messages"),
    "preference": ("id", "prompt", "chosen", "rejected"),
    "rlvr": ("id", "prompt", "verifier", "ground_truth"),
}
#: Columns that are lists of messages.
TURNS = ("messages", "prompt", "chosen", "rejected")

#: A row group ends at so many rows, or where their turns have so many characters.
GROUP_ROWS = 2048
GROUP_CHARACTERS = 16 << 20
#: Texts hardly repeat as a whole: a dictionary of them, or their least and greatest, would only cost time.
WRITE_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 3,
    "use_dictionary": False,
    "write_statistics": False,
}


def rows_schema(kind: DatasetKind) -> pa.Schema:
    """Columns of a rows file."""
    import pyarrow as pa

    types = {name: _turns() if name in TURNS else pa.string() for name in COLUMNS[kind]}
    return pa.schema([pa.field(name, kind_of, nullable=False) for name, kind_of in types.items()])


def _message() -> pa.StructType:
    import pyarrow as pa

    return pa.struct([pa.field(name, pa.string(), nullable=False) for name in ("role", "content")])


def _turns() -> pa.ListType:
    import pyarrow as pa

    return pa.list_(pa.field("element", _message(), nullable=False))


class RowsWriter:
    """Writes a rows file, row by row. The same rows give the same bytes."""

    def __init__(self, file: Path, kind: DatasetKind) -> None:
        from pyarrow import parquet

        self._schema = rows_schema(kind)
        self._writer = parquet.ParquetWriter(file, self._schema, **WRITE_OPTIONS)
        self._columns = COLUMNS[kind]
        self._waiting: list[dict[str, Any]] = []
        self._num_characters = 0

    def write(self, row: dict[str, Any]) -> None:
        """Add a row, which has the columns of its kind and no other."""
        assert row.keys() == set(self._columns), row.keys()
        self._waiting.append(row)
        self._num_characters += sum(len(message["content"]) for message in turns_of(row))
        if len(self._waiting) == GROUP_ROWS or self._num_characters >= GROUP_CHARACTERS:
            self._end_group()

    def _end_group(self) -> None:
        import pyarrow as pa

        if self._waiting:
            arrays = [_array([row[name] for row in self._waiting], name in TURNS) for name in self._columns]
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._waiting, self._num_characters = [], 0

    def __enter__(self) -> RowsWriter:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if failed is None:
            self._end_group()
        self._writer.close()


def _array(values: list[Any], is_turns: bool) -> pa.Array:
    """A column of texts, or of lists of messages.

    Made from its buffers: `pyarrow.array` imports pandas, which takes as long as the rows of a small data set.
    """
    import pyarrow as pa

    if is_turns:
        turns = [turn for value in values for turn in value]
        struct = pa.StructArray.from_arrays(
            [_array([turn[name] for turn in turns], is_turns=False) for name in ("role", "content")],
            fields=list(_message()),
        )
        offsets = pa.Array.from_buffers(pa.int32(), len(values) + 1, [None, _offsets(map(len, values))])
        return pa.ListArray.from_arrays(offsets, struct, type=_turns())
    encoded = [value.encode() for value in values]
    buffers = [None, _offsets(map(len, encoded)), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(values), buffers)


def _offsets(lengths: Iterable[int]) -> pa.Buffer:
    import pyarrow as pa

    return pa.py_buffer(array("i", accumulate(lengths, initial=0)))


def open_rows(file: Path) -> parquet.ParquetFile:
    """A rows file, its rows not yet read. ValueError where it cannot be read, or is no rows file."""
    import pyarrow
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a whole Parquet file ({str(error)[:200]}); make the data set again") from error
    if opened.schema_arrow not in map(rows_schema, COLUMNS):
        opened.close()
        raise ValueError(
            f"{file}: no rows file: its columns ({', '.join(opened.schema_arrow.names)}) are not those of sft, "
            "preference or rlvr rows; make a data set of it first"
        )
    return opened


def group_starts(opened: parquet.ParquetFile) -> list[int]:
    """The first row of every row group, and behind them the number of rows."""
    groups = range(opened.metadata.num_row_groups)
    return [0, *accumulate(opened.metadata.row_group(group).num_rows for group in groups)]


def num_rows(file: Path) -> int:
    """Rows of a rows file, from its footer. Raises ValueError as `open_rows`."""
    with open_rows(file) as opened:
        return int(opened.metadata.num_rows)


def stored_rows(file: Path, first: int = 0, count: int | None = None) -> Iterator[dict[str, Any]]:
    """`count` rows from row `first` on, or all that there are. Holds a row group. Raises ValueError as `open_rows`."""
    with open_rows(file) as opened:
        starts = group_starts(opened)
        end = starts[-1] if count is None else min(first + count, starts[-1])
        for group, (start, stop) in enumerate(pairwise(starts)):
            if start < end and first < stop:
                rows = opened.read_row_group(group, use_threads=False)
                yield from rows.slice(max(first - start, 0), min(end, stop) - max(first, start)).to_pylist()


def rows_at(file: Path, numbers: Iterable[int]) -> dict[int, dict[str, Any]]:
    """The rows of these numbers, each row group read once. Raises ValueError as `open_rows`."""
    found = {}
    with open_rows(file) as opened:
        starts, group, rows = group_starts(opened), -1, None
        for number in sorted(set(numbers)):
            if bisect_right(starts, number) - 1 != group:
                group = bisect_right(starts, number) - 1
                rows = opened.read_row_group(group, use_threads=False)
            assert rows is not None
            (found[number],) = rows.slice(number - starts[group], 1).to_pylist()
    return found


def rows_digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """One digest of rows, whatever their order and however their file was written."""
    lines = sorted(hashlib.sha256(canonical_json(dict(row)).encode()).digest() for row in rows)
    return hashlib.sha256(b"".join(lines)).hexdigest()


def same_rows(lines: Path, file: Path) -> bool:
    """Whether a rows file holds the same rows as an older file of JSON lines; False where `lines` is no such file."""
    if lines.suffix != ".jsonl":
        return False
    with lines.open(encoding="utf-8") as before:
        try:
            return all(json.loads(old or "null") == new for old, new in zip_longest(before, stored_rows(file)))
        except ValueError:  # cut off, or other bytes than were written
            return False


def turns_of(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """All messages of a row; a turn's number is its place here."""
    return [message for name in TURNS for message in row.get(name, ())]
