"""Scores of finished cells as arrays: the same items in every cell, larger is better."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from smoltulu.artifacts import layout
from smoltulu.artifacts.store import read_manifest
from smoltulu.flows.sweeping.states import CellRecord, CellState
from smoltulu.schemas.evaluation import EvaluationOutputs, Score
from smoltulu.schemas.sweep import SweepSettings, SweptTask
from smoltulu.tasks.comparison.evaluations import Measured, is_up, item_name, measured, score_names
from smoltulu.tasks.evaluation.samples import read_columns
from smoltulu.tasks.evaluation.stage import evaluation
from smoltulu.tasks.surface.optimum import Cells

if TYPE_CHECKING:
    import pyarrow as pa

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TaskScores:
    """One score of every cell that ended.

    cells   for the analysis: larger is better, so bits per byte are negative there
    means   (num_cells,) as the score is spelt; nan where a cell diverged
    of      the cells, in the same order
    items   names, in the order of the columns of `cells.items`; () where they are not from evaluations
    """

    task: SweptTask
    cells: Cells
    means: NDArray[np.float64]
    of: tuple[CellRecord, ...]
    items: tuple[str, ...] = ()


def load_scores(
    sweep: SweepSettings, store_root: Path, states: Sequence[CellState], arm: str = "main"
) -> list[TaskScores]:
    """Scores of the cells of one arm that are done or diverged.

    Raises:
        ValueError: nothing ended; a score that an evaluation lacks; other items in two cells; a model that is another
            by now.
    """
    ended = [one for one in states if one.cell.place.arm == arm and one.state in ("done", "diverged")]
    done = [one.cell for one in ended if one.state == "done"]
    if not done:
        raise ValueError(f"sweep {sweep.name}: no cell of arm {arm} has scores yet; run it first")
    of_cell = {cell.evaluation: _scored(store_root, cell, sweep.tasks) for cell in done}
    sizes = {name: math.log2(size.num_parameters or 1) for name, size in sweep.sizes.items()}
    made = []
    for task in sweep.tasks:
        scored = [of_cell[cell.evaluation][task] for cell in done]
        values, names = iter(_same_items(sweep, task, done, scored)), tuple(sorted(scored[0].item_names()))
        num_items = len(of_cell[done[0].evaluation][task].values)
        sign = -1.0 if task.lower_is_better else 1.0
        rows = [sign * next(values) if one.state == "done" else np.full(num_items, np.nan) for one in ended]
        places = [one.cell.place for one in ended]
        cells = Cells(
            log2_lr=np.array([place.log2_learning_rate for place in places]),
            log2_batch=np.array([place.log2_batch for place in places]),
            log2_tokens=np.log2([place.max_tokens for place in places]),
            log2_size=np.array([sizes[place.size] for place in places]),
            seed=np.array([place.seed for place in places]),
            diverged=np.array([one.state == "diverged" for one in ended]),
            items=np.array(rows),
        )
        of = tuple(one.cell for one in ended)
        made.append(TaskScores(task, cells, sign * cells.items.mean(axis=1), of, names))
    return made


@dataclass(frozen=True)
class _Scored:
    """One score of one cell, a value an item.

    rows   the columns that name the items, where the values were read as columns
    names  of the items, where they were not
    """

    values: Floats
    rows: pa.Table | None = None
    names: tuple[str, ...] = ()

    def item_names(self) -> tuple[str, ...]:
        """As `tasks.comparison` calls them."""
        if self.rows is None:
            return self.names
        seen = Counter[tuple[str, str]]()
        return tuple(
            item_name({name: value for name, value in row.items() if value is not None}, "", seen)
            for row in self.rows.to_pylist()
        )


def _same_items(
    sweep: SweepSettings, task: SweptTask, cells: Sequence[CellRecord], scored: Sequence[_Scored]
) -> Floats:
    """(num_cells, num_items), items in the order of their names. ValueError: other items in two cells."""
    first = scored[0]
    names = first.item_names()
    order = sorted(range(len(names)), key=names.__getitem__)
    made = []
    for cell, one in zip(cells, scored, strict=True):
        if first.rows is not None and one.rows is not None and one.rows.equals(first.rows):
            made.append(one.values[order])
            continue
        own = dict(zip(one.item_names(), one.values, strict=True))
        if own.keys() != set(names):
            raise ValueError(
                f"sweep {sweep.name}: cells {cells[0].place.name} and {cell.place.name} have other items of "
                f"{task.task}; evaluate both with the same data"
            )
        made.append(np.array([own[names[number]] for number in order]))
    return np.array(made)


def _scored(store_root: Path, cell: CellRecord, tasks: Sequence[SweptTask]) -> dict[SweptTask, _Scored]:
    """What a sweep asks for of one cell. ValueError as `load_scores`."""
    folder, outputs = _evaluation(store_root, cell)
    names = score_names(outputs)
    for task in tasks:
        if task.task in names:
            _check_direction(cell, task, outputs.scores[names.index(task.task)])
        else:
            there = ", ".join(sorted(set(names))) or "none"
            raise ValueError(
                f"cell {cell.place.name} was not measured on {task.task!r}; it has {there}. Name one of these in "
                "tasks, or add it to the recipe's evaluation and run again: nothing is trained"
            )
    found = _from_columns(folder, outputs, names, tasks)
    if missing := [task for task in tasks if task not in found]:
        items = measured(folder, outputs, texts=False)
        for task in missing:
            values = _values(items[task.task], task, cell)
            found[task] = _Scored(np.array(list(values.values())), names=tuple(values))
    return found


def _check_direction(cell: CellRecord, task: SweptTask, score: Score) -> None:
    """ValueError where the score says of itself that it is better when lower, and the sweep does not."""
    if task.metric == score.metric and not task.lower_is_better and not is_up(score):
        raise ValueError(
            f"cell {cell.place.name}, {task.task}: {task.metric} is better when it is lower; set lower_is_better: true "
            "in the sweep's tasks"
        )


def _filter_of(task: SweptTask, headline: str) -> str:
    """The filter of the score that is asked for; that of the headline where it names none (`none`, or nothing)."""
    asked = task.metric.partition(",")[2]
    return headline.partition(",")[2] if asked in ("", "none") else asked


def _from_columns(
    folder: Path, outputs: EvaluationOutputs, names: list[str], tasks: Sequence[SweptTask]
) -> dict[SweptTask, _Scored]:
    """Scores whose values stand in the columns of the samples, which are read in half the time of rows.

    Left out are those that do not: older files, measurements of our own, metrics of several parts.
    """
    if outputs.samples_file is None or not outputs.samples_file.endswith(".parquet"):
        return {}
    table = read_columns(
        folder / outputs.samples_file, ["task", "id", "doc_hash", "target_hash", "filter", "entry", "metrics", "others"]
    ).combine_chunks()
    if not table.num_rows or table["entry"].null_count:
        return {}
    entry = table["entry"].to_numpy()
    of_filter = np.array(table["filter"].to_pylist(), dtype=object)
    has_none = np.array(table["filter"].is_null())
    has_more = ~np.array(table["others"].is_null())
    metrics = table["metrics"].chunk(0)
    keys = np.array(metrics.keys.to_pylist(), dtype=object)
    row_of = np.repeat(np.arange(table.num_rows), np.diff(metrics.offsets.to_numpy()))
    values = metrics.items.to_numpy(zero_copy_only=False)
    found = {}
    for task in tasks:
        number = names.index(task.task)
        wanted = _filter_of(task, outputs.scores[number].metric)
        here = (entry == number) & (has_none | (of_filter == wanted))
        is_metric = keys == task.metric.partition(",")[0]
        rows = row_of[is_metric]
        of_row = np.full(table.num_rows, np.nan)
        of_row[rows] = values[is_metric]
        is_whole = here.any() and not has_more[here].any() and np.isfinite(of_row[here]).all()
        if is_whole and here[rows].sum() == here.sum():
            columns = table.select(["task", "id", "doc_hash", "target_hash"]).filter(_mask(here))
            found[task] = _Scored(of_row[here], columns)
    return found


def _mask(here: NDArray[np.bool_]) -> Any:
    import pyarrow as pa

    return pa.array(here.tolist())


def _evaluation(store_root: Path, cell: CellRecord) -> tuple[Path, EvaluationOutputs]:
    """The folder of a cell's scores, and what its evaluation says. ValueError: gone, or of another model."""
    folder = layout.key_path(store_root, evaluation.name, cell.evaluation)
    pointer = layout.read_pointer(folder)
    if pointer is None:
        raise ValueError(f"the scores of cell {cell.place.name} are gone ({folder}); run the sweep again")
    manifest = read_manifest(folder / pointer.name)
    of_training = layout.key_path(store_root, cell.stage, cell.training)
    model, taken = layout.read_pointer(of_training), manifest.inputs.get("model")
    if model is not None and taken is not None and read_manifest(of_training / model.name).digest != taken.digest:
        raise ValueError(
            f"the scores of cell {cell.place.name} are those of a model that was trained again since ({folder}); run "
            "the sweep again"
        )
    return folder / pointer.name, EvaluationOutputs.model_validate(manifest.outputs)


def _values(one: Measured, task: SweptTask, cell: CellRecord) -> dict[str, float]:
    """Item -> value of the score that the sweep asks for, which need not be the headline."""
    headline = one.score.metric
    if (wanted := _filter_of(task, headline)) != headline.partition(",")[2]:
        raise ValueError(
            f"cell {cell.place.name}, {task.task}: no items of {task.metric} were kept by filter {wanted!r}; its "
            f"headline is {headline}. Name a score with a filter that was measured"
        )
    if task.metric == headline:
        return {name: item.value for name, item in one.items.items()}
    metric = task.metric.partition(",")[0]
    values = {}
    for name, item in one.items.items():
        value = item.row.get("metrics", {}).get(metric)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            there = ", ".join(sorted(item.row.get("metrics", {}))) or "none"
            raise ValueError(f"cell {cell.place.name}, {task.task}: an item has no {metric!r}; its metrics are {there}")
        values[name] = float(value)
    return values
