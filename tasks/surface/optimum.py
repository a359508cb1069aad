"""The best learning rate of every batch size and budget, from scores of a grid. Pure.

Near its optimum a score falls as a parabola in u = log2(learning rate). Each batch size and budget has its own optimum,
the batch sizes of a budget share their curvature, and a seed has its own level at each place: a seed's luck that hits
all its learning rates alike does not move its optimum. Budgets and sizes share their curvature as far as the scores do
not say otherwise: curves are flatter where little was trained, and one curvature for all would then pull the optima of
a small budget to the middle of their rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Octaves of learning rate on both sides of an optimum that its parabola is fitted to.
WINDOW = 2.0
_MAX_ROUNDS = 20
#: Squared deviations below this are none: their inverse squared would overflow.
_NO_VARIANCE = 1e-100
#: An optimum whose parabola bends the other way in more of the resampled worlds than this is none.
_MAX_SHARE_WITHOUT_OPTIMUM = 0.025

Flaw = Literal["", "lowest rate", "highest rate", "next rate diverged", "too few rates", "no optimum"]


@dataclass(frozen=True)
class Cells:
    """Scores of one task, a row a cell; larger is better. A cell that diverged has scores that nobody reads.

    log2_lr, log2_batch, log2_tokens, log2_size  (num_cells,)
    seed, diverged                               (num_cells,)
    items                                        (num_cells, num_items), the same items in every cell
    """

    log2_lr: Floats
    log2_batch: Floats
    log2_tokens: Floats
    log2_size: Floats
    seed: NDArray[np.int64]
    diverged: NDArray[np.bool_]
    items: Floats

    def __post_init__(self) -> None:
        columns = (self.log2_lr, self.log2_batch, self.log2_tokens, self.log2_size, self.seed, self.diverged)
        num_cells = len(self.items)
        if self.items.ndim != 2 or not self.items.size or any(column.shape != (num_cells,) for column in columns):
            raise ValueError(
                f"cells need one value of every column a row of items (num_cells, num_items); got items "
                f"{self.items.shape} and {[column.shape for column in columns]}"
            )
        if not np.isfinite(self.items[~self.diverged]).all():
            raise ValueError("a cell that did not diverge has a score that is no number; call it diverged or failed")
        places = np.stack([self.log2_lr, self.log2_batch, self.log2_tokens, self.log2_size, self.seed], axis=1)
        if len(np.unique(places, axis=0)) != num_cells:
            raise ValueError("two cells have the same learning rate, batch, budget, size and seed; keep one of them")


@dataclass(frozen=True)
class Optimum:
    """The best learning rate at one batch size, budget and size.

    log2_lr     nan where there is none
    stderr      of it, over seeds and items; nan where a single seed was run
    num_seeds   those that say something about it, with two rates or more near it; where none can be told: that were run
    flaw        why it may not be used; empty where it may
    """

    log2_batch: float
    log2_tokens: float
    log2_size: float
    log2_lr: float
    stderr: float
    num_seeds: int
    flaw: Flaw = ""


@dataclass(frozen=True)
class Optima:
    """Optima of one task, and what they would have been with other seeds and other items.

    curvature  what the score loses at one octave off each optimum, as a negative number, (num_optima,); the same for
        all of a budget and size; nan where there is no optimum
    over_seeds, over_items  (num_resamples, num_optima), deviations from `optima`
    """

    optima: tuple[Optimum, ...]
    curvature: Floats
    over_seeds: Floats = field(repr=False)
    over_items: Floats = field(repr=False)


@dataclass(frozen=True)
class _Curve:
    """Points of one seed at one place. `items` (num_points, num_items)."""

    u: Floats
    items: Floats


def main_budget(optima: Sequence[Optimum]) -> float:
    """log2 tokens of the budget with the most batch sizes; of several the one in the middle. There must be one."""
    budgets = np.unique([one.log2_tokens for one in optima])
    batches = {tokens: {one.log2_batch for one in optima if one.log2_tokens == tokens} for tokens in budgets}
    return float(max(budgets, key=lambda tokens: (len(batches[tokens]), -abs(tokens - np.median(budgets)))))


def find_optima(cells: Cells, num_resamples: int = 400, seed: int = 0) -> Optima:
    """Optimum of every batch size, budget and size, each with what moves it.

    Resampled are seeds (within each place; deviations grow by sqrt(S / (S - 1)), as S seeds are few) and items (the
    same for all cells). A place with a single seed is taken to be as uncertain as one seed of the others is. Equal
    `seed` and equal cells give equal draws of seeds: tasks of one sweep stay paired.
    """
    keys = np.stack([cells.log2_batch, cells.log2_tokens, cells.log2_size], axis=1)
    places = np.unique(keys, axis=0)
    grids = [_Grid(cells, (keys == place).all(axis=1)) for place in places]
    groups = np.unique(places[:, 1:], axis=0, return_inverse=True)[1].ravel()
    centers, curves = _windows(grids, groups)
    usable = [_has_shape(of_place) for of_place in curves]
    sums = _sums(curves, usable)
    own_share = _own_share(curves, sums, groups, usable)
    resampled, curvatures = _solve(sums, centers, groups, own_share)
    optima, curvature = resampled[0], curvatures[0]

    # A generator for each place: where another task has fewer seeds near its optimum, the other places stay paired.
    draws = [np.random.default_rng([seed, position]) for position in range(len(places))]
    seed_weights = [
        _seed_weights(len(of_place), num_resamples, own) for of_place, own in zip(curves, draws, strict=True)
    ]
    over_seeds = _solve(_sums(curves, usable, seed_weights), centers, groups, own_share)[0] - optima
    num_seeds_of = np.array([len(of_place) for of_place in curves])
    several = (num_seeds_of > 1) & usable
    # The deviations, not the weights: a weight below 0 makes a place of uneven seeds bend the other way.
    over_seeds[:, several] *= np.sqrt(num_seeds_of[several] / (num_seeds_of[several] - 1))
    if several.any():
        told = several & np.isfinite(over_seeds).any(axis=0)
        of_one_seed = (
            np.sqrt(np.mean(num_seeds_of[told] * np.nanvar(over_seeds[:, told], axis=0))) if told.any() else np.nan
        )
        for alone in np.flatnonzero(num_seeds_of == 1):
            over_seeds[:, alone] += of_one_seed * draws[alone].normal(size=num_resamples)
    num_items = cells.items.shape[1]
    item_draws = np.random.default_rng([seed, num_items])
    item_weights = item_draws.multinomial(num_items, np.full(num_items, 1 / num_items), num_resamples) / num_items
    over_items = _solve(_sums(curves, usable, None, item_weights), centers, groups, own_share)[0] - optima
    found = []
    for position, (place, grid) in enumerate(zip(places, grids, strict=True)):
        flaw = _flaw(grid, optima[position], usable[position], over_seeds[:, position], over_items[:, position])
        num_seeds = len(curves[position]) if usable[position] else len(np.unique(grid.seed))
        log2_lr, stderr = (np.nan, np.nan) if flaw in ("too few rates", "no optimum") else (optima[position], np.nan)
        if num_seeds > 1 and np.isfinite(log2_lr):
            stderr = np.sqrt(np.nanvar(over_seeds[:, position]) + np.nanvar(over_items[:, position]))
        batch, tokens, size = (float(x) for x in place)
        found.append(Optimum(batch, tokens, size, float(log2_lr), float(stderr), num_seeds, flaw))
    return Optima(tuple(found), curvature, over_seeds, over_items)


def _windows(grids: list[_Grid], groups: NDArray[np.int64]) -> tuple[Floats, list[list[_Curve]]]:
    """Where each parabola is fitted: around the tested rate that is nearest to its optimum, begun at the best one."""
    centers = np.array([grid.best for grid in grids])
    curves = [grid.curves(center) for grid, center in zip(grids, centers, strict=True)]
    for _ in range(_MAX_ROUNDS):
        usable = [_has_shape(of_place) for of_place in curves]
        sums = _sums(curves, usable)
        optima = _solve(sums, centers, groups, _own_share(curves, sums, groups, usable))[0][0]
        wanted = np.array([
            grid.nearest(optimum) if np.isfinite(optimum) else center
            for grid, optimum, center in zip(grids, optima, centers, strict=True)
        ])  # fmt: skip
        if np.array_equal(wanted, centers, equal_nan=True):
            break
        centers = wanted
        curves = [grid.curves(center) for grid, center in zip(grids, centers, strict=True)]
    return centers, curves


class _Grid:
    """The cells of one place: its learning rates, which diverged, and mean scores over seeds."""

    def __init__(self, cells: Cells, here: NDArray[np.bool_]) -> None:
        self.u, self.seed = cells.log2_lr[here], cells.seed[here]
        self.diverged, self.items = cells.diverged[here], cells.items[here]
        # A rate at which any seed diverged is no place to train at: it ranks last.
        self.bad = np.unique(self.u[self.diverged])
        good = ~np.isin(self.u, self.bad)
        self.rates = np.unique(self.u[good])
        # Rates and seeds together: a seed that was run at the best rates only has a high level, no bad rates.
        of_rate, of_seed = self.u[good][:, None] == self.rates, self.seed[good][:, None] == np.unique(self.seed[good])
        design = np.concatenate([of_rate, of_seed], axis=1).astype(float)
        means = np.linalg.lstsq(design, self.items[good].mean(axis=1), rcond=None)[0][: len(self.rates)]
        self.best = float(self.rates[int(np.argmax(means))]) if len(means) else np.nan

    def nearest(self, u: float) -> float:
        """The tested rate nearest to `u`."""
        return float(self.rates[np.argmin(np.abs(self.rates - u))])

    def curves(self, center: float) -> list[_Curve]:
        """The points of each seed within the window; u is counted from `center`.

        A seed with one rate there says nothing about the optimum: it is none of those that are counted and resampled.
        """
        if not np.isfinite(center):
            return []
        inside = (np.abs(self.u - center) <= WINDOW + 1e-9) & ~np.isin(self.u, self.bad)
        made = []
        for one in np.unique(self.seed[inside]):
            rows = inside & (self.seed == one)
            if rows.sum() < 2:
                continue
            made.append(_Curve(self.u[rows] - center, self.items[rows]))
        return made


def _has_shape(curves: list[_Curve]) -> bool:
    """Whether a parabola can be told: three different rates."""
    return bool(curves) and len(np.unique(np.concatenate([curve.u for curve in curves]))) >= 3


@dataclass(frozen=True)
class _Sums:
    """Sums of squares and products at each place, levels of seeds taken out; x = u - center, q = x², y the score.

    All (num_resamples, num_places); one row where nothing is resampled.
    """

    xx: Floats
    xq: Floats
    qq: Floats
    xy: Floats
    qy: Floats
    yy: Floats


def _sums(
    curves: list[list[_Curve]],
    usable: list[bool],
    seed_weights: list[Floats] | None = None,
    item_weights: Floats | None = None,
) -> _Sums:
    """Args:
    seed_weights: of each place (num_resamples, num_curves); None: each curve once.
    item_weights: (num_resamples, num_items); None: the mean.
    """
    num = len(seed_weights[0]) if seed_weights else len(item_weights) if item_weights is not None else 1
    made = _Sums(*(np.zeros((num, len(curves))) for _ in range(6)))
    for place, of_place in enumerate(curves):
        if not usable[place]:
            continue
        for position, curve in enumerate(of_place):
            x = curve.u - curve.u.mean()
            q = curve.u**2 - (curve.u**2).mean()
            y = curve.items.mean(axis=1)[:, None] if item_weights is None else curve.items @ item_weights.T
            weight = np.ones(num) if seed_weights is None else seed_weights[place][:, position]
            made.xx[:, place] += weight * (x @ x)
            made.xq[:, place] += weight * (x @ q)
            made.qq[:, place] += weight * (q @ q)
            made.xy[:, place] += weight * (x @ y)
            made.qy[:, place] += weight * (q @ y)
            made.yy[:, place] += weight * ((y - y.mean(axis=0)) ** 2).sum(axis=0)
    return made


def _solve(sums: _Sums, centers: Floats, groups: NDArray[np.int64], own_share: Floats) -> tuple[Floats, Floats]:
    """Least squares of y = level[place, seed] + slope[place] x + curvature[group] x².

    The curvature of a group lies between that of all groups and its own, at `own_share`.

    Args:
        groups: of each place the number of its budget and size, (num_places,).
        own_share: (num_groups,), from 0 to 1.

    Returns:
        optima and curvature, (num_resamples, num_places). An optimum is nan where the parabola bends the other way.
    """
    explained, spread = _of_groups(sums, groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        shared = explained.sum(axis=1, keepdims=True) / spread.sum(axis=1, keepdims=True)
        own = np.where(own_share > 0, own_share * (explained / spread - shared), 0.0)
        curvature = (shared + own)[:, groups]
        slope = np.where(sums.xx > 0, (sums.xy - curvature * sums.xq) / sums.xx, np.nan)
        optima = centers - slope / (2 * curvature)
    optima[~(curvature < 0)] = np.nan
    return optima, curvature


def _of_groups(sums: _Sums, groups: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """(num_resamples, num_groups) q y and q q of each group, slopes taken out: their ratio is its own curvature."""
    of_group = np.eye(groups.max() + 1)[groups]  # (num_places, num_groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope_of_q = np.where(sums.xx > 0, sums.xq / sums.xx, 0.0)
    return (sums.qy - slope_of_q * sums.xy) @ of_group, (sums.qq - slope_of_q * sums.xq) @ of_group


def _own_share(curves: list[list[_Curve]], sums: _Sums, groups: NDArray[np.int64], usable: list[bool]) -> Floats:
    """How far the curvature of each budget and size is its own, (num_groups,): from 0, where they differ by no more
    than noise explains, to 1. The variance between groups over that plus the error of the group's own (DerSimonian and
    Laird, 1986, equation 9).
    """
    explained, spread = (one[0] for one in _of_groups(sums, groups))
    there = spread > 0
    fitted = [of_place for of_place, is_usable in zip(curves, usable, strict=True) if is_usable]
    # A level a curve, a slope a place, a curvature a group.
    num_spare = sum(len(curve.u) - 1 for of_place in fitted for curve in of_place) - len(fitted) - int(there.sum())
    # Scores that are all the same (accuracy at its floor) have no curvature to share.
    if there.sum() < 2 or num_spare < 1 or float(sums.yy.sum()) < _NO_VARIANCE:
        return np.zeros(len(spread))
    own = explained[there] / spread[there]
    with np.errstate(divide="ignore", invalid="ignore"):
        of_slopes = np.where(sums.xx > 0, sums.xy**2 / sums.xx, 0.0).sum()
    rest = float(sums.yy.sum() - of_slopes - (own * explained[there]).sum())
    variance = max(rest / num_spare, 1e-12 * float(sums.yy.sum())) / spread[there]
    weight = 1 / np.maximum(variance, 1e-300)
    mean = (weight * own).sum() / weight.sum()
    excess = (weight * (own - mean) ** 2).sum() - (len(own) - 1)
    between = max(excess / (weight.sum() - (weight**2).sum() / weight.sum()), 0.0)
    shares = np.zeros(len(spread))
    shares[there] = between / (between + variance)
    return shares


def _seed_weights(num_seeds: int, num_resamples: int, draws: np.random.Generator) -> Floats:
    """How often each seed counts, (num_resamples, num_seeds)."""
    if num_seeds < 2:
        return np.ones((num_resamples, num_seeds))
    return draws.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), num_resamples).astype(float)


def _flaw(grid: _Grid, optimum: float, usable: bool, over_seeds: Floats, over_items: Floats) -> Flaw:
    if not usable:
        return "too few rates"
    without = max(float(np.isnan(over_seeds).mean()), float(np.isnan(over_items).mean()))
    if not np.isfinite(optimum) or without > _MAX_SHARE_WITHOUT_OPTIMUM:
        return "no optimum"
    low, high = float(grid.rates[0]), float(grid.rates[-1])
    if optimum <= low or grid.best == low:
        return "lowest rate"
    if optimum >= high or grid.best == high:
        return "next rate diverged" if len(grid.bad) and grid.bad[-1] > high else "highest rate"
    return ""
