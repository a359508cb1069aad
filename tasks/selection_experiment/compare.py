"""By how much one arm of an experiment is better than another: an interval over seeds and items. Pure.

An arm is a few runs (seeds) that answered the same items. Another experiment would have other seeds and could have
other items, so both count. A run is drawn alone, an item is drawn for both arms at once: items are paired, as in
`tasks.comparison.paired` (Miller, arXiv 2411.00640); seeds are compared as two groups of unequal size (Welch 1947).
The part of the noise that is of one run and one item alone stands in both terms: the interval is rather too wide, as
that of a bootstrap over both is (Owen, "The pigeonhole bootstrap", arXiv 0712.1111). A bootstrap of three seeds would
be too narrow: it has 2/3 of their variance and no heavier tails.

Which rows were drawn moves a run, too. `random` draws anew for every run; a selector has the same rows in all of its
runs, and one that knows nothing has one draw. So a selector is compared with `random` as one more draw: with the
variance of runs of `random`, once, however many seeds it has (the interval of a prediction).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smoltulu.tasks.comparison.paired import CONFIDENCE

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """Variance from run to run, and its degrees of freedom."""

    variance: float
    num_df: float


@dataclass(frozen=True)
class Difference:
    """What two arms differ by; larger is better.

    difference   mean of the arm - mean of the control
    stderr       of it, over seeds and items
    num_df       degrees of freedom of `stderr` (Satterthwaite)
    low, high    95 % interval
    p_value      two-sided, that both are equally good
    """

    difference: float
    stderr: float
    num_df: float
    low: float
    high: float
    p_value: float


def compare(
    arm: Sequence[Floats],
    control: Sequence[Floats],
    spread_of_runs: Spread | None = None,
    *,
    is_one_draw: bool = False,
) -> Difference:
    """Compare two arms on a few tasks, each of which counts alike.

    Args:
        arm: of each task (num_seeds, num_items) scores, larger is better.
        control: the same tasks and items; its seeds may be others, and of another number.
        spread_of_runs: variance of a run's mean over tasks, where it is known from elsewhere; else each arm's own.
        is_one_draw: all runs of the arm have the same rows, and those of the control each rows of its own.

    Raises:
        ValueError: other items on one side, or none; a score that is no number; a single run of unknown spread.
    """
    _check(arm, control)
    num_tasks = len(arm)
    of_runs = [np.mean([task.mean(axis=1) for task in side], axis=0) for side in (arm, control)]
    difference = float(of_runs[0].mean() - of_runs[1].mean())
    terms: list[Spread] = []  # variances that add up
    if spread_of_runs is not None:
        both = sum(1 / len(runs) for runs in of_runs)
        terms.append(Spread(spread_of_runs.variance * both, spread_of_runs.num_df))
    else:
        for runs in of_runs:
            if len(runs) < 2:
                raise ValueError("one run of an arm says nothing of other seeds; give at least two")
            terms.append(Spread(float(runs.var(ddof=1)) / len(runs), len(runs) - 1))
        drawn = terms[1].variance * len(of_runs[1])  # variance of a run of the control
        if is_one_draw and drawn > terms[0].variance:
            terms = [Spread(drawn + terms[1].variance, terms[1].num_df)]
    for ours, theirs in zip(arm, control, strict=True):
        paired = ours.mean(axis=0) - theirs.mean(axis=0)
        if len(paired) > 1:
            terms.append(Spread(float(paired.var(ddof=1)) / len(paired) / num_tasks**2, len(paired) - 1))
    return _tested(difference, terms)


def spread_of(arm: Sequence[Floats]) -> Spread:
    """Variance of the mean over tasks from run to run. ValueError for a single run."""
    runs = np.mean([task.mean(axis=1) for task in arm], axis=0)
    if len(runs) < 2:
        raise ValueError("one run has no spread; give at least two")
    return Spread(float(runs.var(ddof=1)), len(runs) - 1)


def _tested(difference: float, terms: Sequence[Spread]) -> Difference:
    from scipy.special import stdtr, stdtrit

    variance = math.fsum(one.variance for one in terms)
    if variance == 0.0:  # every run and item differs by the same
        return Difference(difference, 0.0, math.inf, difference, difference, 1.0 if difference == 0 else 0.0)
    num_df = variance**2 / math.fsum(one.variance**2 / one.num_df for one in terms)
    stderr = math.sqrt(variance)
    half = float(stdtrit(num_df, (1 + CONFIDENCE) / 2)) * stderr
    p_value = 2 * float(stdtr(num_df, -abs(difference) / stderr))
    return Difference(difference, stderr, num_df, difference - half, difference + half, p_value)


def _check(arm: Sequence[Floats], control: Sequence[Floats]) -> None:
    shapes = [[task.shape[1] for task in side] for side in (arm, control)]
    if shapes[0] != shapes[1] or not shapes[0] or 0 in shapes[0]:
        raise ValueError(
            f"two arms are compared on the same items of at least one task; their tasks have {shapes[0]} and "
            f"{shapes[1]} items"
        )
    if not all(np.isfinite(task).all() for side in (arm, control) for task in side):
        raise ValueError("a score is no number; leave out runs that diverged")
