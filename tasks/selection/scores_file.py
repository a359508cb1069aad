"""The scores file: what was measured of every row of one source, from the stage `selection_scores` to `selection`.

One line a row, in the order of the rows file that was scored. A line belongs to a row by its content: `row_digest`. The
file's metadata names the scorer. docs/selection.md says what the figures mean.

    row                 number of the row in the file that was scored, from 0
    id, digest          of the row; the digest leaves the id out
    num_tokens          tokens of the rendered row
    num_trained_tokens  those of them that carry a loss; 0 for prompts
    num_characters      of the row's texts
    repetition          share of its word 3-grams that stand there a second time
    loss, masked_loss   mean cross-entropy over the scored tokens, in nats; null if not measured
    score               higher is better; null where there is none: see `problem`, or the scorer gives none (`counts`)
    problem             why a row has no score, else ""
    parts               scores of turns, or of their steps: tokens [first, last) of the rendered row
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from smoltulu.artifacts.keys import canonical_json
from smoltulu.schemas.selection import Scorer
from smoltulu.tasks.data.rows import is_rich

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet

#: Key of the file's metadata under which it names its scorer.
SCORER_KEY = b"smoltulu.scorer"
#: Rows of a row group: what a reader holds.
GROUP_ROWS = 4096
#: Hexadecimal characters of a row's digest: two of a million rows are the same by chance once in 37 million times.
DIGEST_LENGTH = 16

TOO_LONG = "too long"
NO_TRAINED_TOKEN = "no trained token"
EMPTY_ANSWER = "empty answer"
NO_NUMBER = "loss is no number"
NOT_RENDERED = "not rendered by the chat template"
#: Why a row has no score -> what to do where no row has one.
PROBLEMS = {
    TOO_LONG: "Raise selection.max_length ({max_length} tokens, and at most the selector model's positions).",
    NO_TRAINED_TOKEN: "Look at the rows: somebody must answer, and the template must mark what the answer is.",
    EMPTY_ANSWER: "Look at the rows: their answers have no text.",
    NO_NUMBER: "The selector model is broken, or its precision too small: look at it, or set precision to float32.",
    NOT_RENDERED: "Name a chat template that takes these rows.",
}


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class PartScore:
    """A turn of a row, or a step of a turn. `num_tokens`: those of [first, last) that are scored.

    turn, step  from 0; the step is 0 where turns are scored whole
    """

    turn: int
    step: int
    first: int
    last: int
    num_tokens: int
    loss: float | None
    masked_loss: float | None
    score: float | None


@dataclass(frozen=True)
class RowScore:
    """A line of the file."""

    row: int
    id: str
    digest: str
    num_tokens: int
    num_trained_tokens: int
    num_characters: int
    repetition: float
    loss: float | None = None
    masked_loss: float | None = None
    score: float | None = None
    problem: str = ""
    parts: tuple[PartScore, ...] = ()


COLUMNS = tuple(field.name for field in fields(RowScore))
_MEASURED = ("loss", "masked_loss", "score")


def row_digest(row: Mapping[str, Any]) -> str:
    """Digest of a row's content. Repeats of a row, which differ in their ids, have the same."""
    plain = {name: value for name, value in row.items() if name != "id"}
    # Of texts alone the canonical form is what json writes: half of the time, for a million rows.
    content = canonical_json(plain) if is_rich(row) else _ENCODER.encode(plain)
    return hashlib.blake2b(content.encode()).hexdigest()[:DIGEST_LENGTH]


def scores_schema(scorer: Scorer) -> pa.Schema:
    """Columns of a scores file; only what may not be measured may be null."""
    import pyarrow as pa

    part = pa.struct(
        [pa.field(name, pa.int32(), nullable=False) for name in ("turn", "step", "first", "last", "num_tokens")]
        + [pa.field(name, pa.float64()) for name in _MEASURED]
    )
    types: dict[str, pa.DataType] = {
        "row": pa.int64(),
        "id": pa.string(),
        "digest": pa.string(),
        "num_tokens": pa.int32(),
        "num_trained_tokens": pa.int32(),
        "num_characters": pa.int64(),
        "repetition": pa.float64(),
        **dict.fromkeys(_MEASURED, pa.float64()),
        "problem": pa.string(),
        "parts": pa.list_(pa.field("element", part, nullable=False)),
    }
    assert tuple(types) == COLUMNS
    columns = [pa.field(name, kind, nullable=name in _MEASURED) for name, kind in types.items()]
    return pa.schema(columns, metadata={SCORER_KEY: scorer.encode()})


class ScoresWriter:
    """Writes a scores file, row by row. The same lines give the same bytes."""

    def __init__(self, file: Path, scorer: Scorer) -> None:
        from pyarrow import parquet

        self._schema = scores_schema(scorer)
        self._writer = parquet.ParquetWriter(file, self._schema, compression="zstd")
        self._waiting: list[dict[str, Any]] = []

    def write(self, score: RowScore) -> None:
        """Add a line."""
        self.write_line(asdict(score))

    def write_line(self, line: dict[str, Any]) -> None:
        """Add a line that is a dictionary already."""
        for one in (line, *line["parts"]):
            assert all(one[name] is None or math.isfinite(one[name]) for name in _MEASURED), one
        assert not (line["problem"] and line["score"] is not None), line
        self._waiting.append(line)
        if len(self._waiting) == GROUP_ROWS:
            self._end_group()

    def _end_group(self) -> None:
        import pyarrow as pa

        if self._waiting:
            self._writer.write_table(pa.Table.from_pylist(self._waiting, self._schema))
        self._waiting = []

    def __enter__(self) -> ScoresWriter:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if failed is None:
            self._end_group()
        self._writer.close()


def open_scores(file: Path) -> parquet.ParquetFile:
    """A scores file, its lines not yet read. ValueError where it cannot be read, or is no scores file."""
    import pyarrow
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a whole Parquet file ({str(error)[:200]}); score the rows again") from error
    schema = opened.schema_arrow
    if schema != scores_schema("counts") or _scorer_of(schema) not in get_args(Scorer):
        opened.close()
        raise ValueError(
            f"{file}: no scores file: its columns ({', '.join(schema.names)}) or its scorer are not those that the "
            "stage selection_scores writes; score the rows again"
        )
    return opened


def scorer_of(opened: parquet.ParquetFile) -> Scorer:
    """What a scores file was made by."""
    scorer: Scorer = _scorer_of(opened.schema_arrow)
    return scorer


def _scorer_of(schema: pa.Schema) -> Any:
    return (schema.metadata or {}).get(SCORER_KEY, b"").decode(errors="replace")


def read_scores(file: Path, columns: tuple[str, ...] = COLUMNS) -> pa.Table:
    """Columns of a whole scores file, checked. For a million rows without `parts`: about 100 bytes a row in memory.

    Raises:
        ValueError: as `open_scores`, or the lines are not what a scores file holds (the message names the first).
    """
    import pyarrow as pa

    with open_scores(file) as opened:
        groups, first = [], 0
        for group in range(opened.metadata.num_row_groups):
            table = opened.read_row_group(group, list(COLUMNS), use_threads=False)
            _check(table, first, file)
            groups.append(table.select(list(columns)))
            first += table.num_rows
        schema = pa.schema([opened.schema_arrow.field(name) for name in columns], opened.schema_arrow.metadata)
    return pa.concat_tables([schema.empty_table(), *groups])


def stored_scores(file: Path) -> Iterator[RowScore]:
    """The lines of a scores file, one by one. Holds a row group. Raises ValueError as `read_scores`."""
    with open_scores(file) as opened:
        first = 0
        for group in range(opened.metadata.num_row_groups):
            table = opened.read_row_group(group, use_threads=False)
            _check(table, first, file)
            first += table.num_rows
            for line in table.to_pylist():
                parts = tuple(PartScore(**part) for part in line.pop("parts"))
                yield RowScore(**line, parts=parts)


def _check(table: pa.Table, first: int, file: Path) -> None:
    """ValueError where lines of a row group are none; `first`: number of its first line in the file."""
    import numpy as np
    import pyarrow.compute as pc

    def column(name: str) -> Any:
        return table.column(name)

    def values(name: str) -> np.ndarray:
        found: np.ndarray = column(name).to_numpy()
        return found

    rows, tokens, trained = values("row"), values("num_tokens"), values("num_trained_tokens")
    scores = column("score")
    refused = {
        "is not numbered as its place in the file": rows != np.arange(first, first + len(rows)),
        "has more trained tokens than tokens, or fewer than none": (trained < 0) | (trained > tokens),
        "has fewer characters than none": values("num_characters") < 0,
        "has a repetition outside [0, 1]": ~((values("repetition") >= 0) & (values("repetition") <= 1)),
        f"has a digest that is not {DIGEST_LENGTH} characters": np.asarray(
            pc.not_equal(pc.utf8_length(column("digest")), DIGEST_LENGTH)
        ),
        "has a problem and a score": np.asarray(pc.and_(pc.not_equal(column("problem"), ""), pc.is_valid(scores))),
    }
    for name in _MEASURED:
        refused[f"has a {name} that is no number"] = ~np.asarray(pc.fill_null(pc.is_finite(column(name)), True))
    for what, where in refused.items():
        if where.any():
            number = int(np.argmax(where))
            raise ValueError(
                f"{file}: line {first + number} (row {column('id')[number].as_py()}) {what}: the file was changed, or "
                "made by something else; score the rows again"
            )
