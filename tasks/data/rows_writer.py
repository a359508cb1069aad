"""Writes rows files: rows as they come become row groups of `tasks/data/rows.py`."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.data import DatasetKind
from smoltulu.tasks.data.rows import (
    COLUMNS,
    GROUP_CHARACTERS,
    GROUP_ROWS,
    MORE_TEXTS,
    TOOLS,
    TURNS,
    WRITE_OPTIONS,
    Message,
    call_type,
    compact_json,
    is_rich,
    message_type,
    num_characters,
    open_rows,
    rows_schema,
    turns_type,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet


class RowsWriter:
    """Writes a rows file, row by row. The same rows give the same bytes."""

    def __init__(self, file: Path, kind: DatasetKind) -> None:
        self._file, self._kind, self._is_rich = file, kind, False
        self._writer = self._open()
        self._columns = set(COLUMNS[kind])
        self._turns = [name for name in COLUMNS[kind] if name in TURNS]
        self._waiting: list[dict[str, Any]] = []
        self._plain: list[pa.Table] = []  # before those that wait as rows
        #: Whether a row that waits, or that was written, is rich.
        self._needs_rich = False
        self._num_waiting = self._num_characters = 0

    def _open(self) -> parquet.ParquetWriter:
        from pyarrow import parquet

        return parquet.ParquetWriter(self._file, rows_schema(self._kind, self._is_rich), **WRITE_OPTIONS)

    def write(self, row: dict[str, Any]) -> None:
        """Add a row, which has the columns of its kind, maybe tools, and no other."""
        assert row.keys() == self._columns or row.keys() - {TOOLS} == self._columns, row.keys()
        self._waiting.append(row)
        self._num_waiting += 1
        if self._needs_rich or is_rich(row):
            self._needs_rich = True
            self._num_characters += num_characters(row)
        else:
            self._num_characters += sum(len(turn["content"]) for name in self._turns for turn in row[name])
        self._end_full_group()

    def write_plain(self, prefix: str, first: int, turns: pa.ListArray) -> None:
        """Add conversations of role and content alone; their ids are `prefix` and a number, from `first` on.

        The file is the one that `write` makes of the same rows, one by one.
        """
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        offsets = turns.offsets.to_numpy().astype(np.int64)
        mine = turns.values.field("content").slice(offsets[0], offsets[-1] - offsets[0])
        lengths = pc.utf8_length(mine).to_numpy(zero_copy_only=False)
        total = np.concatenate(([0], np.cumsum(lengths)))[offsets - offsets[0]]  # characters before each row
        at = 0
        while at < len(turns):
            left = min(len(turns), at + GROUP_ROWS - self._num_waiting)
            # A group ends with the row that fills it.
            full = int(np.searchsorted(total[at + 1 : left + 1], total[at] + GROUP_CHARACTERS - self._num_characters))
            end = min(left, at + full + 1)
            ids = _texts([f"{prefix}{number}" for number in range(first + at, first + end)])
            self._wait(pa.Table.from_arrays([ids, _as_turns(turns.slice(at, end - at))], schema=rows_schema("sft")))
            self._num_characters += int(total[end] - total[at])
            at = end
            self._end_full_group()

    def _wait(self, table: pa.Table) -> None:
        if self._needs_rich and not self._is_rich:
            self._become_rich()
        if self._waiting:
            self._plain.append(rows_table(self._waiting, self._kind, self._is_rich))
            self._waiting = []
        self._plain.append(table)
        self._num_waiting += table.num_rows

    def _end_full_group(self) -> None:
        if self._num_waiting == GROUP_ROWS or self._num_characters >= GROUP_CHARACTERS:
            self._end_group()

    def _end_group(self) -> None:
        import pyarrow as pa

        if self._needs_rich and not self._is_rich:
            self._become_rich()
        parts = self._plain
        if self._is_rich:
            parts = [self._as_rich(table) for table in parts]
        if self._waiting:
            parts = [*parts, rows_table(self._waiting, self._kind, self._is_rich)]
        if parts:
            table = parts[0] if len(parts) == 1 else pa.concat_tables(parts).combine_chunks()
            self._writer.write_table(table)
        self._waiting, self._plain, self._num_waiting, self._num_characters = [], [], 0, 0

    def _as_rich(self, table: pa.Table) -> pa.Table:
        return table if TOOLS in table.column_names else rows_table(table.to_pylist(), self._kind, is_rich=True)

    def _become_rich(self) -> None:
        """Write the groups so far once more, with the columns of a rich file."""
        self._writer.close()
        before = self._file.with_name(self._file.name + ".plain")
        self._file.rename(before)
        self._is_rich = True
        self._writer = self._open()
        with open_rows(before) as opened:
            for group in range(opened.metadata.num_row_groups):
                rows = opened.read_row_group(group, use_threads=False).to_pylist()
                self._writer.write_table(rows_table(rows, self._kind, is_rich=True))
        before.unlink()

    def __enter__(self) -> RowsWriter:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if failed is None:
            self._end_group()
        self._writer.close()


def _as_turns(turns: pa.ListArray) -> pa.ListArray:
    """Turns of another reader, as a column of a rows file."""
    import pyarrow as pa

    offsets = turns.offsets
    first, last = offsets[0].as_py(), offsets[-1].as_py()
    values = turns.values.slice(first, last - first)
    # Without what is outside of the slice; `flatten` and `field` would differ where a turn is null, and none is.
    texts = [pa.concat_arrays([values.field(name)]) for name in ("role", "content")]
    struct = pa.StructArray.from_arrays(texts, fields=list(message_type(is_rich=False)))
    begins = pa.Array.from_buffers(pa.int32(), len(turns) + 1, [None, _offsets(turns.value_lengths().to_pylist())])
    return pa.ListArray.from_arrays(begins, struct, type=turns_type(is_rich=False))


def rows_table(rows: Sequence[Mapping[str, Any]], kind: DatasetKind, is_rich: bool) -> pa.Table:
    """Rows as a table of `rows_schema`.

    Made from its buffers: `pyarrow.array` imports pandas, which takes as long as the rows of a small data set.
    """
    import pyarrow as pa

    arrays = [
        _turns_array([row[name] for row in rows], is_rich) if name in TURNS else _texts([row[name] for row in rows])
        for name in COLUMNS[kind]
    ]
    if is_rich:
        arrays.append(_texts([compact_json(row[TOOLS]) if TOOLS in row else "" for row in rows]))
    return pa.Table.from_arrays(arrays, schema=rows_schema(kind, is_rich))


def _turns_array(values: Sequence[Sequence[Message]], is_rich: bool) -> pa.Array:
    """A column of lists of messages."""
    import pyarrow as pa

    turns = [turn for value in values for turn in value]
    fields = [_texts([turn["role"] for turn in turns]), _texts([turn["content"] for turn in turns])]
    if is_rich:
        for turn in turns:
            assert turn.keys() <= {"role", "content", "tool_calls", "train", *MORE_TEXTS}, turn.keys()
            # What is empty is read as absent.
            assert all(turn.get(name, "x") for name in ("tool_calls", *MORE_TEXTS)) and not turn.get("train"), turn
        fields += [_texts([turn.get(name, "") for turn in turns]) for name in MORE_TEXTS]
        fields += [_calls([turn.get("tool_calls", ()) for turn in turns]), _flags(["train" not in it for it in turns])]
    struct = pa.StructArray.from_arrays(fields, fields=list(message_type(is_rich)))
    return pa.ListArray.from_arrays(_starts(values), struct, type=turns_type(is_rich))


def _calls(values: Sequence[Sequence[Mapping[str, Any]]]) -> pa.Array:
    """The calls of each turn."""
    import pyarrow as pa

    calls = [call for value in values for call in value]
    for call in calls:
        assert call.keys() <= {"id", "type", "function"} and call.get("type") == "function", call
        assert call.get("id", "x") and call["function"].keys() == {"name", "arguments"}, call
    texts = (
        [call.get("id", "") for call in calls],
        [call["function"]["name"] for call in calls],
        [compact_json(call["function"]["arguments"]) for call in calls],
    )
    struct = pa.StructArray.from_arrays(list(map(_texts, texts)), fields=list(call_type()))
    kind = pa.list_(pa.field("element", call_type(), nullable=False))
    return pa.ListArray.from_arrays(_starts(values), struct, type=kind)


def _starts(values: Sequence[Sequence[Any]]) -> pa.Array:
    """Where each of several lists begins in all of them, and where the last ends."""
    import pyarrow as pa

    return pa.Array.from_buffers(pa.int32(), len(values) + 1, [None, _offsets(map(len, values))])


def _texts(values: Sequence[str]) -> pa.Array:
    import pyarrow as pa

    encoded = [value.encode() for value in values]
    buffers = [None, _offsets(map(len, encoded)), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(values), buffers)


def _flags(values: Sequence[bool]) -> pa.Array:
    import numpy as np
    import pyarrow as pa

    bits = np.packbits(np.array(values, dtype=bool), bitorder="little")
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(bits)])


def _offsets(lengths: Iterable[int]) -> pa.Buffer:
    import pyarrow as pa

    return pa.py_buffer(array("i", accumulate(lengths, initial=0)))
