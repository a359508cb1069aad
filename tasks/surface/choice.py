"""Where to train: the best place for tasks together, chosen by half of the items and judged by the other half. Pure.

Tasks have units of their own. Each is counted in standard deviations of its places' means at the budget, so that a
weight says how much a task matters, not how its metric is spelt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from smoltulu.tasks.surface.accounts import LEVEL, MIN_SEEDS
from smoltulu.tasks.surface.analysis import TaskAnalysis
from smoltulu.tasks.surface.claim import candidates, chosen_place, halves, judged
from smoltulu.tasks.surface.optimum import Cells, find_optima, main_budget

Floats = NDArray[np.float64]

_ADVICE = {
    "lowest rate": "the best rate is at the lower edge of the grid; add lower ones",
    "highest rate": "the best rate is at the upper edge of the grid; add higher ones",
    "next rate diverged": "the next higher rate diverged; add rates between the two",
    "too few rates": "fewer than three rates near the best one ended; no interval",
    "no optimum": "no rate is best beyond noise; no interval",
}


@dataclass(frozen=True)
class Judged:
    """A task at the chosen place, by the items that did not choose, in the task's own unit; larger is better."""

    task: TaskAnalysis
    weight: float
    score: float
    regret: float
    regret_stderr: float


@dataclass(frozen=True)
class Chosen:
    """The best place for a weighting.

    low, high  95 % interval of the best log2 learning rate at this batch; nan where it cannot be told
    regret     in weighted standard deviations
    """

    log2_lr: float
    log2_batch: float
    log2_tokens: float
    log2_size: float
    optimum: float
    low: float
    high: float
    regret: float
    regret_stderr: float
    tasks: tuple[Judged, ...]
    flags: tuple[str, ...]


def share_out(
    tasks: Sequence[TaskAnalysis], units: Sequence[TaskAnalysis], weights: Mapping[str, float]
) -> list[tuple[TaskAnalysis, float]]:
    """Tasks with their shares, which add up to 1. The weight of a class is spread evenly over its tasks.

    A name is a class, a task (its first score), or `task:metric`.

    ValueError: weights below 0 or all 0; a name that is none of these, or both a class and a task.
    """
    if not weights or min(weights.values()) < 0 or not np.isfinite(sum(weights.values())) or sum(weights.values()) <= 0:
        raise ValueError(f"weights {dict(weights)}: give finite numbers from 0 on, at least one above 0")
    of_task = {one.task.task: one for one in units}
    of_score = {f"{one.task.task}:{one.task.metric}": one for one in tasks}
    of_class: dict[str, list[TaskAnalysis]] = {}
    for one in units:
        of_class.setdefault(one.task.task_class, []).append(one)
    shares: dict[int, tuple[TaskAnalysis, float]] = {}
    for name, weight in weights.items():
        if name in of_task and name in of_class:
            raise ValueError(
                f"weight {name!r} is a task and a class; write the task as {name}:{of_task[name].task.metric}"
            )
        meant = of_class.get(name) or [one for one in (of_task.get(name) or of_score.get(name),) if one]
        if not meant:
            known = ", ".join([*of_class, *of_score])
            raise ValueError(f"weight {name!r} is neither a class nor a task of the sweep; there are {known}")
        for one in meant:
            held = shares.get(id(one), (one, 0.0))[1]
            shares[id(one)] = (one, held + weight / len(meant))
    total = sum(weight for _, weight in shares.values())
    return [(one, weight / total) for one, weight in shares.values() if weight > 0]


def spread(cells: Cells, log2_tokens: float) -> float:
    """Standard deviation of the means of the places at a budget; 0 where fewer than two ended."""
    means = [float(mean.mean()) for _, mean in candidates(cells, log2_tokens)]
    return float(np.std(means, ddof=1)) if len(means) > 1 else 0.0


def together(cells_of: Sequence[Cells], factors: Sequence[float]) -> Cells:
    """Cells of several tasks as one: the mean over its items is the sum of the tasks' means times their factors."""
    num_items = sum(cells.items.shape[1] for cells in cells_of)
    parts = [
        cells.items * (factor * num_items / cells.items.shape[1])
        for cells, factor in zip(cells_of, factors, strict=True)
    ]
    return Cells(**{**vars(cells_of[0]), "items": np.concatenate(parts, axis=1)})


def _split(num_items_of: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Items of several tasks, one behind the other, that choose and that report: of each score the same halves as when
    it stands alone. So no item chooses by one score of its task and reports by another.
    """
    starts = np.cumsum([0, *num_items_of[:-1]])
    parts = [tuple(start + half for half in halves(num)) for start, num in zip(starts, num_items_of, strict=True)]
    choosing, reporting = (np.concatenate(half) for half in zip(*parts, strict=True))
    return choosing, reporting


def choose(shares: Sequence[tuple[TaskAnalysis, float]]) -> Chosen:
    """Best place at the budget with the most batch sizes, and at the size with the most cells there.

    ValueError: no place to choose from, or no task with two items and two different places.
    """
    first = shares[0][0]
    tokens = main_budget(first.found.optima)
    at_budget = first.cells.log2_tokens == tokens
    sizes, counts = np.unique(first.cells.log2_size[at_budget], return_counts=True)
    size = float(sizes[np.argmax(counts)])
    here = at_budget & (first.cells.log2_size == size)
    kept, flags = [], []
    for one, weight in shares:
        cells = only(one.cells, here)
        if (scale := spread(cells, tokens)) > 0 and cells.items.shape[1] > 1:
            kept.append((one, weight, cells, scale))
        else:
            flags.append(f"{one.task.task} does not count: it needs two items, and places with different scores")
        if one.is_at_floor:
            flags.append(f"{one.task.task} is at its floor: its best place is within noise of a guess")
    if not kept:
        raise ValueError(
            f"budget 2^{tokens:g} tokens: no task has two items and two places with different scores and no diverged "
            "seed; run more cells"
        )
    total = sum(weight for _, weight, _, _ in kept)
    whole = together([cells for *_, cells, _ in kept], [weight / total / scale for _, weight, _, scale in kept])
    place = chosen_place(whole, tokens, _split([cells.items.shape[1] for *_, cells, _ in kept]))
    made = []
    for one, weight, cells, _ in kept:
        own = halves(cells.items.shape[1])[1]
        places = candidates(cells, tokens)
        (mean,) = [mean for (lr, batch, _), mean in places if (lr, batch) == (place.log2_lr, place.log2_batch)]
        made.append(Judged(one, weight / total, *judged(places, mean, own)))
    optimum, low, high, of_grid = _interval(whole, place.log2_lr, place.log2_batch)
    return Chosen(
        place.log2_lr, place.log2_batch, tokens, size, optimum, low, high, place.regret, place.regret_stderr,
        tuple(made), tuple(dict.fromkeys([*flags, *of_grid])),
    )  # fmt: skip


def only(cells: Cells, kept: NDArray[np.bool_]) -> Cells:
    """Some of the cells."""
    return Cells(**{name: column[kept] for name, column in vars(cells).items()})


def _interval(cells: Cells, log2_lr: float, log2_batch: float) -> tuple[float, float, float, list[str]]:
    """Best log2 learning rate at a batch with its 95 % interval, and what the grid does not tell."""
    found = find_optima(cells)
    (number,) = [n for n, one in enumerate(found.optima) if one.log2_batch == log2_batch]
    one = found.optima[number]
    flags = [_ADVICE[one.flaw]] if one.flaw else []
    batches = np.unique(cells.log2_batch)
    if len(batches) > 1 and log2_batch in (batches[0], batches[-1]):
        edge, further = ("smallest", "smaller") if log2_batch == batches[0] else ("largest", "larger")
        flags.append(f"the best batch is the {edge} of the grid; add {further} ones")
    if one.num_seeds < MIN_SEEDS:
        flags.append(f"{one.num_seeds} of {MIN_SEEDS} seeds at this batch; add seeds")
    if one.flaw or not np.isfinite(one.log2_lr):
        return float("nan"), float("nan"), float("nan"), flags
    num_df = sum(other.num_seeds - 1 for other in found.optima if not other.flaw)
    half = float(t.ppf(1 - LEVEL / 2, num_df) * one.stderr) if num_df > 0 else float("nan")
    if abs(log2_lr - one.log2_lr) > 1:
        flags.append(
            "the best tested place lies more than an octave from the parabola's optimum: noise, or no parabola"
        )
    return one.log2_lr, one.log2_lr - half, one.log2_lr + half, flags
