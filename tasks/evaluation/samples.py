"""The samples file of an evaluation: a row for each item and filter, as Parquet. JSON lines of before are read too.

A row as it is written and read, where what does not apply is left out:

    task            the task that the item belongs to; of a group, the member
    entry           position of the recipe's entry, and so of the score, that the item was measured for
    id              of the item
    filter          lm-eval's filter whose result `parsed` and `metrics` are
    doc_hash, prompt_hash, target_hash    digests of the item, of what was asked, of what is right
    prompt          the text that the model was given, rendered
    target          what is right
    completion      all that the model wrote
    parsed          what the filter made of it
    stop            what ended the answer: `eos`, `length` (the limit on its tokens) or the stop string
    num_tokens      tokens of the answer, the one that ended it included
    logliks         log-likelihood of each choice, nats
    metrics         name -> value
    parts           name -> values, of a metric that judges several answers in one (IFEval's instructions)
    is_empty        nothing was written but white space
    is_unparsed     the filter found no answer in what was written
    is_truncated    the answer was ended by the limit on its tokens
    is_left_cut     the beginning of the prompt was cut off, as it did not fit

Rows of our own measurements have further fields (`right`, `chosen`, ...): any JSON values.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

#: A row of the samples file.
Sample = dict[str, Any]

SAMPLES_FILE = "samples.parquet"
_TEXTS = (
    "task", "id", "filter", "doc_hash", "prompt_hash", "target_hash",
    "prompt", "target", "completion", "parsed", "stop",
)  # fmt: skip
_NUMBERS = ("entry", "num_tokens")
#: Mark of a row -> count in the details of its score.
COUNTS = {
    "is_empty": "num_empty", "is_unparsed": "num_unparsed",
    "is_truncated": "num_truncated", "is_left_cut": "num_left_cut",
}  # fmt: skip
#: JSON of the fields that have no column.
_OTHERS = "others"
#: What lm-eval's filters give where they find nothing.
_INVALID = "[invalid]"
_GROUP_ROWS = 2048
_ADVICE = "evaluate this model again"


def samples_schema(fields: Collection[str] | None = None) -> pa.Schema:
    """Columns of a samples file: all, or those that hold `fields`."""
    import pyarrow as pa

    columns = [(name, pa.string()) for name in _TEXTS] + [(name, pa.int32()) for name in _NUMBERS]
    columns += [(name, pa.bool_()) for name in COUNTS]
    columns += [("logliks", pa.list_(pa.float64())), ("metrics", pa.map_(pa.string(), pa.float64()))]
    if fields is not None:
        columns = [column for column in columns if column[0] in fields]
    if fields is None or len(columns) < len(set(fields)):
        columns.append((_OTHERS, pa.string()))
    return pa.schema(columns)


def is_parts(value: Any) -> bool:
    """Whether an item's metric is of several answers in one."""
    return isinstance(value, list) and bool(value) and all(isinstance(part, (bool, int, float)) for part in value)


def marked(row: Sample) -> Sample:
    """A row with what `completion`, `parsed` and `stop` say of it as marks."""
    marks = {}
    if "completion" in row:
        marks["is_empty"] = not row["completion"].strip()
        if "parsed" in row:
            marks["is_unparsed"] = row["parsed"] == _INVALID or (not row["parsed"].strip() and not marks["is_empty"])
    if row.get("stop") is not None:
        marks["is_truncated"] = row["stop"] == "length"
    return row | marks


def sample_counts(rows: Iterable[Sample], metric: str) -> dict[str, int]:
    """How many items have each mark, for the details of the score of `metric` (`exact_match,strict-match`).

    Only rows of the metric's own filter count: an item has a row for each filter. A mark that no row has is not there.
    """
    of_filter = metric.partition(",")[2]
    counts: dict[str, int] = {}
    for row in rows:
        if row.get("filter", of_filter) == of_filter:
            for mark in COUNTS.keys() & row.keys():
                counts[COUNTS[mark]] = counts.get(COUNTS[mark], 0) + bool(row[mark])
    return {name: counts[name] for name in COUNTS.values() if name in counts}


def write_samples(file: Path, rows: Sequence[Sample]) -> None:
    """Write a samples file. The same rows give the same bytes."""
    with _writer(file) as writer:
        for start in range(0, len(rows), _GROUP_ROWS):
            writer.write_table(_table(rows[start : start + _GROUP_ROWS]))


def join_samples(file: Path, parts: Sequence[tuple[Path, int | None]]) -> None:
    """Write the rows of several samples files into one, each with its `entry` (None: as it is).

    Raises:
        ValueError: a part that cannot be read.
    """
    with _writer(file) as writer:
        for part, entry in parts:
            for table in _groups(part, samples_schema()):
                if entry is not None:
                    position = table.schema.get_field_index("entry")
                    column = _numbers([entry] * table.num_rows)
                    table = table.set_column(position, table.schema.field(position), column)
                writer.write_table(table)


def _writer(file: Path) -> Any:
    from pyarrow import parquet

    return parquet.ParquetWriter(
        file, samples_schema(), compression="zstd", compression_level=3, write_page_checksum=True
    )


def read_samples(file: Path, columns: Sequence[str] | None = None) -> Iterator[Sample]:
    """The rows of a samples file, Parquet or JSON lines; with the fields `columns` alone, where these are given.

    Raises:
        ValueError: a file that is damaged, cut short, or no samples file. Its message names the file.
        OSError: a file that is not there or may not be read.
    """
    if file.suffix == ".jsonl":
        for row in json_lines(file, "task"):
            yield _only(row | ({"id": str(row["id"])} if "id" in row else {}), columns)
        return
    for table in _groups(file, samples_schema(columns)):
        try:
            rows = list(_rows(table))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{file.name} cannot be read: column {_OTHERS!r}: {error}; {_ADVICE}") from error
        for row in rows:
            yield _only(row, columns)


def read_columns(file: Path, columns: Sequence[str]) -> pa.Table:
    """Some columns of a Parquet samples file, `others` among them where it is asked for. Raises as `read_samples`."""
    import pyarrow as pa

    schema = pa.schema([samples_schema().field(name) for name in columns])
    return pa.concat_tables([*_groups(file, schema), schema.empty_table()])


def _only(row: Sample, columns: Sequence[str] | None) -> Sample:
    return row if columns is None else {name: row[name] for name in columns if name in row}


def json_lines(file: Path, column: str) -> Iterator[dict[str, Any]]:
    """Objects with a `column`. Lines end at a newline only: a completion may hold U+2028, where `splitlines` cuts."""
    with file.open(encoding="utf-8", newline="\n") as stream:
        for number, line in enumerate(stream, 1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or column not in row:
                    raise ValueError(f"no object with {column!r}")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file.name}, line {number}: {error}; {_ADVICE}") from error
            yield row


def _groups(file: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """The columns of `schema` of a file, a row group at a time."""
    import pyarrow as pa
    from pyarrow import parquet

    with file.open("rb") as stream:
        try:
            opened = parquet.ParquetFile(stream, page_checksum_verification=True)
            for number in range(opened.num_row_groups):
                table = opened.read_row_group(number, columns=schema.names)
                if not table.schema.equals(schema):
                    raise ValueError(f"its columns are not those of samples: {', '.join(table.schema.names)}")
                yield table
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{file.name} cannot be read: {str(error).strip()}; {_ADVICE}") from error


def _rows(table: pa.Table) -> Iterator[Sample]:
    columns = {name: _values(name, table.column(name)) for name in table.column_names}
    others = columns.pop(_OTHERS, None)
    names = list(columns)
    for number in range(table.num_rows):
        row = {name: value for name in names if (value := columns[name][number]) is not None}
        if others is not None and others[number] is not None:
            further = json.loads(others[number])
            if not isinstance(further, dict) or not row.keys().isdisjoint(further):
                raise ValueError("no object, or one with the fields of other columns")
            row |= further
        yield row


def _values(name: str, column: pa.ChunkedArray) -> list[Any]:
    """A column as Python values. Lists and maps are cut from their flat values: ten times as fast as `to_pylist`."""
    if name not in ("logliks", "metrics"):
        return column.to_pylist()
    values: list[Any] = []
    for chunk in column.chunks:
        offsets, is_there = chunk.offsets.to_pylist(), chunk.is_valid().to_pylist()
        if name == "logliks":
            flat = chunk.values.to_pylist()
        else:
            flat = list(zip(chunk.keys.to_pylist(), chunk.items.to_pylist(), strict=True))
        make = list if name == "logliks" else dict
        values += [
            make(flat[start:end]) if there else None
            for start, end, there in zip(offsets, offsets[1:], is_there, strict=False)
        ]
    return values


def _table(rows: Sequence[Sample]) -> pa.Table:
    import pyarrow as pa

    schema = samples_schema()
    given = set(schema.names) - {_OTHERS}
    assert all(_OTHERS not in row for row in rows)
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in schema.names}
    for name in _TEXTS:
        columns[name] = [None if value is None else _text(str(value)) for value in columns[name]]
    columns["metrics"] = [
        None if one is None else [(metric, float(value)) for metric, value in one.items()] for one in columns["metrics"]
    ]
    others = [{name: value for name, value in row.items() if name not in given} for row in rows]
    columns[_OTHERS] = [_text(json.dumps(one, ensure_ascii=False)) if one else None for one in others]
    return pa.Table.from_pydict(columns, schema=schema)


def _text(value: str) -> str:
    """Without lone surrogates, which UTF-8 does not have."""
    return value if value.isascii() else value.encode("utf-8", "replace").decode()


def _numbers(values: Sequence[int]) -> pa.Array:
    """A column of whole numbers from its buffer: `pyarrow.array` imports pandas."""
    import pyarrow as pa

    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(array("i", values))])
