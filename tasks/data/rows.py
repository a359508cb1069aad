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
MORE_TEXTS = ("reasoning_content", "name", "tool_call_id")
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

    types = {name: turns_type(is_rich) if name in TURNS else pa.string() for name in COLUMNS[kind]}
    more = {TOOLS: pa.string()} if is_rich else {}
    return pa.schema([pa.field(name, kind_of, nullable=False) for name, kind_of in (types | more).items()])


def message_type(is_rich: bool) -> pa.StructType:
    import pyarrow as pa

    types: dict[str, pa.DataType] = {"role": pa.string(), "content": pa.string()}
    if is_rich:
        calls = pa.list_(pa.field("element", call_type(), nullable=False))
        types |= {name: pa.string() for name in MORE_TEXTS} | {"tool_calls": calls, "train": pa.bool_()}
    return pa.struct([pa.field(name, kind, nullable=False) for name, kind in types.items()])


def call_type() -> pa.StructType:
    """A call of a function; `arguments` as JSON, in their order."""
    import pyarrow as pa

    return pa.struct([pa.field(name, pa.string(), nullable=False) for name in ("id", "name", "arguments")])


def turns_type(is_rich: bool) -> pa.ListType:
    import pyarrow as pa

    return pa.list_(pa.field("element", message_type(is_rich), nullable=False))


def is_rich(row: Mapping[str, Any]) -> bool:
    """Whether a row has more than turns of role and content."""
    return TOOLS in row or any(len(message) > 2 for name in TURNS if name in row for message in row[name])


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
    turn |= {name: stored[name] for name in MORE_TEXTS if stored[name]}
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
        yield value if isinstance(value, str) else compact_json(value)


def compact_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
