"""What was found: pairs, their counts, and the files of the artifact."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from smoltulu.schemas.near_duplicates import DuplicateCount
from smoltulu.tasks.data import rows as rows_file

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Match:
    """A row that is alike to something: of the set `itself` it is a kept row before it."""

    row: int
    row_id: str
    other_set: str
    other_row: int
    other_id: str
    jaccard: float
    exact: bool


@dataclass(frozen=True)
class Paraphrase:
    """A row, and the text of another set whose word vectors are most alike."""

    row: int
    row_id: str
    other_set: str
    other_row: int
    other_id: str
    cosine: float
    same_numbers: bool


def count_matches(matches: Sequence[Match]) -> tuple[DuplicateCount, ...]:
    """Rows by their source, and by set and source of what they are alike to; most rows first."""
    rows: dict[tuple[str, str, str], dict[int, bool]] = defaultdict(dict)
    others: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for match in matches:
        benchmark = match.other_set.startswith("benchmark ")
        place = (source_of(match.row_id), match.other_set, "" if benchmark else source_of(match.other_id))
        rows[place][match.row] = rows[place].get(match.row, False) or match.exact
        others[place].add(match.other_row)
    counts = [
        DuplicateCount(
            source=source,
            other_set=other_set,
            other_source=other_source,
            num_rows=len(found),
            num_exact=sum(found.values()),
            num_others=len(others[source, other_set, other_source]),
        )
        for (source, other_set, other_source), found in rows.items()
    ]
    return tuple(sorted(counts, key=lambda one: (-one.num_rows, one.source, one.other_set, one.other_source)))


def source_of(row_id: str) -> str:
    """The number of the source in an id of a row, which is `<source>:<row>`."""
    return row_id.partition(":")[0]


def write_kept(source: Path, kept: Path, removed: Sequence[int] | np.ndarray) -> None:
    """The rows file without the rows of these numbers; row groups stay as they are otherwise."""
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    if not len(removed):
        shutil.copyfile(source, kept)
        return
    gone = np.asarray(removed)
    with (
        rows_file.open_rows(source) as opened,
        parquet.ParquetWriter(kept, opened.schema_arrow, **rows_file.WRITE_OPTIONS) as output,
    ):
        for group, (start, stop) in enumerate(pairwise(rows_file.group_starts(opened))):
            is_kept = np.ones(stop - start, dtype=bool)
            is_kept[gone[(gone >= start) & (gone < stop)] - start] = False
            if is_kept.any():
                rows = opened.read_row_group(group, use_threads=False)
                output.write_table(rows if is_kept.all() else rows.filter(pa.array(is_kept)))


def write_pairs(file: Path, matches: Sequence[Match], removed: set[int]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns = {
        "row": pa.array([match.row for match in matches], pa.int64()),
        "row_id": pa.array([match.row_id for match in matches], pa.string()),
        "other_set": pa.array([match.other_set for match in matches], pa.string()),
        "other_row": pa.array([match.other_row for match in matches], pa.int64()),
        "other_id": pa.array([match.other_id for match in matches], pa.string()),
        "jaccard": pa.array([match.jaccard for match in matches], pa.float64()),
        "exact": pa.array([match.exact for match in matches], pa.bool_()),
        "removed": pa.array([match.row in removed for match in matches], pa.bool_()),
    }
    parquet.write_table(pa.table(columns), file, compression="zstd")


def write_clusters(file: Path, matches: Sequence[Match]) -> int:
    """A line for everything that rows are alike to, largest first. Returns the number of lines."""
    import pyarrow as pa
    from pyarrow import parquet

    rows: dict[tuple[str, int, str], list[int]] = defaultdict(list)
    for match in matches:
        rows[match.other_set, match.other_row, match.other_id].append(match.row)
    ordered = sorted(rows.items(), key=lambda item: (-len(item[1]), item[0]))
    columns = {
        "kept_set": pa.array([place[0] for place, _ in ordered], pa.string()),
        "kept_row": pa.array([place[1] for place, _ in ordered], pa.int64()),
        "kept_id": pa.array([place[2] for place, _ in ordered], pa.string()),
        "num_rows": pa.array([len(found) for _, found in ordered], pa.int64()),
        "rows": pa.array([found for _, found in ordered], pa.list_(pa.int64())),
    }
    parquet.write_table(pa.table(columns), file, compression="zstd")
    return len(ordered)


def write_paraphrases(file: Path, found: Sequence[Paraphrase]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {"row": pa.int64(), "other_row": pa.int64(), "cosine": pa.float64(), "same_numbers": pa.bool_()}
    columns = {
        name: pa.array([getattr(one, name) for one in found], kinds.get(name, pa.string()))
        for name in Paraphrase.__dataclass_fields__
    }
    parquet.write_table(pa.table(columns), file, compression="zstd")
