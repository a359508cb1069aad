"""Stage `dataset`: read every source of a set, normalise its rows, count what is malformed, refuse too much of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smoltulu.schemas.data import DatasetInputs, DatasetOutputs, DatasetStageConfig, DataSource, SourceReport
from smoltulu.tasks.data.formats import SourceCounts, check_source
from smoltulu.tasks.data.json_rows import Lines
from smoltulu.tasks.data.plain import ahead, fits
from smoltulu.tasks.data.rows_writer import RowsWriter
from smoltulu.tasks.data.sources import read_blocks, read_rows
from smoltulu.tasks.limits import num_cores
from smoltulu.tasks.stage import Stage, StageContext

logger = logging.getLogger("smoltulu")

_ROWS_PER_REPORT = 2_000


def build_dataset(
    config: DatasetStageConfig, inputs: DatasetInputs, context: StageContext
) -> tuple[DatasetOutputs, dict[str, float]]:
    """Write `rows.parquet` (normalised rows, in the order of the sources).

    An id is `<source index>:<row index in the source>`, malformed rows counted in, so a dropped row renames no other.

    Raises:
        ValueError: a source cannot be read, has no row, or holds more malformed rows than `max_malformed_share`
            allows; or nothing is left. No rows file is there then.
    """
    sources = config.data.sources
    for source in sources:
        check_source(source, config.kind)
    # Under another name until every source is accepted.
    partial = context.folder / "rows.partial"
    reports: list[SourceReport] = []
    try:
        with RowsWriter(partial, config.kind) as output:
            for index, source in enumerate(sources):
                context.report(index, len(sources))
                reports.append(_write_source(index, source, len(sources), inputs, output, context))
                _say(reports[-1])
        context.report(len(sources), len(sources))
        _accept(reports, config.data.max_malformed_share)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    outputs = DatasetOutputs(
        kind=config.kind,
        num_rows=sum(_num_left(report) for report in reports),
        sources=tuple(reports),
    )
    partial.rename(context.folder / outputs.file)
    num_malformed = sum(report.num_malformed for report in reports)
    return outputs, {"num_rows": float(outputs.num_rows), "num_malformed": float(num_malformed)}


def _write_source(
    index: int, source: DataSource, num_sources: int, inputs: DatasetInputs, output: RowsWriter, context: StageContext
) -> SourceReport:
    started = time.monotonic()
    counts = SourceCounts(source)
    world = Path(inputs.world) if inputs.world else None
    read = (source, world, context.externals.get(f"data.{index}"), inputs.sampled)

    def report() -> None:
        speed = counts.num_rows / max(time.monotonic() - started, 1e-9)
        context.report(index, num_sources, num_rows=float(counts.num_rows), rows_per_second=speed)

    def write(rows: Iterable[Any]) -> None:
        for place, normalised in counts.normalised(rows, counts.num_rows):
            output.write({"id": f"{index}:{place}", **normalised})
            if counts.num_rows % _ROWS_PER_REPORT == 0:
                report()

    if not fits(source):
        write(read_rows(*read))
        return counts.report()
    for block, plain in ahead(read_blocks(*read), source, context.compute.num_threads or num_cores()):
        if plain is None:
            write(block.rows() if isinstance(block, Lines) else block)
            continue
        counts.count_plain(0, plain.unread)
        for run in plain.runs:
            if isinstance(run, list):
                write(run)
            else:
                output.write_plain(f"{index}:", counts.num_rows, run)
                counts.count_plain(len(run), {})
        report()
    return counts.report()


def _say(report: SourceReport) -> None:
    """Log what is not in the normalised rows of a source, although nothing is wrong."""
    for word, counts in (("dropped", report.dropped), ("noticed", report.noticed), ("ignored", report.ignored)):
        for what, number in counts.items():
            if word == "ignored" and not number:
                logger.warning("%s: ignore names %r, which no row has", report.label, what)
            else:
                logger.info("%s: %s: %s: %s rows", report.label, word, what, f"{number:,}")
    if report.unread:
        some = ", ".join(list(report.unread)[:20]) + (", …" if len(report.unread) > 20 else "")
        logger.info("%s: no field reads: %s", report.label, some)


def _num_left(report: SourceReport) -> int:
    """Rows that are neither malformed nor dropped. Two KTO rows are one pair: those that are left are counted apart."""
    return report.num_rows - report.num_malformed - report.num_dropped - report.num_merged


def _said_of_dropped(report: SourceReport) -> str:
    return "".join(f"; {report.label}: {reason}: {number:,} rows" for reason, number in report.dropped.items())


def _said_of_malformed(report: SourceReport, allowed: str) -> str:
    share = report.num_malformed / report.num_rows
    reasons = "; ".join(f"{reason}: {number}" for reason, number in report.reasons.items())
    return (
        f"{report.label}: {report.num_malformed} of {report.num_rows} rows are malformed ({share:.2%}){allowed}. "
        f"Reasons: {reasons}. First examples:\n  " + "\n  ".join(report.examples)
    )


def _accept(reports: list[SourceReport], max_malformed_share: float) -> None:
    """Check every source by itself: a small one that is all malformed must not hide behind a large one.

    That also bounds the share of the whole set, which is a weighted mean of theirs.
    """
    problems = []
    for report in reports:
        if report.num_rows == 0:
            problems.append(f"{report.label}: no rows at all; check the file, the split or `limit`")
        elif report.num_malformed > max_malformed_share * report.num_rows:
            allowed = f", allowed are {max_malformed_share:.2%} (max_malformed_share)"
            problems.append(_said_of_malformed(report, allowed))
    if not problems and not any(map(_num_left, reports)):
        problems.append("no row is left: all are malformed, or dropped" + "".join(map(_said_of_dropped, reports)))
        problems += [_said_of_malformed(report, "") for report in reports if report.num_malformed]
    if problems:
        raise ValueError(
            "the data cannot be used:\n" + "\n".join(problems) + "\nMend `format` and `fields`, or the data."
        )


dataset = Stage(
    name="dataset",
    version=3,
    reencodes=2,
    config=DatasetStageConfig,
    inputs=DatasetInputs,
    outputs=DatasetOutputs,
    function=build_dataset,
    block="data",
)
