"""Which account of the best learning rate the optima of a sweep support, and which they exclude. Pure.

The optima are fitted by log2 LR* = a + alpha log2 B + gamma log2 T (+ delta log2 N). At one budget T the ratio LR/B and
the total drift LR T / B are the same thing: gamma, and with it the claim, needs a second budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, f, t

from smoltulu.tasks.surface.optimum import Optima, Optimum

Floats = NDArray[np.float64]
Verdict = Literal["supported", "excluded", "not identified"]

#: Account -> its (alpha, gamma).
ACCOUNTS: dict[str, tuple[float, float]] = {
    "gradient noise: LR / B matters": (1.0, 0.0),
    "total drift: LR T / B matters": (1.0, -1.0),
    "Adam's square root: LR / sqrt(B) matters": (0.5, 0.0),
    "LR alone": (0.0, 0.0),
}
#: An account is supported where the whole intervals of alpha and of gamma lie this close to its own.
TOLERANCE = 0.2
#: A wider interval (both sides together) tells nothing.
MAX_WIDTH = 0.4
LEVEL = 0.05
#: Seeds that a verdict needs at the budget with the most batch sizes, and at any other.
MIN_SEEDS, MIN_SEEDS_ELSEWHERE = 3, 2
MIN_BATCHES, MIN_BUDGETS = 3, 2
_NAMES = ("alpha", "gamma", "delta")


@dataclass(frozen=True)
class Slopes:
    """alpha, gamma and, with several sizes, delta of a task or a class.

    names, estimate, stderr, low, high  one of each a slope; low and high are 95 % limits
    covariance   of the estimate, (num_slopes, num_slopes)
    num_df       degrees of freedom behind it
    misfit       p-value that the optima lie on a plane
    problems     why they identify nothing, in words that name what is missing; empty where they do
    """

    names: tuple[str, ...]
    estimate: Floats
    covariance: Floats
    num_df: int
    misfit: float
    problems: tuple[str, ...] = ()
    over_seeds: Floats = field(repr=False, default_factory=lambda: np.zeros((0, 0)))
    over_items: Floats = field(repr=False, default_factory=lambda: np.zeros((0, 0)))

    @property
    def stderr(self) -> Floats:
        """(num_slopes,)"""
        return np.sqrt(np.diag(self.covariance))

    @property
    def half_width(self) -> Floats:
        """Half of each 95 % interval, (num_slopes,)"""
        return t.ppf(1 - LEVEL / 2, max(self.num_df, 1)) * self.stderr

    def interval(self, name: str) -> tuple[float, float]:
        """95 % limits of a slope. KeyError where it was not fitted."""
        if name not in self.names:
            raise KeyError(name)
        position = self.names.index(name)
        middle, half = self.estimate[position], self.half_width[position]
        return float(middle - half), float(middle + half)


def fit_slopes(found: Optima) -> Slopes:
    """Least squares over the optima that are none of the grid's edge; the others are named as problems.

    Where the optima scatter about the plane more than their own errors say, the errors grow by what is missing.
    """
    good = [position for position, one in enumerate(found.optima) if not one.flaw]
    optima = [found.optima[position] for position in good]
    problems = [_told(one) for one in found.optima if one.flaw]
    columns = {
        "alpha": np.array([one.log2_batch for one in optima]),
        "gamma": np.array([one.log2_tokens for one in optima]),
        "delta": np.array([one.log2_size for one in optima]),
    }
    problems += _missing(found)
    names = tuple(name for name in _NAMES if len(np.unique(columns[name])) > 1)
    design = np.stack([np.ones(len(optima)), *(columns[name] for name in names)], axis=1)
    num_spare = len(optima) - design.shape[1]
    if not names or num_spare < 0 or np.linalg.matrix_rank(design) < design.shape[1]:
        problems.append(f"{len(optima)} usable optima do not tell {', '.join(names) or 'any slope'}")
        empty = np.full(len(names), np.nan)
        return Slopes(names, empty, np.full((len(names), len(names)), np.nan), 0, np.nan, tuple(problems))
    values = np.array([one.log2_lr for one in optima])
    over_seeds, over_items = found.over_seeds[:, good], found.over_items[:, good]
    # Not by the errors: those of few seeds are small by luck, and their places would count most.
    root = np.sqrt(np.array([float(one.num_seeds) for one in optima]))
    to_slopes = np.linalg.pinv(design * root[:, None]) * root  # (1 + num_slopes, num_optima)
    fitted = to_slopes @ values
    rest = values - design @ fitted
    seeds, items = np.nan_to_num(over_seeds) @ to_slopes.T, np.nan_to_num(over_items) @ to_slopes.T
    scale, misfit = _scatter(rest, over_seeds, over_items, to_slopes, design, num_spare)
    covariance = (np.cov(seeds.T) + np.cov(items.T))[1:, 1:] * scale
    num_df = sum(one.num_seeds - 1 for one in optima)
    return Slopes(
        names, fitted[1:], np.atleast_2d(covariance), num_df, misfit, tuple(problems), seeds[:, 1:], items[:, 1:]
    )


def _scatter(
    rest: Floats, over_seeds: Floats, over_items: Floats, to_slopes: Floats, design: Floats, num_spare: int
) -> tuple[float, float]:
    """By how much the scatter about the plane exceeds what seeds and items explain (at least 1), and its p-value."""
    if num_spare < 1:
        return 1.0, float("nan")
    project = np.eye(len(rest)) - design @ to_slopes
    expected = project @ (np.cov(np.nan_to_num(over_seeds).T) + np.cov(np.nan_to_num(over_items).T)) @ project.T
    ratio = float(rest @ rest / max(float(np.trace(expected)), 1e-300))
    # Satterthwaite: a sum of squares with unequal eigenvalues is about a chi-square with fewer degrees of freedom.
    eigenvalues = np.linalg.eigvalsh(expected)
    num_effective = float(eigenvalues.sum() ** 2 / max(float((eigenvalues**2).sum()), 1e-300))
    return max(1.0, ratio), float(chi2.sf(ratio * num_effective, max(num_effective, 1.0)))


def pooled(tasks: Sequence[Slopes]) -> Slopes:
    """The mean of the tasks' slopes, for a class. Tasks share their runs: their deviations over seeds add up as drawn.

    ValueError: no tasks, or tasks of other sweeps.
    """
    if not tasks or len({one.names for one in tasks}) != 1 or len({one.over_seeds.shape for one in tasks}) != 1:
        raise ValueError("slopes are pooled over the tasks of one sweep, at least one, all with the same slopes")
    problems = tuple(dict.fromkeys(problem for one in tasks for problem in one.problems))
    estimate = np.mean([one.estimate for one in tasks], axis=0)
    if any(not np.isfinite(one.covariance).all() for one in tasks):
        return Slopes(tasks[0].names, estimate, np.full_like(tasks[0].covariance, np.nan), 0, np.nan, problems)
    seeds = np.mean([one.over_seeds for one in tasks], axis=0)
    items = np.mean([one.over_items for one in tasks], axis=0)
    # Items of different tasks are drawn apart, so that the mean of their covariances counts, not that of one draw.
    of_items = sum(np.atleast_2d(np.cov(one.over_items.T)) for one in tasks) / len(tasks) ** 2
    scales = [np.trace(one.covariance) / max(np.trace(_own(one)), 1e-300) for one in tasks]
    covariance = (np.atleast_2d(np.cov(seeds.T)) + of_items) * max(1.0, float(np.mean(scales)))
    num_df = min(one.num_df for one in tasks)
    misfit = float(min(1.0, len(tasks) * min(one.misfit for one in tasks)))
    return Slopes(tasks[0].names, estimate, covariance, num_df, misfit, problems, seeds, items)


def _own(slopes: Slopes) -> Floats:
    return np.atleast_2d(np.cov(slopes.over_seeds.T)) + np.atleast_2d(np.cov(slopes.over_items.T))


def verdicts(slopes: Slopes) -> dict[str, Verdict]:
    """One word for every account, from intervals alone.

    supported       the 95 % intervals of alpha and gamma lie within 0.2 of the account's, and all others are excluded
    excluded        its point lies outside the joint 95 % region
    not identified  all else; every account where the optima identify nothing
    """
    if identifies_nothing(slopes):
        return dict.fromkeys(ACCOUNTS, "not identified")
    which = [slopes.names.index(name) for name in ("alpha", "gamma")]
    estimate, covariance = slopes.estimate[which], slopes.covariance[np.ix_(which, which)]
    half = slopes.half_width[which]
    limit = 2 * f.ppf(1 - LEVEL, 2, max(slopes.num_df - 1, 1)) * slopes.num_df / max(slopes.num_df - 1, 1)
    away = {name: estimate - np.array(point) for name, point in ACCOUNTS.items()}
    excluded = {name: bool(d @ np.linalg.solve(covariance, d) > limit) for name, d in away.items()}
    words: dict[str, Verdict] = {}
    for name, d in away.items():
        near = bool((np.abs(d) + half <= TOLERANCE).all())
        others = all(excluded[other] for other in ACCOUNTS if other != name)
        words[name] = "excluded" if excluded[name] else "supported" if near and others else "not identified"
    return words


def identifies_nothing(slopes: Slopes) -> list[str]:
    """Why these slopes allow no verdict; empty where they do."""
    reasons = list(slopes.problems)
    for name in ("alpha", "gamma"):
        if name not in slopes.names:
            reasons.append(f"{name} needs a second {'batch size' if name == 'alpha' else 'budget'}")
            continue
        low, high = slopes.interval(name)
        if not high - low <= MAX_WIDTH:
            reasons.append(f"the 95 % interval of {name} is {high - low:.2f} wide; at most {MAX_WIDTH} tells something")
    return reasons


def _told(one: Optimum) -> str:
    place = f"batch 2^{one.log2_batch:g}, budget 2^{one.log2_tokens:g} tokens"
    advice = {
        "lowest rate": "the best rate is the lowest; add lower ones",
        "highest rate": "the best rate is the highest; add higher ones",
        "next rate diverged": "the best rate is the highest that did not diverge; add rates between it and the next",
        "too few rates": "fewer than three rates near the best one ended; add rates there",
        "no optimum": "no rate is best beyond noise; add rates or seeds",
    }
    return f"{place}: {advice[one.flaw]}"


def _missing(found: Optima) -> list[str]:
    """What the grid lacks for a verdict."""
    problems = []
    places = [(one.log2_size, one.log2_tokens, one.log2_batch, one.num_seeds) for one in found.optima]
    budgets = sorted({tokens for _, tokens, _, _ in places})
    if len(budgets) < MIN_BUDGETS:
        problems.append(
            f"one budget only (2^{budgets[0]:g} tokens): ratio and drift are the same there; add a second budget"
            if budgets
            else "no budget has an optimum"
        )
    num_batches = {tokens: len({b for _, one, b, _ in places if one == tokens}) for tokens in budgets}
    if num_batches and max(num_batches.values()) < MIN_BATCHES:
        problems.append(f"{max(num_batches.values())} batch sizes at most; add some until there are {MIN_BATCHES}")
    main = max(budgets, key=lambda tokens: (num_batches[tokens], -abs(tokens - np.median(budgets))), default=None)
    for _, tokens, batch, num_seeds in places:
        needed = MIN_SEEDS if tokens == main else MIN_SEEDS_ELSEWHERE
        if num_seeds < needed:
            problems.append(f"batch 2^{batch:g}, budget 2^{tokens:g} tokens: {num_seeds} of {needed} seeds; add seeds")
    return problems
