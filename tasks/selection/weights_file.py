"""The weights file: how much the loss of each kept row, or of each of its parts, weighs in SFT.

row         number of the row in the selected rows file
num_tokens  of the rendered row
weight      of its tokens that are in no span
spans       tokens [first, last) of the rendered row, and their weight; empty where rows weigh as a whole
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smoltulu.tasks.selection.choice import rank_weights
from smoltulu.tasks.selection.scores_file import read_scores

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

_GROUP_ROWS = 65_536


@dataclass(frozen=True)
class Spans:
    """Weighted parts of rows. starts: place of each row's first part, and behind them the number of parts, (R + 1,)."""

    starts: np.ndarray
    first: np.ndarray
    last: np.ndarray
    weights: np.ndarray


def weights_schema() -> pa.Schema:
    """Columns of a weights file."""
    import pyarrow as pa

    span = pa.struct(
        [
            pa.field("first", pa.int32(), nullable=False),
            pa.field("last", pa.int32(), nullable=False),
            pa.field("weight", pa.float64(), nullable=False),
        ]
    )
    return pa.schema(
        [
            pa.field("row", pa.int64(), nullable=False),
            pa.field("num_tokens", pa.int32(), nullable=False),
            pa.field("weight", pa.float64(), nullable=False),
            pa.field("spans", pa.list_(pa.field("element", span, nullable=False)), nullable=False),
        ]
    )


def part_weights(
    files: Mapping[int, Path], sources: np.ndarray, lines: np.ndarray, rule: tuple[str, str, float, float]
) -> Spans:
    """Weights of the turns or steps of rows by their rank among all parts of their domain.

    A part without a score is left out: it weighs as its row.

    files           number of the source -> its scores file
    sources, lines  (R,) of the rows, whose order the result has
    rule            within, order, least and greatest weight
    """
    import numpy as np

    counts = np.zeros(len(sources), dtype=np.int64)
    pieces: list[tuple[np.ndarray, ...]] = []  # row, first, last, score
    for number, file in files.items():
        own = np.flatnonzero(sources == number)
        if not len(own):
            continue
        column = read_scores(file, ("parts",))["parts"].combine_chunks()
        starts = column.offsets.to_numpy().astype(np.int64)
        first, last, score = (
            column.values.field(name).to_numpy(zero_copy_only=False) for name in ("first", "last", "score")
        )
        size = np.diff(starts)[lines[own]]
        places = np.repeat(starts[lines[own]], size) + _counted(size)
        rows = np.repeat(own, size)
        there = ~np.isnan(score[places].astype(np.float64))
        places, rows = places[there], rows[there]
        pieces.append((rows, first[places], last[places], score[places].astype(np.float64)))
        counts += np.bincount(rows, minlength=len(sources))
    rows, first, last, score = (np.concatenate(some) for some in zip(*pieces, strict=True))
    order = np.argsort(rows, kind="stable")
    rows, first, last, score = (one[order] for one in (rows, first, last, score))
    weights = rank_weights(score, sources[rows], *rule)
    return Spans(np.concatenate(([0], np.cumsum(counts))), first, last, weights)


def _counted(sizes: np.ndarray) -> np.ndarray:
    """0, 1, ... for each size, one behind the other: [2, 3] gives 0 1 0 1 2."""
    import numpy as np

    made: np.ndarray = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return made


def write_weights(file: Path, num_tokens: np.ndarray, weights: np.ndarray, parts: Spans | None) -> None:
    """Write the file. num_tokens, weights: (R,) of the kept rows in their order."""
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    schema = weights_schema()
    kind = schema.field("spans").type
    starts = np.zeros(len(weights) + 1, dtype=np.int64) if parts is None else parts.starts
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for begin in range(0, len(weights), _GROUP_ROWS):
            end = min(begin + _GROUP_ROWS, len(weights))
            own = slice(starts[begin], starts[end])
            none = np.empty(0)
            columns = [none] * 3 if parts is None else [parts.first[own], parts.last[own], parts.weights[own]]
            values = [pa.array(one, field.type) for one, field in zip(columns, kind.value_type, strict=True)]
            spans = pa.StructArray.from_arrays(values, fields=list(kind.value_type))
            offsets = pa.array((starts[begin : end + 1] - starts[begin]).astype(np.int32))
            writer.write_table(
                pa.Table.from_arrays(
                    [
                        pa.array(np.arange(begin, end)),
                        pa.array(num_tokens[begin:end].astype(np.int32)),
                        pa.array(weights[begin:end]),
                        pa.ListArray.from_arrays(offsets, spans, type=kind),
                    ],
                    schema=schema,
                )
            )
