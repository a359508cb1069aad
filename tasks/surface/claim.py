"""Does the best ratio of learning rate to batch size depend on the class of a task? And how far off is a choice? Pure.

Tasks are the unit: their classes were written into the recipe before any run. Compared are places of optima, never
scores, so that an easy task counts as much as a hard one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import f

from smoltulu.tasks.comparison.paired import holm
from smoltulu.tasks.surface.accounts import MIN_SEEDS
from smoltulu.tasks.surface.optimum import WINDOW, Cells, Optima, main_budget

Floats = NDArray[np.float64]

#: Tasks of each class that the permutation test needs: four against four can reach p = 0.029, two against two 0.33.
MIN_TASKS = 4
_MAX_PERMUTATIONS = 200_000
_FULL_TERMS = 5


@dataclass(frozen=True)
class ClassTest:
    """Best log2 ratios of the tasks of two classes.

    difference  mean of the first class minus mean of the second, octaves
    p_value     two-sided, over all ways to call as many of these tasks the first class; nan where it was not tested
    adjusted    for all tests of the sweep (Holm)
    untested    why it was not tested; empty where it was
    """

    classes: tuple[str, str]
    num_tasks: tuple[int, int]
    difference: float
    p_value: float
    adjusted: float
    untested: str = ""


def best_ratio(found: Optima) -> float:
    """Mean over batch sizes of log2(LR* / B) at the budget with the most of them; nan where an optimum has a flaw.

    The flawed ones are left out of all tasks or of none: else a task's mean would be of other batch sizes.
    """
    main = main_budget(found.optima)
    at_main = [one for one in found.optima if one.log2_tokens == main]
    return float(np.mean([one.log2_lr - one.log2_batch if not one.flaw else np.nan for one in at_main]))


def fewest_seeds(found: Optima) -> int:
    """Seeds of the place with the fewest of them, of those that `best_ratio` is the mean of."""
    main = main_budget(found.optima)
    return min(one.num_seeds for one in found.optima if one.log2_tokens == main)


def permutation_test(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value of the difference of means; nan under `MIN_TASKS` a side.

    Over every division of the values; where there are more than can be counted, over as many drawn ones, with the
    observed one among them.
    """
    if min(len(first), len(second)) < MIN_TASKS:
        return float("nan")
    values = np.array([*first, *second])
    if math.comb(len(values), len(first)) > _MAX_PERMUTATIONS:
        orders = np.random.default_rng(0).permuted(np.tile(values, (_MAX_PERMUTATIONS, 1)), axis=1)
        sums = np.append(orders[:, : len(first)].sum(axis=1), sum(first))
    else:
        sums = values[np.array(list(combinations(range(len(values)), len(first))))].sum(axis=1)
    means = sums / len(first) - (values.sum() - sums) / len(second)
    observed = abs(np.mean(first) - np.mean(second))
    return float(np.mean(np.abs(means) >= observed * (1 - 1e-12)))


def class_claim(
    ratios: Mapping[str, float], class_of: Mapping[str, str], num_seeds: int = MIN_SEEDS
) -> list[ClassTest]:
    """Every two classes against each other. Tasks without an optimum are left out.

    num_seeds  the fewest behind a ratio; under `MIN_SEEDS` nothing is tested: the luck of a run hits all tasks of a
        class alike, and tasks as units do not show that

    ValueError: a task without class.
    """
    if unclassed := sorted(ratios.keys() - class_of.keys()):
        raise ValueError(f"task {unclassed[0]!r} has no class; give it one in the recipe before the sweep runs")
    classes = sorted({class_of[task] for task in ratios})
    of_class = {
        name: [value for task, value in ratios.items() if class_of[task] == name and math.isfinite(value)]
        for name in classes
    }
    pairs = list(combinations(classes, 2))
    too_few = f"{num_seeds} of {MIN_SEEDS} seeds: too few to test" if num_seeds < MIN_SEEDS else ""
    p_values = [np.nan if too_few else permutation_test(of_class[one], of_class[other]) for one, other in pairs]
    known = [p for p in p_values if math.isfinite(p)]
    adjusted = iter(holm(known))
    made = []
    for (one, other), p_value in zip(pairs, p_values, strict=True):
        first, second = of_class[one], of_class[other]
        difference = float(np.mean(first) - np.mean(second)) if first and second else float("nan")
        after = next(adjusted) if math.isfinite(p_value) else float("nan")
        few_tasks = "" if math.isfinite(p_value) else "Too few tasks to test: four against four can reach p = 0.029"
        made.append(
            ClassTest((one, other), (len(first), len(second)), difference, p_value, after, too_few or few_tasks)
        )
    return made


@dataclass(frozen=True)
class Nested:
    """How well one form explains the scores near the optima. Shown, never decisive: rates that are too low to get
    anywhere make LR / B look right whatever is true.

    f_value, p_value  against the full surface; nan for the full surface itself
    """

    form: str
    bic: float
    f_value: float
    p_value: float


def nested_forms(cells: Cells, found: Optima) -> list[Nested]:
    """Full quadratic surface in log2 LR and log2 B, and parabolas in one of their combinations, within two octaves of
    the optima of the budget with the most batch sizes. The level of a seed at a size is taken out. Empty where too
    little is left.
    """
    main = main_budget(found.optima)
    near = np.zeros(len(cells.items), dtype=bool)
    for one in found.optima:
        if one.log2_tokens == main and np.isfinite(one.log2_lr):
            here = (cells.log2_batch == one.log2_batch) & (cells.log2_size == one.log2_size)
            near |= here & (cells.log2_tokens == main) & (np.abs(cells.log2_lr - one.log2_lr) <= WINDOW)
    near &= ~cells.diverged
    u, v, y = cells.log2_lr[near], cells.log2_batch[near], cells.items[near].mean(axis=1)
    of_level = sorted({*zip(cells.seed[near], cells.log2_size[near], strict=True)})
    if len(y) <= len(of_level) + _FULL_TERMS:
        return []
    levels = np.stack([(cells.seed[near] == seed) & (cells.log2_size[near] == size) for seed, size in of_level], axis=1)
    u, v = u - u.mean(), v - v.mean()
    forms = {
        "full": [u, v, u * u, u * v, v * v],
        "LR / B": [u - v, (u - v) ** 2],
        "LR / sqrt(B)": [u - v / 2, (u - v / 2) ** 2],
        "LR": [u, u * u],
    }
    fits = {}
    for name, terms in forms.items():
        design = np.concatenate([levels, np.stack(terms, axis=1)], axis=1)
        rest = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
        fits[name] = (float(rest @ rest), design.shape[1])
    full, num_full = fits["full"]
    num_spare = len(y) - num_full
    made = []
    for name, (squares, num_terms) in fits.items():
        bic = len(y) * math.log(max(squares, 1e-300) / len(y)) + num_terms * math.log(len(y))
        if name == "full":
            made.append(Nested(name, bic, float("nan"), float("nan")))
            continue
        value = (squares - full) / (num_full - num_terms) / (max(full, 1e-300) / num_spare)
        made.append(Nested(name, bic, value, float(f.sf(value, num_full - num_terms, num_spare))))
    return made


@dataclass(frozen=True)
class Choice:
    """A place chosen by one half of the items, and what it costs by the other.

    regret  what the best place of the other half scores more there; 0 where it is the same place
    """

    log2_lr: float
    log2_batch: float
    log2_tokens: float
    log2_size: float
    score: float
    regret: float
    regret_stderr: float


def halves(num_items: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Items that choose, and items that report: every other one, so that a sorted file is split evenly."""
    order = np.arange(num_items)
    return order[::2], order[1::2]


def candidates(cells: Cells, log2_tokens: float) -> list[tuple[Floats, Floats]]:
    """((log2 LR, log2 batch, log2 size), items' means over seeds) of places at a budget where no seed diverged.

    Places with fewer seeds than the middle one are left out: the best of many single seeds is the luckiest.
    """
    here = cells.log2_tokens == log2_tokens
    places = np.stack([cells.log2_lr, cells.log2_batch, cells.log2_size], axis=1)
    made: list[tuple[Floats, Floats]] = []
    found, num_seeds = np.unique(places[here], axis=0, return_counts=True)
    if not len(found):
        return made
    for place in found[num_seeds >= np.floor(np.median(num_seeds))]:
        rows = here & (places == place).all(axis=1)
        if not cells.diverged[rows].any():
            made.append((place, cells.items[rows].mean(axis=0)))
    return made


def chosen_place(
    cells: Cells, log2_tokens: float, split: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
) -> Choice:
    """Best mean score over seeds by the choosing items at a budget, among its candidates.

    split  items that choose, and that report; every other one where it is not given

    ValueError: no candidate, or fewer than two items.
    """
    choosing, reporting = halves(cells.items.shape[1]) if split is None else split
    if not len(reporting):
        raise ValueError("one item cannot choose and report; give at least two")
    made = candidates(cells, log2_tokens)
    if not made:
        raise ValueError(f"no place of budget 2^{log2_tokens:g} tokens ended without a diverged seed")
    place, mean = max(made, key=lambda one: float(one[1][choosing].mean()))
    score, regret, stderr = judged(made, mean, reporting)
    log2_lr, log2_batch, log2_size = (float(x) for x in place)
    return Choice(log2_lr, log2_batch, log2_tokens, log2_size, score, regret, stderr)


def judged(
    made: Sequence[tuple[Floats, Floats]], mean: Floats, reporting: NDArray[np.int64]
) -> tuple[float, float, float]:
    """Score of a place by the reporting items, what the best candidate scores more there, and its standard error over
    items (nan of a single one). `mean`: the items' means of the place, one of those in `made`.
    """
    reported = mean[reporting]
    difference = max((one[reporting] for _, one in made), key=lambda one: float(one.mean())) - reported
    stderr = float(difference.std(ddof=1) / math.sqrt(len(difference))) if len(difference) > 1 else float("nan")
    return float(reported.mean()), float(difference.mean()), stderr
