"""Stage `near_duplicates`: rows that are nearly the same as another one, as one of another set, or as a benchmark's.

docs/near-duplicates.md says what is compared and what the figures mean.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.near_duplicates import (
    DuplicateCount,
    NearDuplicateInputs,
    NearDuplicateOutputs,
    NearDuplicateRules,
    NearDuplicateStageConfig,
)
from smoltulu.tasks.data import rows as rows_file
from smoltulu.tasks.near_duplicates.shingles import compared_text, plain_words, shingles
from smoltulu.tasks.stage import Stage, StageContext

if TYPE_CHECKING:
    import numpy as np

    from smoltulu.tasks.near_duplicates.greedy import Found
    from smoltulu.tasks.near_duplicates.texts import Texts

logger = logging.getLogger("smoltulu")

ITSELF = "itself"
_ROWS_AT_A_TIME = 2048


@dataclass(frozen=True)
class ItemSet:
    """Items of one set: those numbered `first` to `first` + `num_items` - 1.

    rows   row of each item in its set
    ids    id of each item
    """

    name: str
    first: int
    rows: Sequence[int]
    ids: Sequence[str]

    @property
    def num_items(self) -> int:
        """How many there are."""
        return len(self.rows)


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


def find_near_duplicates(
    config: NearDuplicateStageConfig, inputs: NearDuplicateInputs, context: StageContext
) -> tuple[NearDuplicateOutputs, dict[str, float]]:
    """Write `rows.parquet`, `pairs.parquet` (a line per row and what it is alike to), `clusters.parquet` and a page.

    Raises:
        ValueError: rensa is not installed or makes other signatures, an input is no rows file or no index, there is no
            row, or none would be left.
    """
    from smoltulu.tasks.near_duplicates.minhash import check_signatures
    from smoltulu.tasks.near_duplicates.page import write_page
    from smoltulu.tasks.near_duplicates.texts import Texts

    rules, source = config.settings, Path(inputs.dataset)
    minhash = check_signatures()
    num_rows = rows_file.num_rows(source)
    if num_rows == 0:
        raise ValueError(f"near_duplicates: {source} has no row to compare")
    texts = Texts(context.work / "compared.bin", rules.shingle, rules.shingle_size)
    try:
        matches, without_text, unfinished = _compare(config, inputs, texts, num_rows, context)
    finally:
        texts.close()
    duplicates = sorted({match.row for match in matches})
    removed = duplicates if rules.policy == "remove" else []
    if len(removed) == num_rows:
        raise ValueError(
            f"near_duplicates: all {num_rows} rows are alike to the sets that they are compared with, so none is left; "
            "look at what they hold with policy: report"
        )
    fields = NearDuplicateOutputs.model_fields
    names = {
        name: context.folder / fields[name].default for name in ("file", "pairs_file", "clusters_file", "page_file")
    }
    write_kept(source, names["file"], removed)
    _write_pairs(names["pairs_file"], matches, set(removed))
    num_clusters = _write_clusters(names["clusters_file"], matches)
    outputs = NearDuplicateOutputs(
        kind=config.kind,
        policy=rules.policy,
        minhash=minhash,
        num_rows_read=num_rows,
        num_rows=num_rows - len(removed),
        num_removed=len(removed),
        num_near_duplicates=len(duplicates),
        num_clusters=num_clusters,
        num_without_text=without_text,
        num_unfinished=unfinished,
        counts=count_matches(matches),
    )
    write_page(names["page_file"], outputs, rules, matches, inputs)
    if unfinished:
        logger.warning(
            "near_duplicates: %s rows have more candidates than are compared; they may have more near-duplicates. A "
            "template that most rows share does this: a greater shingle_size helps",
            f"{unfinished:,}",
        )
    metrics = {
        "num_rows": float(outputs.num_rows),
        "num_removed": float(outputs.num_removed),
        "near_duplicate_share": len(duplicates) / num_rows,
    }
    return outputs, metrics


def _compare(
    config: NearDuplicateStageConfig, inputs: NearDuplicateInputs, texts: Texts, num_rows: int, context: StageContext
) -> tuple[list[Match], int, int]:
    """Matches in the order of rows; number of rows without a word; number of rows not compared with all candidates."""
    import numpy as np

    from smoltulu.tasks.near_duplicates.greedy import near_duplicates
    from smoltulu.tasks.near_duplicates.minhash import band_hashes, signatures

    rules = config.settings
    num_bands, rows_per_band = rules.bands()
    sets: list[ItemSet] = []
    bands: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    started = time.monotonic()
    for name, items in _sets(inputs, rules):
        first = len(texts)
        numbers, ids = [], []
        while batch := list(islice(items, _ROWS_AT_A_TIME)):
            made = []
            for row, item_id, text in batch:
                words = plain_words(text)
                texts.add(words)
                made.append(shingles(words, rules.shingle, rules.shingle_size))
                numbers.append(row)
                ids.append(item_id)
            bands.append(band_hashes(signatures(made, rules.num_perm), num_bands, rows_per_band))
            sizes.append(np.array([len(one) for one in made], np.int32))
            speed = len(texts) / max(time.monotonic() - started, 1e-9)
            context.report(min(len(texts), num_rows), num_rows, num_rows=float(len(texts)), rows_per_second=speed)
        sets.append(ItemSet(name, first, numbers, ids))
    texts.finish()
    own = sets[-1]
    is_compared = np.concatenate(sizes) > 0
    found = near_duplicates(
        np.concatenate(bands), is_compared, own.first, _alike(texts, rules.threshold), within=config.within
    )
    return _matches(found, sets, texts), int((~is_compared[own.first :]).sum()), len(found.unfinished)


def _alike(texts: Texts, threshold: float) -> Any:
    def alike(one: int, other: int) -> float | None:
        similarity = texts.jaccard(one, other)
        return similarity if similarity >= threshold else None

    return alike


def _sets(
    inputs: NearDuplicateInputs, rules: NearDuplicateRules
) -> Iterator[tuple[str, Iterator[tuple[int, str, str]]]]:
    """(name, items) of every set that is compared with, then of the rows themselves. An item: (row, id, text)."""
    if inputs.index is not None:
        yield from _benchmarks(Path(inputs.index))
    for name, file in sorted(inputs.others.items()):
        yield name, _rows(Path(file), rules)
    yield ITSELF, _rows(Path(inputs.dataset), rules)


def _rows(file: Path, rules: NearDuplicateRules) -> Iterator[tuple[int, str, str]]:
    for number, row in enumerate(rows_file.stored_rows(file)):
        yield number, row["id"], compared_text(row, rules.text)


def _benchmarks(index: Path) -> Iterator[tuple[str, Iterator[tuple[int, str, str]]]]:
    """The instances of every benchmark of an index; of one with several query fields, these joined by line feeds."""
    from pyarrow import parquet

    file = index / "queries.parquet"
    if not file.is_file():
        raise ValueError(f"{index}: no benchmark index (queries.parquet is missing); make it again")
    table = parquet.read_table(file, columns=["benchmark", "row", "fields"])
    instances: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    for name, row, fields in zip(*(table.column(column).to_pylist() for column in table.column_names), strict=True):
        instances[name].append((row, str(row), "\n".join(fields)))
    for name, items in sorted(instances.items()):
        yield f"benchmark {name}", iter(items)


def _matches(found: Found, sets: list[ItemSet], texts: Texts) -> list[Match]:
    import bisect

    own, firsts = sets[-1], [one.first for one in sets]
    matches = []
    for pair in found.pairs:
        # The last set that begins at or before the item: empty sets begin where the next one does.
        other = sets[bisect.bisect_right(firsts, pair.other) - 1]
        mine, theirs = pair.item - own.first, pair.other - other.first
        matches.append(
            Match(
                row=own.rows[mine],
                row_id=own.ids[mine],
                other_set=other.name,
                other_row=other.rows[theirs],
                other_id=other.ids[theirs],
                jaccard=pair.jaccard,
                exact=texts.same(pair.item, pair.other),
            )
        )
    return matches


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


def write_kept(source: Path, kept: Path, removed: Sequence[int]) -> None:
    """The rows file without the rows of these numbers; row groups stay as they are otherwise."""
    import shutil

    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    if not removed:
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


def _write_pairs(file: Path, matches: Sequence[Match], removed: set[int]) -> None:
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


def _write_clusters(file: Path, matches: Sequence[Match]) -> int:
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


near_duplicates = Stage(
    name="near_duplicates",
    version=1,
    config=NearDuplicateStageConfig,
    inputs=NearDuplicateInputs,
    outputs=NearDuplicateOutputs,
    function=find_near_duplicates,
    keeps_rows=True,
    grows_with_model=False,
)
