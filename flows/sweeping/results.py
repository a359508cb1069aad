"""From the cells of a sweep to its page, its table and its answer."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from pydantic import ValidationError

from smoltulu.artifacts.files import private_folder, write_atomically, write_synced
from smoltulu.flows.reporting import now
from smoltulu.flows.sweeping.gather import Gathered, gather
from smoltulu.flows.sweeping.recommending import recommended, unit_of
from smoltulu.flows.sweeping.selection_results import ARM_COLUMNS, arm_rows, experiment_of
from smoltulu.flows.sweeping.states import State
from smoltulu.flows.sweeping.table import OPTIMUM_COLUMNS, SUFFIXES, cell_rows, optimum_rows, table_bytes
from smoltulu.schemas.common import StrictModel
from smoltulu.schemas.recommendation import Recommendation
from smoltulu.schemas.sweep import SweepSettings, SweptTask
from smoltulu.tasks.selection_experiment import verdict as verdict_module
from smoltulu.tasks.selection_experiment.page import draw_experiment, experiment_page
from smoltulu.tasks.surface import analysis as analysis_module
from smoltulu.tasks.surface.analysis import Analysis
from smoltulu.tasks.surface.figures import Labels
from smoltulu.tasks.surface.page import CellRow, DrawnFigure, draw_all, sweep_page
from smoltulu.tasks.surface.words import claim_text, reasons, sentence, slope_texts

PAGE, TURNING = "report.html", "turning.html"
_WRITTEN = "page.json"
_MAX_FAILURES = 40
#: Reasons of a verdict that are said in words; the page has all.
_NUM_REASONS = 4


class _Written(StrictModel):
    """What the page was made from, and what it says."""

    stamp: str
    words: tuple[str, ...]


def up_to_date_page(sweep: SweepSettings, store_root: Path) -> tuple[Path, list[str]]:
    """The page, and its verdicts in words. Both are made anew only where a cell, a score or this program changed.

    Errors: `write_page`.
    """
    found = gather(sweep, store_root)
    stamp, record = _stamp(found), found.folder / _WRITTEN
    with contextlib.suppress(OSError, ValueError, ValidationError):
        written = _Written.model_validate_json(record.read_bytes())
        if written.stamp == stamp and (found.folder / PAGE).is_file():
            return found.folder / PAGE, list(written.words)
    return _write(found, stamp)


def write_page(sweep: SweepSettings, store_root: Path) -> tuple[Path, list[str]]:
    """Write `report.html` with its figures (SVG, PDF) and its tables (Parquet, CSV) into the sweep's folder.

    Where plotly is installed, also `turning.html`, whose surfaces can be turned. Returns the page and its verdicts.

    Raises:
        ValueError: the sweep was never run in this store, or cells have scores that do not belong together.
    """
    found = gather(sweep, store_root)
    return _write(found, _stamp(found))


def _write(found: Gathered, stamp: str) -> tuple[Path, list[str]]:
    words = _write_experiment(found) if found.sweep.kind == "selection" else _write_surface(found)
    # Last: what is on record is on the page.
    write_atomically(found.folder / _WRITTEN, _Written(stamp=stamp, words=tuple(words)).model_dump_json())
    return found.folder / PAGE, words


def _write_surface(found: Gathered) -> list[str]:
    sweep = found.sweep
    analyses = found.analyses()
    rows = cell_rows(found)
    folder = found.folder
    for suffix in SUFFIXES:
        _replace(folder / f"cells{suffix}", table_bytes(rows, suffix))
        _replace(folder / f"optima{suffix}", table_bytes(optimum_rows(found, analyses), suffix, OPTIMUM_COLUMNS))
    sizes = {math.log2(one.num_parameters or 1): name for name, one in sweep.sizes.items()}
    labels = Labels(sizes, unit_of(sweep))
    drawn = draw_all(analyses, labels)
    _write_figures(folder / "figures", drawn)
    turning = _write_turning(folder / TURNING, analyses, labels)
    notes = list(found.notes)
    try:
        answer = recommended(sweep, analyses, None) if analyses else None
    except ValueError as error:
        answer = None
        notes.append(f"no place can be recommended: {error}")
    page = sweep_page(
        name=sweep.name,
        facts=_facts(found),
        is_scan=sweep.kind == "scan",
        description=sweep.description,
        notes=notes,
        analyses=analyses,
        drawn=drawn,
        recommendation=answer,
        scores=[score_name(task) for task in sweep.tasks],
        rows=_page_rows(found, rows),
        failures=_failures(found),
        files=[f"{name}{suffix}" for name in ("cells", "optima") for suffix in SUFFIXES],
        turning=turning,
        written_at=now(),
    )
    write_atomically(folder / PAGE, page)
    return [line for analysis in analyses for line in verdict_lines(analysis)]


def _write_experiment(found: Gathered) -> list[str]:
    """The page of a sweep of kind `selection`."""
    sweep, folder = found.sweep, found.folder
    rows = cell_rows(found)
    experiment = experiment_of(found)
    for suffix in SUFFIXES:
        _replace(folder / f"cells{suffix}", table_bytes(rows, suffix))
        _replace(folder / f"arms{suffix}", table_bytes(arm_rows(experiment), suffix, ARM_COLUMNS))
    drawn = draw_experiment([(one.name, one.rows) for one in experiment.settings], experiment.roles, experiment.classes)
    _write_figures(folder / "figures", drawn)
    page = experiment_page(
        name=sweep.name,
        description=sweep.description,
        facts=_facts(found),
        notes=found.notes,
        roles=experiment.roles,
        classes=experiment.classes,
        judged=experiment.judged,
        num_tests=experiment.num_tests,
        settings=[one.shown() for one in experiment.settings],
        drawn=drawn,
        scores=[score_name(task) for task in sweep.tasks],
        rows=_page_rows(found, rows),
        failures=_failures(found),
        files=[f"{name}{suffix}" for name in ("arms", "cells") for suffix in SUFFIXES],
        written_at=now(),
    )
    write_atomically(folder / PAGE, page)
    return experiment.lines()


def _failures(found: Gathered) -> list[tuple[str, str]]:
    ended = [cell for cell in found.cells if cell.state in ("failed", "diverged")]
    told = [(f"{cell.place.name}: {cell.state}", cell.message) for cell in ended[:_MAX_FAILURES]]
    if len(ended) > _MAX_FAILURES:
        told.append((f"and {len(ended) - _MAX_FAILURES} more", "the table has them all"))
    return told


def verdict_lines(analysis: Analysis) -> list[str]:
    """What is said of every class of an arm, why where nothing is identified, and of the claim about classes."""
    lines = []
    arm = "" if analysis.arm == "main" else f"arm {analysis.arm}, "
    for one in analysis.classes:
        slopes = "; ".join(f"{what.partition(',')[0]} {value}" for what, value in slope_texts(one.said))
        lines.append(f"verdict   {arm}{sentence(one.name, one.said)}{f' {slopes}' if slopes else ''}")
        lines += [f"            {reason}" for reason in reasons(one.said)[:_NUM_REASONS]]
    return lines + [f"claim     {arm}{claim_text(test)}" for test in analysis.claims]


def _stamp(found: Gathered) -> str:
    """What a page is made from: the sweep, its cells and their scores, and the code that judges and draws them."""
    digest = hashlib.sha256(found.sweep.model_dump_json().encode())
    for cell in found.cells:
        digest.update(repr((cell.place.name, cell.block, cell.state, cell.message)).encode())
    digest.update(repr(found.notes).encode())
    for arm, scores in found.scores.items():
        for one in scores:
            digest.update(f"{arm} {one.task.task} {one.task.metric} {one.cells.items.shape}".encode())
            digest.update(np.ascontiguousarray(one.cells.items).data)
    for module in (__file__, analysis_module.__file__, verdict_module.__file__):
        folder = Path(module).parent
        for file in sorted(folder.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def export_table(sweep: SweepSettings, store_root: Path, file: Path) -> int:
    """Write a row for every cell and task, as Parquet or CSV by the file's suffix. Returns the number of rows.

    Raises:
        ValueError: another suffix, no such folder, a sweep that was never run.
    """
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{file.name}: a table is written as {' or '.join(SUFFIXES)}; give the file one of these suffixes"
        )
    if not file.parent.is_dir():
        raise ValueError(f"there is no folder {file.parent}; make it first")
    rows = cell_rows(gather(sweep, store_root))
    _replace(file, table_bytes(rows, suffix))
    return len(rows)


def recommend(sweep: SweepSettings, store_root: Path, weights: dict[str, float] | None = None) -> Recommendation:
    """The best place for each task class and for all of them; with `weights` (of tasks or classes) for these first.

    Raises:
        ValueError: no cell has scores yet; weights of what is neither a task nor a class, below 0, or all 0; a sweep
            that compares chosen rows.
    """
    if sweep.kind == "selection":
        raise ValueError(f"sweep {sweep.name} compares chosen rows at one place; its page says what they are worth")
    analyses = gather(sweep, store_root).analyses()
    if not analyses:
        raise ValueError(f"sweep {sweep.name}: no cell has scores yet; run it first")
    return recommended(sweep, analyses, weights)


def score_name(task: SweptTask) -> str:
    """`gsm8k, bits_per_byte`."""
    return f"{task.task}, {task.metric.removesuffix(',none')}"


def _replace(file: Path, data: bytes) -> None:
    """Replace a file by one rename."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    write_synced(temporary, data)
    temporary.replace(file)


def _write_figures(folder: Path, drawn: Sequence[DrawnFigure]) -> None:
    """Files of the figures; those of a page before that it has no more are removed."""
    private_folder(folder)
    kept = set()
    for one in drawn:
        for number, panel in enumerate(one.panels):
            name = f"{one.file}-{number}.svg"
            _replace(folder / name, ('<?xml version="1.0" encoding="utf-8"?>\n' + panel).encode())
            kept.add(name)
        _replace(folder / f"{one.file}.pdf", one.pdf)
        kept.add(f"{one.file}.pdf")
    for old in [*folder.glob("[0-9][0-9]-*.svg"), *folder.glob("[0-9][0-9]-*.pdf")]:
        if old.name not in kept:
            old.unlink(missing_ok=True)


def _write_turning(file: Path, analyses: Sequence[Analysis], labels: Labels) -> str:
    """The page to turn, where plotly is installed. Returns its name, empty where there is none."""
    from smoltulu.tasks.surface.turning import turning_page

    page = turning_page(analyses, labels)
    if page is None:
        file.unlink(missing_ok=True)  # of another time, with other cells
        return ""
    write_atomically(file, page)
    return file.name


def _facts(found: Gathered) -> list[tuple[str, str]]:
    sweep = found.sweep
    counts = Counter(cell.state for cell in found.cells)
    budgets = sorted({cell.place.max_tokens for cell in found.cells})
    unit = unit_of(sweep)
    seeds = {cell.place.seed for cell in found.cells}
    return [
        ("recipe", sweep.recipe),
        ("stage", sweep.stage),
        ("kind", sweep.kind),
        ("cells", ", ".join(f"{counts[state]:,} {state}" for state in get_args(State) if counts[state]) or "none"),
        (f"budgets, {unit}", ", ".join(f"{budget:,}" for budget in budgets)),
        ("seeds", f"{len(seeds)}"),
        ("sizes", ", ".join(sweep.sizes)),
        ("arms", ", ".join(sweep.arms)),
        ("scores", f"{len(sweep.tasks)}"),
    ]


def _page_rows(found: Gathered, rows: Sequence[Mapping[str, Any]]) -> list[CellRow]:
    num_tasks = len(found.sweep.tasks)
    made = []
    for number, cell in enumerate(found.cells):
        own = rows[number * num_tasks : (number + 1) * num_tasks]
        scores = tuple("–" if row["mean"] is None else f"{row['mean']:.4g}" for row in own)
        place = cell.place
        made.append(
            CellRow(
                place.name, cell.state, place.learning_rate, place.effective_batch_size,
                own[0]["effective_batch_tokens"], place.max_tokens, place.seed, place.size, place.arm, cell.block,
                scores, cell.message,
            )
        )  # fmt: skip
    return made
