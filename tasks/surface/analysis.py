"""All that is said of the cells of one arm: optima, slopes and words of every task and class, and the checks. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from smoltulu.schemas.sweep import SweptTask
from smoltulu.tasks.surface.accounts import (
    ACCOUNTS,
    Slopes,
    Verdict,
    fit_slopes,
    identifies_nothing,
    pooled,
    verdicts,
)
from smoltulu.tasks.surface.claim import ClassTest, Nested, best_ratio, class_claim, fewest_seeds, halves, nested_forms
from smoltulu.tasks.surface.gaussian_process import gp_optimum
from smoltulu.tasks.surface.optimum import Cells, Optima, Optimum, find_optima

Floats = NDArray[np.float64]

SCAN = "it was asked for as a scan, which has no verdict"
_FLOOR = 2.0  # standard errors over items


@dataclass(frozen=True)
class Said:
    """What slopes say.

    slopes   None where tasks have not the same ones
    words    of every account
    reasons  why they identify nothing, with what is missing; empty where they do
    """

    slopes: Slopes | None
    words: dict[str, Verdict]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class TaskAnalysis:
    """One score of one task in the cells of an arm.

    checks       optimum by a Gaussian process, of each of `found.optima`; nan where it has fewer than three rates
    is_at_floor  whether the best place is within noise of a guess
    """

    task: SweptTask
    cells: Cells
    found: Optima
    said: Said
    checks: tuple[float, ...]
    forms: tuple[Nested, ...]
    is_at_floor: bool


@dataclass(frozen=True)
class ClassAnalysis:
    """The tasks of a class together, one score of each."""

    name: str
    tasks: tuple[str, ...]
    said: Said


@dataclass(frozen=True)
class Analysis:
    """The cells of one arm."""

    arm: str
    tasks: tuple[TaskAnalysis, ...]
    classes: tuple[ClassAnalysis, ...]
    claims: tuple[ClassTest, ...]

    @property
    def units(self) -> tuple[TaskAnalysis, ...]:
        """One score of each task: the first that the sweep names. A second one is no second task."""
        return first_scores(self.tasks)


def first_scores(tasks: Iterable[TaskAnalysis]) -> tuple[TaskAnalysis, ...]:
    """Of each task the score that is named first."""
    first: dict[str, TaskAnalysis] = {}
    for one in tasks:
        first.setdefault(one.task.task, one)
    return tuple(first.values())


def analyse(
    arm: str, scores: Sequence[tuple[SweptTask, Cells]], *, is_scan: bool = False, num_resamples: int = 400
) -> Analysis:
    """Everything that is said of an arm. `scores`: tasks in the order of the sweep, all with the same cells."""
    tasks = tuple(_of_task(task, cells, is_scan, num_resamples) for task, cells in scores)
    units = first_scores(tasks)
    names = dict.fromkeys(one.task.task_class for one in units)
    classes = tuple(_of_class(name, [one for one in units if one.task.task_class == name], is_scan) for name in names)
    ratios = {one.task.task: np.nan if one.is_at_floor else best_ratio(one.found) for one in units}
    num_seeds = min((fewest_seeds(one.found) for one in units), default=0)
    class_of = {one.task.task: one.task.task_class for one in units}
    # A scan has no verdict, neither of accounts nor of classes.
    claims = () if is_scan else tuple(class_claim(ratios, class_of, num_seeds))
    return Analysis(arm, tasks, classes, claims)


def _of_task(task: SweptTask, cells: Cells, is_scan: bool, num_resamples: int) -> TaskAnalysis:
    found = find_optima(cells, num_resamples)
    slopes = fit_slopes(found)
    is_at_floor = _is_at_floor(task, cells)
    if is_at_floor:
        floor = (
            f"{task.task} is at its floor (chance {task.chance:g}): its surface says nothing; take another score of it"
        )
        slopes = replace(slopes, problems=(floor, *slopes.problems))
    return TaskAnalysis(
        task,
        cells,
        found,
        _said(slopes, is_scan),
        tuple(process_optimum(cells, one) for one in found.optima),
        tuple(nested_forms(cells, found)),
        is_at_floor,
    )


def _of_class(name: str, tasks: list[TaskAnalysis], is_scan: bool) -> ClassAnalysis:
    slopes = [one.said.slopes for one in tasks if one.said.slopes is not None]
    of = tuple(one.task.task for one in tasks)
    if len({(one.names, one.over_seeds.shape) for one in slopes}) > 1:
        reasons = [f"{one.task.task}: {reason}" for one in tasks for reason in one.said.reasons]
        unequal = "its tasks have optima at too different places to be averaged"
        return ClassAnalysis(name, of, Said(None, dict.fromkeys(ACCOUNTS, "not identified"), (unequal, *reasons)))
    return ClassAnalysis(name, of, _said(pooled(slopes), is_scan))


def _said(slopes: Slopes, is_scan: bool) -> Said:
    if is_scan:
        return Said(slopes, dict.fromkeys(ACCOUNTS, "not identified"), (SCAN,))
    return Said(slopes, verdicts(slopes), tuple(dict.fromkeys(identifies_nothing(slopes))))


def _is_at_floor(task: SweptTask, cells: Cells) -> bool:
    """Whether the best place lies within two standard errors, over items, of chance.

    Half of the items choose that place, the others are compared: the best of many guesses is above chance by luck.
    """
    if task.chance is None or cells.diverged.all():
        return False
    choosing, reporting = halves(cells.items.shape[1])
    if len(reporting) < 2:
        return True
    best = max((mean for *_, mean in place_means(cells)), key=lambda one: float(one[choosing].mean()), default=None)
    if best is None:  # a seed diverged at every place
        return False
    sign, reported = -1.0 if task.lower_is_better else 1.0, best[reporting]
    stderr = reported.std(ddof=1) / np.sqrt(len(reported))
    return bool(reported.mean() - sign * task.chance <= _FLOOR * stderr)


def place_means(cells: Cells) -> list[tuple[float, float, float, float, int, Floats]]:
    """(log2 LR, log2 batch, log2 tokens, log2 size, number of seeds, items' means over seeds) of places without a
    diverged seed, in order.
    """
    keys = np.stack([cells.log2_lr, cells.log2_batch, cells.log2_tokens, cells.log2_size], axis=1)
    made = []
    places, of_cell = np.unique(keys, axis=0, return_inverse=True)
    for number, place in enumerate(places):
        rows = np.flatnonzero(of_cell.ravel() == number)
        if not cells.diverged[rows].any():
            lr, batch, tokens, size = (float(x) for x in place)
            made.append((lr, batch, tokens, size, len(rows), cells.items[rows].mean(axis=0)))
    return made


def rows_of(cells: Cells, one: Optimum) -> NDArray[np.bool_]:
    """Cells of the batch, budget and size of an optimum."""
    here = (cells.log2_batch == one.log2_batch) & (cells.log2_tokens == one.log2_tokens)
    return here & (cells.log2_size == one.log2_size)


def process_optimum(cells: Cells, one: Optimum) -> float:
    """Optimum by the process; levels of seeds are taken out, rates at which a seed diverged are left out."""
    here = rows_of(cells, one)
    bad = np.unique(cells.log2_lr[here & cells.diverged])
    here &= ~np.isin(cells.log2_lr, bad)
    u, seed = cells.log2_lr[here], cells.seed[here]
    if len(np.unique(u)) < 3:
        return float("nan")
    y = cells.items[here].mean(axis=1)
    of_rate, of_seed = u[:, None] == np.unique(u), seed[:, None] == np.unique(seed)
    fitted = np.linalg.lstsq(np.concatenate([of_rate, of_seed], axis=1).astype(float), y, rcond=None)[0]
    return gp_optimum(u, y - of_seed @ fitted[of_rate.shape[1] :])
