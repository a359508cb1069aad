"""From the cells of a sweep to its page, its table and its answer."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from smoltulu.artifacts.files import private_folder, write_atomically, write_synced
from smoltulu.flows.reporting import now
from smoltulu.flows.sweeping.gather import Gathered, gather
from smoltulu.flows.sweeping.recommending import recommended, unit_of
from smoltulu.flows.sweeping.states import State
from smoltulu.flows.sweeping.table import SUFFIXES, cell_rows, optimum_rows, table_bytes
from smoltulu.schemas.recommendation import Recommendation
from smoltulu.schemas.sweep import SweepSettings, SweptTask
from smoltulu.tasks.surface.analysis import Analysis
from smoltulu.tasks.surface.figures import Labels
from smoltulu.tasks.surface.page import CellRow, DrawnFigure, draw_all, sweep_page

PAGE, TURNING = "report.html", "turning.html"
_MAX_FAILURES = 40


def write_page(sweep: SweepSettings, store_root: Path) -> Path:
    """Write `report.html` with its figures (SVG, PDF) and its tables (Parquet, CSV) into the sweep's folder.

    Where plotly is installed, also `turning.html`, whose surfaces can be turned. Returns the page.

    Raises:
        ValueError: the sweep was never run in this store, or cells have scores that do not belong together.
    """
    found = gather(sweep, store_root)
    analyses = found.analyses()
    rows = cell_rows(found)
    folder = found.folder
    for suffix in SUFFIXES:
        _replace(folder / f"cells{suffix}", table_bytes(rows, suffix))
        _replace(folder / f"optima{suffix}", table_bytes(optimum_rows(found, analyses), suffix, of_optima=True))
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
    ended = [cell for cell in found.cells if cell.state in ("failed", "diverged")]
    failures = [(f"{cell.place.name}: {cell.state}", cell.message) for cell in ended[:_MAX_FAILURES]]
    if len(ended) > _MAX_FAILURES:
        failures.append((f"and {len(ended) - _MAX_FAILURES} more", "the table has them all"))
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
        failures=failures,
        files=[f"{name}{suffix}" for name in ("cells", "optima") for suffix in SUFFIXES],
        turning=turning,
        written_at=now(),
    )
    write_atomically(folder / PAGE, page)
    return folder / PAGE


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
        ValueError: no cell has scores yet; weights of what is neither a task nor a class, below 0, or all 0.
    """
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
