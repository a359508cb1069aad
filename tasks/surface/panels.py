"""What the figures of a sweep show, as arrays: surfaces, ridges, slices. Pure; `figures.py` draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from smoltulu.schemas.sweep import SweptTask
from smoltulu.tasks.surface.accounts import LEVEL
from smoltulu.tasks.surface.analysis import Analysis, TaskAnalysis
from smoltulu.tasks.surface.optimum import WINDOW, Cells, Optima, main_budget

Floats = NDArray[np.float64]

#: Share of the places, the worst ones, that have the lightest colour all: one bad rate must not flatten the rest.
_CLIPPED = 0.1


@dataclass(frozen=True)
class RidgePoint:
    """Best learning rate at a batch size: log2, with its 95 % interval (nan where single seeds tell none).

    check  the same by the Gaussian process; nan where it has too few rates
    flaw   why it may not be used; empty where it may
    """

    log2_batch: float
    log2_lr: float
    low: float
    high: float
    check: float
    flaw: str = ""


@dataclass(frozen=True)
class Slice:
    """Scores over learning rates at one batch size.

    log2_lr, mean, stderr  (num_rates,), over seeds; stderr is nan of a single seed
    curve_lr, curve        the fitted parabola within its window; empty where there is none
    diverged               log2 learning rates at which a seed diverged
    """

    log2_batch: float
    log2_lr: Floats
    mean: Floats
    stderr: Floats
    diverged: Floats
    curve_lr: Floats = field(default_factory=lambda: np.zeros(0))
    curve: Floats = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True)
class Panel:
    """One task at one budget and size; scores as the metric is spelt.

    log2_batch, log2_lr, score, num_seeds      (num_places,), means over seeds
    runs                                       (num_runs, 2), log2 batch and log2 LR of every run that ended with scores
    diverged                                   (num_diverged_places, 2), the same of places where a seed diverged
    """

    log2_tokens: float
    log2_size: float
    log2_batch: Floats
    log2_lr: Floats
    score: Floats
    num_seeds: NDArray[np.int64]
    runs: Floats
    diverged: Floats
    ridge: tuple[RidgePoint, ...]
    slices: tuple[Slice, ...]

    @property
    def centre(self) -> tuple[float, float] | None:
        """Where the iso-lines cross: the mean of the usable optima; None without one."""
        usable = [(one.log2_batch, one.log2_lr) for one in self.ridge if not one.flaw]
        return (float(np.mean([b for b, _ in usable])), float(np.mean([u for _, u in usable]))) if usable else None


@dataclass(frozen=True)
class TaskPanels:
    """The panels of one score of a task, small budgets first, with one colour scale.

    low, high  ends of the scale; the worst tenth of the places lies below it
    """

    task: SweptTask
    arm: str
    panels: tuple[Panel, ...]
    low: float
    high: float
    main: int = 0

    @property
    def name(self) -> str:
        """For people: `gsm8k, bits_per_byte`."""
        return f"{self.task.task}, {self.task.metric.removesuffix(',none')}"


def panels_of(one: TaskAnalysis, arm: str) -> TaskPanels:
    """Panels of a task, one for every budget and size that has cells."""
    cells, sign = one.cells, -1.0 if one.task.lower_is_better else 1.0
    half = ridge_half_widths(one.found)
    made = []
    for size, tokens in sorted({*zip(cells.log2_size.tolist(), cells.log2_tokens.tolist(), strict=True)}):
        here = (cells.log2_tokens == tokens) & (cells.log2_size == size)
        made.append(_panel(one, here, tokens, size, sign, half))
    scores = np.concatenate([panel.score for panel in made])
    low, high = _scale(scores, one.task.lower_is_better)
    return TaskPanels(one.task, arm, tuple(made), low, high, _main_panel(one.found, made))


def ridge_half_widths(found: Optima) -> Floats:
    """Half of the 95 % interval of each optimum, (num_optima,), with the degrees of freedom of all of them."""
    num_df = sum(one.num_seeds - 1 for one in found.optima if not one.flaw)
    stderr = np.array([one.stderr for one in found.optima])
    return t.ppf(1 - LEVEL / 2, num_df) * stderr if num_df > 0 else np.full(len(stderr), np.nan)


def _main_panel(found: Optima, panels: Sequence[Panel]) -> int:
    main = main_budget(found.optima)
    of_main = [number for number, panel in enumerate(panels) if panel.log2_tokens == main]
    return max(of_main, key=lambda number: len(panels[number].runs) + len(panels[number].diverged))


def _scale(scores: Floats, lower_is_better: bool) -> tuple[float, float]:
    if not len(scores):
        return 0.0, 1.0
    low, high = float(scores.min()), float(scores.max())
    if lower_is_better:
        high = float(np.quantile(scores, 1 - _CLIPPED))
    else:
        low = float(np.quantile(scores, _CLIPPED))
    margin = 1e-9 + 1e-6 * max(abs(low), abs(high))
    return (low, high) if high - low > margin else (low - 0.5, high + 0.5)


def _panel(one: TaskAnalysis, here: NDArray[np.bool_], tokens: float, size: float, sign: float, half: Floats) -> Panel:
    cells = one.cells
    batch, lr, diverged = cells.log2_batch[here], cells.log2_lr[here], cells.diverged[here]
    score = sign * cells.items[here].mean(axis=1)
    keys = np.stack([batch, lr], axis=1)
    spoiled = np.unique(keys[diverged], axis=0)
    places, of_run = np.unique(keys, axis=0, return_inverse=True)
    good = np.array([not (spoiled == place).all(axis=1).any() for place in places], dtype=bool)
    of_run = of_run.ravel()
    means = np.array([score[of_run == n].mean() if good[n] else np.nan for n in range(len(places))])
    counts = np.bincount(of_run, minlength=len(places))
    at = [n for n, o in enumerate(one.found.optima) if o.log2_tokens == tokens and o.log2_size == size]
    ridge = []
    for number in at:
        found = one.found.optima[number]
        middle, width = found.log2_lr, half[number]
        ridge.append(
            RidgePoint(
                found.log2_batch, middle, float(middle - width), float(middle + width), one.checks[number], found.flaw
            )
        )
    slices = tuple(
        _slice(lr[batch == b], score[batch == b], diverged[batch == b], b, one, at, sign) for b in np.unique(batch)
    )
    return Panel(
        tokens, size, places[good, 0], places[good, 1], means[good], counts[good], keys[~diverged], spoiled,
        tuple(ridge), slices,
    )  # fmt: skip


def _slice(
    lr: Floats, score: Floats, diverged: NDArray[np.bool_], batch: float, one: TaskAnalysis, at: list[int], sign: float
) -> Slice:
    bad = np.unique(lr[diverged])
    rates = np.setdiff1d(lr, bad)
    means = np.array([score[lr == rate].mean() for rate in rates])
    errors = np.array([_stderr(score[lr == rate]) for rate in rates])
    curve_lr, curve = np.zeros(0), np.zeros(0)
    (number,) = [n for n in at if one.found.optima[n].log2_batch == batch]
    best, bend = one.found.optima[number].log2_lr, sign * float(one.found.curvature[number])
    if np.isfinite(best) and np.isfinite(bend):
        nearest = rates[np.argmin(np.abs(rates - best))]
        inside = np.abs(rates - nearest) <= WINDOW + 1e-9
        level = float(np.mean(means[inside] - bend * (rates[inside] - best) ** 2))
        curve_lr = np.linspace(rates[inside].min(), rates[inside].max(), 33)
        curve = level + bend * (curve_lr - best) ** 2
    return Slice(float(batch), rates, means, errors, bad, curve_lr, curve)


def _stderr(values: Floats) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def paper_panels(analysis: Analysis) -> list[tuple[TaskPanels, Panel]]:
    """For the paper's own figure: a panel for each task at the main budget, by accuracy where it was measured."""
    chosen: dict[str, TaskAnalysis] = {}
    for one in analysis.tasks:
        held = chosen.get(one.task.task)
        if held is None or (held.task.lower_is_better and not one.task.lower_is_better):
            chosen[one.task.task] = one
    made = [panels_of(one, analysis.arm) for one in chosen.values()]
    return [(one, one.panels[one.main]) for one in made]


def arms_of(analyses: Sequence[Analysis], task: SweptTask) -> dict[str, tuple[RidgePoint, ...]]:
    """Arm -> the usable optima of a task at the main budget of the first arm and at the size with the most of them."""
    ridges: dict[str, tuple[RidgePoint, ...]] = {}
    tokens: float | None = None
    for analysis in analyses:
        for one in analysis.tasks:
            if one.task != task:
                continue
            panels = panels_of(one, analysis.arm)
            main = panels.panels[panels.main]
            tokens = main.log2_tokens if tokens is None else tokens
            same = [
                panel for panel in panels.panels if (panel.log2_tokens, panel.log2_size) == (tokens, main.log2_size)
            ]
            ridges[analysis.arm] = tuple(point for panel in same for point in panel.ridge if not point.flaw)
    return ridges


def is_drawable(panel: Panel) -> bool:
    """Whether contours can be drawn: three places or more that lie on no line."""
    if len(panel.score) < 3:
        return False
    points = np.stack([panel.log2_batch, panel.log2_lr], axis=1)
    return bool(np.linalg.matrix_rank(points - points.mean(axis=0), tol=1e-9) == 2)


def all_diverged(cells: Cells) -> bool:
    """Whether no cell has scores."""
    return bool(cells.diverged.all())
