"""The rows file: normalised rows as Parquet, from the stage `dataset` to the preflight.

The kind of rows fixes the columns, and none is null, so that a row is read as it was written. Row groups are small: a
reader holds one in memory, and a shard of the contamination scan begins at one.

A turn is {"role", "content"} and, where it has them, "reasoning_content", "tool_calls", "name", "tool_call_id" and
"train": False; a row may have "tools". A file with such a row is rich: it has columns for these, empty in other rows.
A file without one has the same columns as before there were any, so older files are read as they are.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    "texts": ("id", "messages", "origins"),
}
#: Columns that are lists of messages.
TURNS = ("messages", "prompt", "chosen", "rejected")
#: What a turn may have beside role and content, as text; "" where it has none.
_MORE_TEXTS = ("reasoning_content", "name", "tool_call_id")
#: Column of a rich file with the functions that a row offers, as JSON; "" where it offers none.
TOOLS = "tools"

Message = dict[str, Any]

#: A row group ends at so many rows, or where their turns have so many characters.
GROUP_ROWS = 2048
GROUP_CHARACTERS = 16 << 20
#: Texts hardly repeat as a whole: a dictionary of them, or their least and greatest, would only cost time.
WRITE_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": False,
    "write_statistics": False,
}


def rows_schema(kind: DatasetKind, is_rich: bool = False) -> pa.Schema:
    """Columns of a rows file."""
    import pyarrow as pa

    types = {name: _turns(is_rich) if name in TURNS else pa.string() for name in COLUMNS[kind]}
    more = {TOOLS: pa.string()} if is_rich else {}
    return pa.schema([pa.field(name, kind_of, nullable=False) for name, kind_of in (types | more).items()])


def _message(is_rich: bool) -> pa.StructType:
    import pyarrow as pa

    types: dict[str, pa.DataType] = {"role": pa.string(), "content": pa.string()}
    if is_rich:
        calls = pa.list_(pa.field("element", _call(), nullable=False))
        types |= {name: pa.string() for name in _MORE_TEXTS} | {"tool_calls": calls, "train": pa.bool_()}
    return pa.struct([pa.field(name, kind, nullable=False) for name, kind in types.items()])


def _call() -> pa.StructType:
    """A call of a function; `arguments` as JSON, in their order."""
    import pyarrow as pa

    return pa.struct([pa.field(name, pa.string(), nullable=False) for name in ("id", "name", "arguments")])


def _turns(is_rich: bool) -> pa.ListType:
    import pyarrow as pa

    return pa.list_(pa.field("element", _message(is_rich), nullable=False))


def is_rich(row: Mapping[str, Any]) -> bool:
    """Whether a row has more than turns of role and content."""
    return TOOLS in row or any(len(message) > 2 for name in TURNS if name in row for message in row[name])


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
    struct = pa.StructArray.from_arrays(texts, fields=list(_message(is_rich=False)))
    begins = pa.Array.from_buffers(pa.int32(), len(turns) + 1, [None, _offsets(turns.value_lengths().to_pylist())])
    return pa.ListArray.from_arrays(begins, struct, type=_turns(is_rich=False))


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
        arrays.append(_texts([_json(row[TOOLS]) if TOOLS in row else "" for row in rows]))
    return pa.Table.from_arrays(arrays, schema=rows_schema(kind, is_rich))


def _turns_array(values: Sequence[Sequence[Message]], is_rich: bool) -> pa.Array:
    """A column of lists of messages."""
    import pyarrow as pa

    turns = [turn for value in values for turn in value]
    fields = [_texts([turn["role"] for turn in turns]), _texts([turn["content"] for turn in turns])]
    if is_rich:
        for turn in turns:
            assert turn.keys() <= {"role", "content", "tool_calls", "train", *_MORE_TEXTS}, turn.keys()
            # What is empty is read as absent.
            assert all(turn.get(name, "x") for name in ("tool_calls", *_MORE_TEXTS)) and not turn.get("train"), turn
        fields += [_texts([turn.get(name, "") for turn in turns]) for name in _MORE_TEXTS]
        fields += [_calls([turn.get("tool_calls", ()) for turn in turns]), _flags(["train" not in it for it in turns])]
    struct = pa.StructArray.from_arrays(fields, fields=list(_message(is_rich)))
    return pa.ListArray.from_arrays(_starts(values), struct, type=_turns(is_rich))


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
        [_json(call["function"]["arguments"]) for call in calls],
    )
    struct = pa.StructArray.from_arrays(list(map(_texts, texts)), fields=list(_call()))
    kind = pa.list_(pa.field("element", _call(), nullable=False))
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


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


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
    if opened.schema_arrow not in [rows_schema(kind, rich) for kind in COLUMNS for rich in (False, True)]:
        opened.close()
        raise ValueError(
            f"{file}: no rows file: its columns ({', '.join(opened.schema_arrow.names)}) are not those of sft, "
            "preference or rlvr rows, or of texts; make a data set of it first"
        )
    return opened


def is_rich_file(opened: parquet.ParquetFile) -> bool:
    """Whether a rows file has columns for more than role and content."""
    return TOOLS in opened.schema_arrow.names


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
                yield from _given(rows.slice(max(first - start, 0), min(end, stop) - max(first, start)))


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
            (found[number],) = _given(rows.slice(number - starts[group], 1))
    return found


def _given(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows of a table as they were given: only with what they have."""
    is_rich = TOOLS in table.column_names
    for row in table.to_pylist():
        yield given_row(row) if is_rich else row


def given_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a rich file's columns, or of some of them, as it was given."""
    given: dict[str, Any] = {
        name: [_given_turn(turn) for turn in value] if name in TURNS else value for name, value in row.items()
    }
    tools = given.pop(TOOLS, "")
    return given | {TOOLS: json.loads(tools)} if tools else given


def _given_turn(stored: Message) -> Message:
    turn = {"role": stored["role"], "content": stored["content"]}
    turn |= {name: stored[name] for name in _MORE_TEXTS if stored[name]}
    if stored["tool_calls"]:
        turn["tool_calls"] = [
            ({"id": call["id"]} if call["id"] else {})
            | {"type": "function", "function": {"name": call["name"], "arguments": json.loads(call["arguments"])}}
            for call in stored["tool_calls"]
        ]
    return turn if stored["train"] else turn | {"train": False}


def rows_digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """One digest of rows, whatever their order and however their file was written."""
    lines = sorted(hashlib.sha256(canonical_json(dict(row)).encode()).digest() for row in rows)
    return hashlib.sha256(b"".join(lines)).hexdigest()


def same_rows(before: Path, file: Path) -> bool:
    """Whether two rows files hold the same rows in the same order; False where `before` is no whole rows file."""
    try:
        return all(old == new for old, new in zip_longest(stored_rows(before), stored_rows(file)))
    except (ValueError, OSError):
        return False


def turns_of(row: Mapping[str, Any]) -> list[Message]:
    """All messages of a row; a turn's number is its place here."""
    return [message for name in TURNS for message in row.get(name, ())]


def texts_of(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Role and whole text of every turn, by its number; behind them what the row says of its tools, as a system turn.

    For what reads a row's text. Of what a model may be shown, only the name of a speaker and the ids of calls are not
    here.
    """
    texts = [(message["role"], turn_text(message)) for message in turns_of(row)]
    return [*texts, ("system", tools_text(row[TOOLS]))] if TOOLS in row else texts


def turn_text(message: Message) -> str:
    """All text of a turn, a line each: content first, then reasoning, then its calls."""
    content: str = message["content"]
    if len(message) <= 2:
        return content
    parts = [content, message.get("reasoning_content", "")]
    for call in message.get("tool_calls", ()):
        parts += [call["function"]["name"], *_leaves(call["function"]["arguments"])]
    return "\n".join(part for part in parts if part)


def tools_text(tools: Sequence[Any]) -> str:
    """All text of the functions that a row offers, a line each."""
    return "\n".join(_leaves(tools))


def num_characters(row: Mapping[str, Any]) -> int:
    """Characters of a row's texts."""
    of_tools = len(tools_text(row[TOOLS])) if TOOLS in row else 0
    return of_tools + sum(len(turn_text(message)) for message in turns_of(row))


def _leaves(value: Any) -> Iterator[str]:
    """Names and values of JSON, in their order."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name)
            yield from _leaves(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value if isinstance(value, str) else _json(value)
