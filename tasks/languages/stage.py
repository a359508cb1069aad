"""Stage `languages`: the share of rows in each language, and of rows that have none, with the reason.

The form of tables 10 to 12 of the SmolTulu paper (arXiv 2412.08347). The paper does not name its tool, so its exact
figures cannot be reproduced. docs/languages.md says what is judged here, and by what.
"""

from __future__ import annotations

import csv
import logging
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

from smoltulu.schemas.languages import (
    LANGUAGE_NAMES,
    DetectorComparison,
    LanguageInputs,
    LanguageOutputs,
    LanguageSettings,
    LanguageShare,
    LanguageStageConfig,
    Undetermined,
)
from smoltulu.tasks.data import rows as rows_file
from smoltulu.tasks.languages.compare import compare_detectors, named, spread_rows
from smoltulu.tasks.languages.detectors import Detect, detector_version, make_detector
from smoltulu.tasks.languages.prose import judge
from smoltulu.tasks.limits import num_cores
from smoltulu.tasks.process import die_with_parent
from smoltulu.tasks.report.render import render
from smoltulu.tasks.stage import Stage, StageContext

logger = logging.getLogger("smoltulu")

Verdict = tuple[str | None, Undetermined | None]  # language that was found, or the reason why there is none
JudgedRow = tuple[str, str | None, Undetermined | None]  # id and verdict

#: Starting a process and loading lingua's models takes seconds, so a process is started per so many rows.
_ROWS_PER_PROCESS = 5_000
_ROWS_PER_CHUNK = 500


def language_shares(
    config: LanguageStageConfig, inputs: LanguageInputs, context: StageContext
) -> tuple[LanguageOutputs, dict[str, float]]:
    """Write `languages.parquet` (a line per row), `languages.csv` (the table) and `languages.html` (table and chart).

    Raises:
        ValueError: the detector's package is not installed, or there is no row.
    """
    settings = config.settings
    version = detector_version(settings.detector)
    source = Path(inputs.dataset)
    num_rows = rows_file.num_rows(source)
    if num_rows == 0:
        raise ValueError(f"languages: {source} has no row to judge")

    judged: list[JudgedRow] = []
    started = time.monotonic()
    num_processes = min(context.compute.num_threads or num_cores(), 1 + num_rows // _ROWS_PER_PROCESS)
    firsts = range(0, num_rows, _ROWS_PER_CHUNK)
    for chunk in judge_chunks(source, firsts, settings, num_processes):
        judged.extend(chunk)
        context.report(len(judged), num_rows, rows_per_second=len(judged) / max(time.monotonic() - started, 1e-9))

    compared = _judge_again(source, judged, settings)
    comparison = _compare(compared, settings)
    outputs = _summarise(judged, config, version, comparison)
    _write_rows(context.folder / outputs.file, judged, settings)
    if outputs.detectors_file is not None:
        _write_compared(context.folder / outputs.detectors_file, compared, settings)
    with (context.folder / outputs.table_file).open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["language", "name", "num_rows", "share", "share_of_determined"])
        for share in outputs.shares:
            figures = (f"{share.share:.6f}", f"{share.share_of_determined:.6f}")
            writer.writerow([share.language, share.name, share.num_rows, *figures])
        if outputs.num_other:
            writer.writerow(["other", "Other", outputs.num_other, f"{outputs.num_other / num_rows:.6f}", ""])
        for reason, count in outputs.undetermined.items():
            writer.writerow(["", f"undetermined: {reason}", count, f"{count / num_rows:.6f}", ""])
    page = render("languages.html.jinja", languages=outputs)
    (context.folder / outputs.chart_file).write_text(page, encoding="utf-8")
    metrics = {
        "num_rows": float(num_rows),
        "undetermined_share": outputs.num_undetermined / num_rows,
        "other_share": outputs.num_other / num_rows,
        **{f"language_share/{share.language}": share.share for share in outputs.shares},
    }
    return outputs, metrics


def row_text(row: dict[str, Any], which: str) -> str:
    """The turns of a normalised row that are judged, joined by line feeds. Of a pair, the chosen completion."""
    messages = [message for name in ("messages", "prompt", "chosen") for message in row.get(name, ())]
    # Rows of an audit may have no turns: their text is nobody's, or anybody's.
    wanted = (message for message in messages if which == "all" or message["role"] in (which, "text"))
    return "\n".join(map(rows_file.turn_text, wanted))


def judge_text(text: str, settings: LanguageSettings, detect: Detect) -> Verdict:
    """Language of one text, or why it has none."""
    prose, reason = judge(text, settings.min_letters, settings.max_characters)
    if reason is not None:
        return None, reason
    language = detect(prose)
    return (None, "unclear") if language is None else (language, None)


# Each process judges one chunk at a time. Chunks come back in order, so the number of processes changes no result.

_worker: tuple[LanguageSettings, Detect] | None = None


def judge_chunks(
    source: Path, firsts: Iterable[int], settings: LanguageSettings, num_processes: int
) -> Iterator[list[JudgedRow]]:
    """Judge every row, in order, in `num_processes` processes. With one, this process judges.

    firsts   first row of each chunk
    """
    if num_processes == 1:
        detect = make_detector(settings)
        for first in firsts:
            yield _judge_rows(source, first, settings, detect)
        return
    # Spawned: forking a process that has threads (a Prefect worker) can hang.
    with ProcessPoolExecutor(
        num_processes, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(settings, os.getpid())
    ) as pool:
        yield from pool.map(_judge_in_worker, repeat(source), firsts)


def _start_worker(settings: LanguageSettings, parent_pid: int) -> None:
    global _worker
    die_with_parent(parent_pid)
    _worker = (settings, make_detector(settings))


def _judge_in_worker(source: Path, first: int) -> list[JudgedRow]:
    assert _worker is not None
    return _judge_rows(source, first, *_worker)


def _judge_rows(source: Path, first: int, settings: LanguageSettings, detect: Detect) -> list[JudgedRow]:
    rows = rows_file.stored_rows(source, first, _ROWS_PER_CHUNK)
    return [(row["id"], *judge_text(row_text(row, settings.text), settings, detect)) for row in rows]


def _judge_again(
    source: Path, judged: list[JudgedRow], settings: LanguageSettings
) -> list[tuple[str, str | None, str | None]]:
    """(id, language by the table's detector, language by the other one) of `compare_rows` rows."""
    if settings.compare_rows == 0:
        return []
    again = settings.model_copy(update={"detector": settings.other_detector})
    detector_version(again.detector)
    detect = make_detector(again)
    numbers = spread_rows(len(judged), settings.compare_rows)
    rows = rows_file.rows_at(source, numbers)
    return [
        (judged[number][0], judged[number][1], judge_text(row_text(rows[number], settings.text), again, detect)[0])
        for number in numbers
    ]


def _compare(
    compared: list[tuple[str, str | None, str | None]], settings: LanguageSettings
) -> DetectorComparison | None:
    if not compared:
        return None
    other = settings.other_detector
    return compare_detectors(compared, settings.languages, other, detector_version(other))


def _summarise(
    judged: list[JudgedRow], config: LanguageStageConfig, version: str, comparison: DetectorComparison | None
) -> LanguageOutputs:
    """The table: languages by number of rows, then by code, other languages, and the reasons of the rest."""
    found = Counter(language for _, language, _ in judged if language is not None)
    counts = Counter({code: count for code, count in found.items() if code in config.settings.languages})
    others = {code: count for code, count in found.items() if code not in config.settings.languages}
    reasons = Counter(reason for _, _, reason in judged if reason is not None)
    determined = counts.total()
    return LanguageOutputs(
        kind=config.kind,
        detector=config.settings.detector,
        detector_version=version,
        num_rows=len(judged),
        num_determined=determined,
        num_other=sum(others.values()),
        others=dict(sorted(others.items(), key=lambda item: (-item[1], item[0]))),
        comparison=comparison,
        detectors_file="detectors.parquet" if comparison else None,
        shares=tuple(
            LanguageShare(
                language=code,
                name=LANGUAGE_NAMES[code],
                num_rows=count,
                share=count / len(judged),
                share_of_determined=count / determined,
            )
            for code, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        ),
        undetermined=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
    )


def _write_rows(path: Path, judged: list[JudgedRow], settings: LanguageSettings) -> None:
    columns: dict[str, Sequence[str | None]] = {
        "id": [row_id for row_id, _, _ in judged],
        "language": [named(language, settings.languages) for _, language, _ in judged],
        "detected": [language for _, language, _ in judged],
        "undetermined": [reason for _, _, reason in judged],
    }
    _write_texts(path, columns)


def _write_compared(path: Path, compared: list[tuple[str, str | None, str | None]], settings: LanguageSettings) -> None:
    ids, ours, theirs = zip(*compared, strict=True)
    _write_texts(path, {"id": ids, settings.detector: ours, settings.other_detector: theirs})


def _write_texts(path: Path, columns: Mapping[str, Sequence[str | None]]) -> None:
    import pyarrow
    import pyarrow.parquet

    arrays = {name: pyarrow.array(values, pyarrow.string()) for name, values in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(arrays), path)


languages = Stage("languages", 2, LanguageStageConfig, LanguageInputs, LanguageOutputs, language_shares)
