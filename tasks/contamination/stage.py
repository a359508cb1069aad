"""Stage `contamination`: which benchmark instances are in the training rows, and what happens to those rows."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from smoltulu.schemas.contamination import (
    BenchmarkReport,
    ContaminationInputs,
    ContaminationOutputs,
    ContaminationRules,
    ContaminationStageConfig,
    Shard,
    ShardResult,
)
from smoltulu.tasks.data.rows import num_rows
from smoltulu.tasks.limits import num_cores
from smoltulu.tasks.stage import Stage, StageContext

if TYPE_CHECKING:
    from smoltulu.tasks.contamination.merge import Merged

logger = logging.getLogger("smoltulu")


def check_contamination(
    config: ContaminationStageConfig, inputs: ContaminationInputs, context: StageContext
) -> tuple[ContaminationOutputs, dict[str, float]]:
    """Write `rows.parquet`, `hits.parquet` (a line per row and instance) and `removed.jsonl`.

    `rows.parquet` has the rows of the input, under the policy `remove` without those that hit, under
    `span` without the passages that hit. `context.work` keeps the
    results of finished shards, so that a rerun scans only the others.

    Raises:
        ValueError: the index is of another mode, the input is no rows file, the policy `fail` and a share above
            `fail_above`, or no row is left. No rows file is there then.
    """
    # numba and pyarrow: too slow to import for `plan`.
    from smoltulu.tasks.contamination.merge import merge, write_kept
    from smoltulu.tasks.contamination.rows import plan_shards
    from smoltulu.tasks.contamination.scan import ShortRule, load_index
    from smoltulu.tasks.contamination.span import write_cut

    rules = config.settings
    index_folder, source = Path(inputs.index), Path(inputs.dataset)
    index = load_index(index_folder)
    indexed, has_short = index.header, rules.mode == "ngram" and rules.short_items != "never"
    expected = (rules.mode, rules.ngram_size if rules.mode == "ngram" else None, has_short)
    if (indexed.mode, indexed.ngram_size, indexed.short_items) != expected:
        raise ValueError(
            f"contamination: the index is for mode {indexed.mode} (ngram_size {indexed.ngram_size}, short_items "
            f"{indexed.short_items}), the rules ask for {expected[0]} (ngram_size {expected[1]}, short_items "
            f"{expected[2]}); make the index again with these rules"
        )
    short = ShortRule(rules.short_items, rules.min_terms)
    results = _scan(index_folder, plan_shards(source), rules, context)
    names = ContaminationOutputs.model_fields
    rows_path, hits_path, removed_path = (
        context.folder / names[name].default for name in ("file", "hits_file", "removed_file")
    )
    merged = merge(index_folder, results, context.folder, short=short, match_threshold=rules.match_threshold)
    partial = rows_path.with_suffix(".partial")  # renamed when the outcome is accepted
    try:
        if merged.num_rows == 0:
            raise ValueError(f"contamination: {source} has no row to check")
        if rules.policy == "fail":
            _accept_shares(merged.counting, rules.fail_above)
        num_cut = 0
        if rules.policy == "span" and merged.num_hits:
            num_removed, num_cut = write_cut(source, hits_path, index, rules, partial, removed_path)
        else:
            removing = short if rules.policy == "remove" else None
            num_removed = write_kept(source, hits_path, partial, removed_path, removing)
        if num_removed == merged.num_rows:
            raise ValueError(f"contamination: all {merged.num_rows} training rows hit a benchmark, so none is left")
    except ValueError as error:
        partial.unlink(missing_ok=True)
        # The folder of a failed stage is not kept, its work folder is: the user has to see what was found.
        shutil.copy(hits_path, context.work / hits_path.name)
        raise ValueError(f"{error}. What was found: {context.work / hits_path.name}") from error
    partial.rename(rows_path)
    _warn(merged, rules.fail_above)
    outputs = ContaminationOutputs(
        kind=config.kind,
        mode=rules.mode,
        roles=rules.roles,
        num_rows_read=merged.num_rows,
        num_rows=merged.num_rows - num_removed,
        num_removed=num_removed,
        num_cut=num_cut,
        num_rows_contaminated=merged.num_rows_contaminated,
        num_hits=merged.num_hits,
        num_turns=merged.num_turns,
        num_bytes=merged.num_bytes,
        num_oversized_terms=merged.num_oversized_terms,
        benchmarks=merged.benchmarks,
    )
    metrics = {
        "num_rows": float(outputs.num_rows),
        "num_removed": float(num_removed),
        **({"num_cut": float(num_cut)} if rules.policy == "span" else {}),
        "num_rows_contaminated": float(merged.num_rows_contaminated),
        **{
            f"contaminated_share/{report.name}": report.share
            for report in merged.benchmarks
            if report.share is not None
        },
    }
    return outputs, metrics


def _scan(
    index_folder: Path, shards: list[Shard], rules: ContaminationRules, context: StageContext
) -> list[ShardResult]:
    """Scan the shards in threads, side by side: the compiled scan needs no interpreter lock."""
    from smoltulu.tasks.contamination.scan import ShortRule, scan_shard

    folder = context.work / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    num_all = max(1, num_rows(Path(shards[0].path)))
    num_scanned: dict[int, int] = {}  # by shard
    lock, started = threading.Lock(), time.monotonic()

    def report(shard: Shard, num_rows: int) -> None:
        with lock:
            num_scanned[shard.number] = num_rows
            rows = sum(num_scanned.values())
            speed = rows / max(time.monotonic() - started, 1e-9)
            context.report(rows, num_all, num_rows=float(rows), rows_per_second=speed)

    def scan(shard: Shard) -> ShardResult:
        result = scan_shard(
            index_folder,
            shard,
            folder,
            roles=rules.roles,
            match_threshold=rules.match_threshold,
            short=ShortRule(rules.short_items, rules.min_terms),
            report=lambda num_rows: report(shard, num_rows),
        )
        report(shard, result.num_rows)
        return result

    with ThreadPoolExecutor(context.compute.num_threads or num_cores()) as pool:
        futures = [pool.submit(scan, shard) for shard in shards]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _accept_shares(reports: tuple[BenchmarkReport, ...], fail_above: float) -> None:
    above = [report for report in reports if report.share is not None and report.share > fail_above]
    if above:
        found = "; ".join(
            f"{report.name}: {report.num_contaminated} of {report.num_instances} instances ({report.share:.2%})"
            for report in above
        )
        raise ValueError(f"contamination: the training data holds more than {fail_above:.2%} (fail_above) of {found}")


def _warn(merged: Merged, fail_above: float) -> None:
    for report in merged.benchmarks:
        if report.not_checked:
            logger.warning("%s: not checked: %s", report.name, report.not_checked)
        elif report.share is not None and report.share > fail_above:
            logger.warning(
                "%s: %s of its %s instances (%.2f %%) are in these training rows",
                report.name,
                f"{report.num_contaminated:,}",
                f"{report.num_instances:,}",
                100 * report.share,
            )
    if merged.num_oversized_terms:
        logger.warning(
            "%s turns hold a term above 32,766 bytes (text without a space or common punctuation): searched all the "
            "same, but the reference refuses them",
            f"{merged.num_oversized_terms:,}",
        )


contamination = Stage(
    name="contamination",
    version=3,
    config=ContaminationStageConfig,
    inputs=ContaminationInputs,
    outputs=ContaminationOutputs,
    function=check_contamination,
    keeps_rows=True,
)
