"""From the cells of a sweep to its page, its table and its answer."""

from __future__ import annotations

from pathlib import Path

from smoltulu.schemas.recommendation import Recommendation
from smoltulu.schemas.sweep import SweepSettings


def write_page(sweep: SweepSettings, store_root: Path) -> Path:
    """Write `report.html` with its figures (SVG, PDF) and its table (Parquet, CSV) into the sweep's folder.

    Returns the page.

    Raises:
        ValueError: the sweep was never run in this store, or cells have scores that do not belong together.
    """
    raise NotImplementedError


def export_table(sweep: SweepSettings, store_root: Path, file: Path) -> int:
    """Write a row for every cell and task, as Parquet or CSV by the file's suffix. Returns the number of rows.

    Raises:
        ValueError: another suffix, no such folder, a sweep that was never run.
    """
    raise NotImplementedError


def recommend(sweep: SweepSettings, store_root: Path, weights: dict[str, float] | None = None) -> Recommendation:
    """The best place for each task class and for all of them; with `weights` (of tasks or classes) for these first.

    Raises:
        ValueError: no cell has scores yet; weights of what is neither a task nor a class, below 0, or all 0.
    """
    raise NotImplementedError
