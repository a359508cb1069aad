"""The results of all shards of a contamination scan, merged, and the rows that are left.

Merging is union and maximum: every partition into shards gives the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smoltulu.schemas.contamination import BenchmarkReport, ShardResult
from smoltulu.tasks.contamination.scan import HITS, Index, ShortRule, load_index
from smoltulu.tasks.data.rows import WRITE_OPTIONS, group_starts, open_rows

_SHORT_TERMS = 8  # instances under so many terms are often found by accident
_ROW_GROUP = 65_536


@dataclass(frozen=True)
class Merged:
    """Totals of all shards. `counting`: the reports of instances with a hit that counts."""

    num_rows: int
    num_turns: int
    num_bytes: int
    num_hits: int
    num_rows_contaminated: int
    num_oversized_terms: int
    benchmarks: tuple[BenchmarkReport, ...]
    counting: tuple[BenchmarkReport, ...]


def merge(
    index_folder: Path,
    results: Sequence[ShardResult],
    folder: Path,
    *,
    short: ShortRule = ShortRule(),  # noqa: B008 (frozen)
    match_threshold: float = 0.5,
) -> Merged:
    """Write `folder`/hits.parquet with the hits of all shards, and count them.

    ValueError where the result of a shard is missing, or given twice.
    """
    index = load_index(index_folder)
    results = sorted(results, key=lambda result: result.number)
    if not results or [result.number for result in results] != list(range(results[0].num_shards)):
        raise ValueError(
            f"merge needs the result of every shard once: given are {[result.number for result in results]}, wanted "
            f"0 to {results[0].num_shards - 1 if results else '?'}; scan the missing ones"
        )
    is_found, is_counting = (np.zeros(index.header.num_instances, dtype=bool) for _ in range(2))
    best = np.zeros(index.header.num_instances, np.float64)
    num_rows_contaminated = 0
    with pq.ParquetWriter(folder / "hits.parquet", short.schema, compression="zstd") as writer:
        waiting: list[pa.Table] = []
        for table in _hits_of_all(results):
            row, instance = (table.column(name).to_numpy() for name in ("row", "instance"))
            num_rows_contaminated += len(np.unique(row))
            is_found[instance] = True
            is_counting[instance[counting(table, short)]] = True
            waiting.append(table)
            while sum(map(len, waiting)) >= _ROW_GROUP:
                whole = pa.concat_tables(waiting)
                writer.write_table(whole.slice(0, _ROW_GROUP).combine_chunks())
                waiting = [whole.slice(_ROW_GROUP)]
        if sum(map(len, waiting)):
            writer.write_table(pa.concat_tables(waiting).combine_chunks())
    for result in results:
        with np.load(Path(result.folder) / "best.npz", allow_pickle=False) as shard_best:
            instance = shard_best["instance"]
            best[instance] = np.maximum(best[instance], shard_best["score"])
    return Merged(
        num_rows=sum(result.num_rows for result in results),
        num_turns=sum(result.num_turns for result in results),
        num_bytes=sum(result.num_bytes for result in results),
        num_hits=sum(result.num_hits for result in results),
        num_rows_contaminated=num_rows_contaminated,
        num_oversized_terms=sum(result.num_oversized_terms for result in results),
        benchmarks=_reports(index, is_found, best, match_threshold),
        counting=_reports(index, is_counting, best, match_threshold),
    )


def _hits_of_all(results: Sequence[ShardResult]) -> Iterator[pa.Table]:
    """Hits of all shards, with row numbers of the whole data set. A table holds whole rows, as a shard writes them."""
    before = 0
    for result in results:
        with pq.ParquetFile(Path(result.folder) / "hits.parquet") as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                row = pa.array(table.column("row").to_numpy() + before, pa.int64())
                yield table.set_column(0, HITS.field("row"), row)
        before += result.num_rows


def _reports(
    index: Index, is_found: np.ndarray, best: np.ndarray, match_threshold: float
) -> tuple[BenchmarkReport, ...]:
    reports = []
    for number, benchmark in enumerate(index.header.benchmarks):
        mine = index.benchmark == number
        found = is_found & mine
        scores = best[mine].tolist()
        reports.append(
            BenchmarkReport(
                name=benchmark.name,
                num_instances=benchmark.num_instances,
                num_skipped=benchmark.num_skipped,
                num_contaminated=int(found.sum()),
                num_unmatchable=int((index.best_possible[mine] <= match_threshold).sum()),
                num_short_hits=int((found & (index.num_terms < _SHORT_TERMS)).sum()),
                mean_score=sum(scores) / len(scores) if index.window and scores else None,
                not_checked=benchmark.not_checked,
            )
        )
    return tuple(reports)


def counting(hits: pa.Table | pa.RecordBatch, short: ShortRule) -> np.ndarray:
    """Which hits count: those on instances that are not short, and what the rule for short ones adds."""
    if short.rule == "always":
        return np.ones(len(hits), dtype=bool)
    if short.rule == "alone":
        return np.asarray(hits.column("is_alone").to_numpy(zero_copy_only=False), dtype=bool)
    return np.asarray(hits.column("num_terms").to_numpy() >= short.min_terms)


def write_kept(dataset: Path, hits_file: Path, kept: Path, removed: Path, short: ShortRule | None) -> int:
    """Write the rows of `dataset` without those with a hit that counts. Number of those.

    `removed` gets a line per such row: {"id", "reasons": {benchmark: [rows of the benchmark]}}. The row groups stay the
    same otherwise. Where no row goes, the file is copied. Without a rule nothing is removed.
    """
    num_removed = 0
    with removed.open("w", encoding="utf-8") as log:
        hits = iter(()) if short is None else rows_to_remove(hits_file, short)
        next_hit = next(hits, None)
        if next_hit is None:
            shutil.copyfile(dataset, kept)
            return 0
        with open_rows(dataset) as source, pq.ParquetWriter(kept, source.schema_arrow, **WRITE_OPTIONS) as output:
            for group, (start, stop) in enumerate(pairwise(group_starts(source))):
                is_kept = np.ones(stop - start, dtype=bool)
                while next_hit is not None and next_hit[0] < stop:
                    row, row_id, reasons = next_hit
                    is_kept[row - start] = False
                    num_removed += 1
                    log.write(json.dumps({"id": row_id, "reasons": reasons}, ensure_ascii=False) + "\n")
                    next_hit = next(hits, None)
                if is_kept.any():
                    rows = source.read_row_group(group, use_threads=False)
                    output.write_table(rows if is_kept.all() else rows.filter(pa.array(is_kept)))
        assert next_hit is None, "the rows file ends before a row that was found in it"
    return num_removed


def rows_to_remove(hits_file: Path, short: ShortRule) -> Iterator[tuple[int, str, dict[str, list[int]]]]:
    """(number, id, reasons) of each row with a hit that counts, in order."""
    for (row, row_id), hits in groupby(_counting_hits(hits_file, short), key=itemgetter(0, 1)):
        reasons: dict[str, list[int]] = {}
        for _, _, benchmark, benchmark_row in hits:
            reasons.setdefault(benchmark, []).append(benchmark_row)
        yield row, row_id, reasons


def _counting_hits(hits_file: Path, short: ShortRule) -> Iterator[tuple[int, str, str, int]]:
    with pq.ParquetFile(hits_file, read_dictionary=["benchmark"]) as file:
        columns = ["row", "row_id", "benchmark", "benchmark_row", "num_terms"]
        columns += ["is_alone"] if short.rule == "alone" else []
        for batch in file.iter_batches(batch_size=_ROW_GROUP, columns=columns):
            batch = batch.filter(pa.array(counting(batch, short)))
            names = batch.column("benchmark").dictionary.to_pylist()
            numbers = batch.column("benchmark").indices.to_numpy().tolist()
            rows, benchmark_rows = (batch.column(name).to_numpy().tolist() for name in ("row", "benchmark_row"))
            row_ids = batch.column("row_id").to_pylist()
            yield from zip(rows, row_ids, (names[number] for number in numbers), benchmark_rows, strict=True)
