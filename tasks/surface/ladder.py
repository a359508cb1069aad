"""The best learning rate of a model that is too large to sweep, from sweeps of smaller ones. Pure.

The optima of the proxies are fitted by log2 LR* = a + alpha log2 B + gamma log2 T + delta log2 N, and the line is
followed to the target. How far it can be trusted is measured twice, by seeds and by the distance of the optima from
the line; the confirmation on the target then says what the prediction cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from smoltulu.tasks.surface.claim import halves
from smoltulu.tasks.surface.optimum import WINDOW, Cells, Optima

Floats = NDArray[np.float64]

LEVEL = 0.05
_AXES = ("batch size", "budget", "size")


@dataclass(frozen=True)
class Prediction:
    """The best learning rate at a place where nothing was run.

    log2_lr     nan where the optima do not tell it
    low, high   95 % limits of the optimum there; nan where nothing tells an error
    slopes      alpha, gamma, delta: octaves of rate for each octave of batch, tokens, size; nan where there was one
    num_optima  that it rests on; num_spare: how many of them are more than the line needs
    problems    what it lacks, in words that name what to do; empty where it lacks nothing
    """

    log2_lr: float
    low: float
    high: float
    slopes: tuple[float, float, float]
    num_optima: int
    num_spare: int
    problems: tuple[str, ...] = ()


def predict(found: Optima, log2_batch: float, log2_tokens: float, log2_size: float) -> Prediction:
    """The optimum at a target from the optima that have no flaw.

    The interval is the wider of two. By the seeds and items, as if the line were exact: Student's t with as many
    degrees of freedom as there are repeated seeds. By the distance of the optima from the line, as for a new
    observation of any regression: it holds whatever makes the optima scatter, and needs an optimum more than the line
    has coefficients.
    """
    good = [position for position, one in enumerate(found.optima) if not one.flaw]
    optima = [found.optima[position] for position in good]
    target = (log2_batch, log2_tokens, log2_size)
    problems = [
        f"batch 2^{one.log2_batch:g}, budget 2^{one.log2_tokens:g}, size 2^{one.log2_size:.1f}: {one.flaw}; extend the "
        "grid there"
        for one in found.optima
        if one.flaw
    ]
    nan = float("nan")
    if not optima:
        return Prediction(nan, nan, nan, (nan, nan, nan), 0, 0, (*problems, "no proxy has a usable optimum"))
    points = np.array([[one.log2_batch, one.log2_tokens, one.log2_size] for one in optima])
    # From the target on: the constant of the line is the prediction itself.
    design = np.concatenate([np.ones((len(optima), 1)), points - np.array(target)], axis=1)
    if untold := _untold(design, points, target):
        return Prediction(nan, nan, nan, (nan, nan, nan), len(optima), 0, (*problems, *untold))
    num_seeds = np.array([float(one.num_seeds) for one in optima])
    # Not by the errors: those of few seeds are small by luck, and their places would count most.
    to_line = np.linalg.pinv(design * np.sqrt(num_seeds)[:, None]) * np.sqrt(num_seeds)  # (4, num_optima)
    weights, line = to_line[0], to_line @ np.array([one.log2_lr for one in optima])
    rest = np.array([one.log2_lr for one in optima]) - design @ line
    num_spare = len(optima) - int(np.linalg.matrix_rank(design))
    by_seeds = _half_width_by_seeds(found, good, weights, int(num_seeds.sum()) - len(optima))
    by_scatter = nan
    if num_spare:
        variance = float(rest @ rest) / num_spare * (1 + float(weights @ weights))
        by_scatter = float(t.ppf(1 - LEVEL / 2, num_spare)) * math.sqrt(variance)
    else:
        problems.append(
            "as many optima as the line has coefficients: nothing tells whether it is a line; add a third size, a "
            "batch or a budget"
        )
    half = float(np.fmax(by_seeds, by_scatter))
    if not math.isfinite(half):
        problems.append("one seed at every place and no optimum to spare: no error can be told; add seeds or sizes")

    def slope(axis: int) -> float:
        is_varied = len(np.unique(points[:, axis])) > 1
        return float(line[1 + axis]) if is_varied and _is_told(design, 1 + axis) else nan

    middle, slopes = float(line[0]), (slope(0), slope(1), slope(2))
    return Prediction(middle, middle - half, middle + half, slopes, len(optima), num_spare, tuple(problems))


def _is_told(design: Floats, coefficient: int) -> bool:
    """Whether least squares has one answer for a coefficient: its unit vector lies in the space of the rows."""
    unit = np.eye(design.shape[1])[coefficient]
    return bool(np.linalg.norm(unit @ np.linalg.pinv(design) @ design - unit) < 1e-6)


def _untold(design: Floats, points: Floats, target: Sequence[float]) -> list[str]:
    """Why the line cannot be followed to the target; empty where it can."""
    if _is_told(design, 0):
        return []
    reasons = [
        f"all usable optima have {what} 2^{values[0]:g} and the target has 2^{wanted:g}: nothing tells what a change "
        f"of {what} does; add a second one to the proxies, or give the target theirs"
        for what, values, wanted in zip(_AXES, points.T, target, strict=True)
        if len(np.unique(values)) == 1 and values[0] != wanted
    ]
    return reasons or [
        "batch, budget and size of the usable optima change together and not as the target's do; vary one alone"
    ]


def _half_width_by_seeds(found: Optima, good: list[int], weights: Floats, num_df: int) -> float:
    """As if the optima lay on the line but for seeds and items; nan where no seed was repeated."""
    if num_df < 1:
        return float("nan")
    of_seeds, of_items = (np.nan_to_num(one[:, good]) @ weights for one in (found.over_seeds, found.over_items))
    return float(t.ppf(1 - LEVEL / 2, num_df)) * math.sqrt(float(of_seeds.var(ddof=1) + of_items.var(ddof=1)))


@dataclass(frozen=True)
class Confirmation:
    """What the target says of the predicted rate, of rates around it.

    octaves     tested rates, from the predicted one (0) on
    means       score of each, larger is better; -inf where a seed diverged
    best        of the tested, by the half of the items that chooses
    regret      what the other half of the items scores more at `best` than at the prediction; inf where that diverged
    optimum     of a parabola through the means; nan where there are fewer than three or it bends the other way
    is_edge     whether the best tested rate is the lowest or the highest
    """

    octaves: tuple[float, ...]
    means: tuple[float, ...]
    best: float
    regret: float
    regret_stderr: float
    optimum: float
    is_edge: bool


def confirm(cells: Cells, log2_lr: float) -> Confirmation:
    """Compare the predicted rate with those around it, on one model at one batch size and budget.

    ValueError: other places among the cells, the predicted rate is none of them, every rate diverged, a rate without
    some of the seeds, or a single item.
    """
    if any(len(np.unique(column)) > 1 for column in (cells.log2_batch, cells.log2_tokens, cells.log2_size)):
        raise ValueError("a confirmation is of one batch size, budget and size; give only the target's cells")
    octaves = np.unique(cells.log2_lr) - log2_lr
    if not (np.abs(octaves) < 1e-9).any():
        raise ValueError(f"no cell has the predicted rate 2^{log2_lr:g}; run it")
    choosing, reporting = halves(cells.items.shape[1])
    if not len(reporting):
        raise ValueError("one item cannot choose and report; give at least two")
    items: dict[float, Floats] = {}  # octave -> (num_seeds, num_items), seeds in order; none where one diverged
    seeds = np.unique(cells.seed)
    for octave in octaves:
        rows = np.flatnonzero(np.abs(cells.log2_lr - log2_lr - octave) < 1e-9)
        if len(rows) < len(seeds):
            raise ValueError(f"rate 2^{log2_lr + octave:g} has {len(rows)} of {len(seeds)} seeds; run the others")
        if not cells.diverged[rows].any():
            items[float(octave)] = cells.items[rows[np.argsort(cells.seed[rows])]]
    if not items:
        raise ValueError("every rate of the confirmation diverged; predict again with proxies at lower rates")
    best = max(items, key=lambda octave: float(items[octave][:, choosing].mean()))
    predicted = next((octave for octave in items if abs(octave) < 1e-9), None)
    regret, stderr = float("inf"), float("nan")
    if predicted is not None:
        difference = items[best][:, reporting] - items[predicted][:, reporting]
        regret, stderr = float(difference.mean()), _stderr(difference)
    means = tuple(float(items[float(octave)].mean()) if float(octave) in items else -math.inf for octave in octaves)
    edges = (float(octaves[0]), float(octaves[-1]))
    return Confirmation(
        tuple(float(x) for x in octaves), means, best, regret, stderr, _top(items), len(octaves) > 1 and best in edges
    )


def _stderr(difference: Floats) -> float:
    """Of the mean of paired differences (num_seeds, num_items), over seeds and over items."""
    num_seeds, num_items = difference.shape
    of_items = difference.mean(axis=0).std(ddof=1) ** 2 / num_items if num_items > 1 else np.nan
    of_seeds = difference.mean(axis=1).std(ddof=1) ** 2 / num_seeds if num_seeds > 1 else 0.0
    return float(np.sqrt(of_items + of_seeds))


def _top(items: dict[float, Floats]) -> float:
    """Where a parabola through the mean scores is highest, within the window that a parabola holds in."""
    octaves = np.array([octave for octave in items if abs(octave) <= WINDOW + 1e-9])
    if len(octaves) < 3:
        return float("nan")
    bend, slope, _ = np.polyfit(octaves, [items[octave].mean() for octave in octaves], 2)
    return float(-slope / (2 * bend)) if bend < 0 else float("nan")


def growth(widths: Sequence[int], magnitudes: Floats) -> Floats:
    """Coordinate check of muP: octaves by which mean |activation| grows for each octave of width, (num_layers,).

    About 0 where the parametrisation transfers; 0.5 or 1 where activations grow with width (arXiv 2203.03466, D.1).

    Args:
        widths: (num_widths,), two at least.
        magnitudes: mean |activation| after a few steps, (num_widths, num_layers).
    """
    octaves = np.log2(np.asarray(widths, dtype=float))
    if len(np.unique(octaves)) < 2:
        raise ValueError(f"widths {list(widths)} are one; give at least two")
    octaves = octaves - octaves.mean()
    return octaves @ np.log2(magnitudes) / (octaves @ octaves)


@dataclass(frozen=True)
class PublishedFit:
    """A law of others for the best learning rate. Shown beside ours, never used.

    num_parameters counts what the source counts: see `note`
    """

    name: str
    source: str
    note: str
    scale: float
    size_exponent: float
    tokens_exponent: float

    def learning_rate(self, num_parameters: float, num_tokens: float) -> float:
        return float(self.scale * num_parameters**self.size_exponent * num_tokens**self.tokens_exponent)


#: Step Law: 3,700 models pretrained from scratch, 60M to 1B parameters.
STEP_LAW = PublishedFit(
    "Step Law", "arXiv 2503.04715", "pretraining from scratch; parameters without embeddings; at its own best batch",
    1.79, -0.713, 0.307,
)  # fmt: skip


def step_law_batch(num_tokens: float) -> float:
    """Step Law's best batch, in tokens (arXiv 2503.04715)."""
    return float(0.58 * num_tokens**0.571)
