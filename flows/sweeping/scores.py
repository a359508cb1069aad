"""Scores of finished cells as arrays: the same items in every cell, larger is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smoltulu.artifacts import layout
from smoltulu.artifacts.store import read_manifest
from smoltulu.flows.sweeping.states import CellRecord, CellState
from smoltulu.schemas.evaluation import EvaluationOutputs
from smoltulu.schemas.sweep import SweepSettings, SweptTask
from smoltulu.tasks.comparison.evaluations import Measured, measured
from smoltulu.tasks.evaluation.stage import evaluation
from smoltulu.tasks.surface.optimum import Cells


@dataclass(frozen=True)
class TaskScores:
    """One score of every cell that ended.

    cells   for the analysis: larger is better, so bits per byte are negative there
    means   (num_cells,) as the score is spelt; nan where a cell diverged
    of      the cells, in the same order
    """

    task: SweptTask
    cells: Cells
    means: NDArray[np.float64]
    of: tuple[CellRecord, ...]


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
    of_cell = {cell.evaluation: _measured(store_root, cell) for cell in done}
    sizes = {name: math.log2(size.num_parameters or 1) for name, size in sweep.sizes.items()}
    made = []
    for task in sweep.tasks:
        items: dict[str, dict[str, float]] = {}
        for cell in done:
            one = of_cell[cell.evaluation].get(task.task)
            if one is None:
                there = ", ".join(sorted(of_cell[cell.evaluation])) or "none"
                raise ValueError(
                    f"sweep {sweep.name}: cell {cell.place.name} was not measured on {task.task!r}; it has {there}. "
                    "Name one of these in tasks, or add it to the recipe's evaluation and run again: nothing is trained"
                )
            items[cell.evaluation] = _values(one, task, cell)
        names = sorted(items[done[0].evaluation])
        for cell in done:
            if sorted(items[cell.evaluation]) != names:
                raise ValueError(
                    f"sweep {sweep.name}: cells {done[0].place.name} and {cell.place.name} have other items of "
                    f"{task.task}; evaluate both with the same data"
                )
        sign = -1.0 if task.lower_is_better else 1.0
        rows = [
            [sign * items[one.cell.evaluation][name] for name in names]
            if one.state == "done"
            else [math.nan] * len(names)
            for one in ended
        ]
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
        made.append(TaskScores(task, cells, sign * cells.items.mean(axis=1), tuple(one.cell for one in ended)))
    return made


def _measured(store_root: Path, cell: CellRecord) -> dict[str, Measured]:
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
    return measured(folder / pointer.name, EvaluationOutputs.model_validate(manifest.outputs))


def _values(one: Measured, task: SweptTask, cell: CellRecord) -> dict[str, float]:
    """Item -> value of the score that the sweep asks for, which need not be the headline."""
    if task.metric == one.score.metric:
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
