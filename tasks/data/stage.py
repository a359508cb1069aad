"""Stage `dataset`: read every source of a set, normalise its rows, count what is malformed, refuse too much of it."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from smoltulu.schemas.data import DatasetInputs, DatasetOutputs, DatasetStageConfig, DataSource, SourceReport
from smoltulu.tasks.data.formats import MalformedRow, adapt, check_source
from smoltulu.tasks.data.rows import RowsWriter
from smoltulu.tasks.data.sources import read_rows
from smoltulu.tasks.stage import Stage, StageContext

_NUM_EXAMPLES = 5
_EXAMPLE_CHARACTERS = 200
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
        context.report(len(sources), len(sources))
        _accept(reports, config.data.max_malformed_share)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    outputs = DatasetOutputs(
        kind=config.kind,
        num_rows=sum(report.num_rows - report.num_malformed for report in reports),
        sources=tuple(reports),
    )
    partial.rename(context.folder / outputs.file)
    num_malformed = sum(report.num_malformed for report in reports)
    return outputs, {"num_rows": float(outputs.num_rows), "num_malformed": float(num_malformed)}


def _write_source(
    index: int, source: DataSource, num_sources: int, inputs: DatasetInputs, output: RowsWriter, context: StageContext
) -> SourceReport:
    started = time.monotonic()
    num_rows = 0
    reasons: Counter[str] = Counter()
    examples: list[str] = []
    world = Path(inputs.world) if inputs.world else None
    rows = read_rows(source, world, context.externals.get(f"data.{index}"), inputs.sampled)
    for row_index, row in enumerate(rows):
        num_rows += 1
        try:
            normalised = adapt(row, source)
        except MalformedRow as error:
            reasons[str(error)] += 1
            if len(examples) < _NUM_EXAMPLES:
                examples.append(f"row {row_index}: {error}: {_shortened(row)}")
            continue
        output.write({"id": f"{index}:{row_index}", **normalised})
        if num_rows % _ROWS_PER_REPORT == 0:
            speed = num_rows / max(time.monotonic() - started, 1e-9)
            context.report(index, num_sources, num_rows=float(num_rows), rows_per_second=speed)
    return SourceReport(
        label=source.label,
        num_rows=num_rows,
        num_malformed=reasons.total(),
        reasons=dict(reasons.most_common()),
        examples=tuple(examples),
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
            share = report.num_malformed / report.num_rows
            reasons = "; ".join(f"{reason}: {number}" for reason, number in report.reasons.items())
            problems.append(
                f"{report.label}: {report.num_malformed} of {report.num_rows} rows are malformed ({share:.2%}), "
                f"allowed are {max_malformed_share:.2%} (max_malformed_share). Reasons: {reasons}. First examples:\n  "
                + "\n  ".join(report.examples)
            )
    if not problems and all(report.num_rows == report.num_malformed for report in reports):
        problems.append("no row is left: all are malformed")
    if problems:
        raise ValueError(
            "the data cannot be used:\n" + "\n".join(problems) + "\nMend `format` and `fields`, or the data."
        )


def _shortened(row: Any) -> str:
    # ascii, so that a lone surrogate can be shown; default=str, because parquet cells may be dates.
    text = json.dumps(row, ensure_ascii=True, default=str)
    return text if len(text) <= _EXAMPLE_CHARACTERS else text[: _EXAMPLE_CHARACTERS - 1] + "…"


dataset = Stage(
    name="dataset",
    version=2,
    reencodes=1,
    config=DatasetStageConfig,
    inputs=DatasetInputs,
    outputs=DatasetOutputs,
    function=build_dataset,
    block="data",
)
