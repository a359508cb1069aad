"""What a size ladder says so far: its prediction, what the target says of it, and its page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from smoltulu.artifacts.files import write_atomically
from smoltulu.artifacts.readable import json_text
from smoltulu.flows.recipe import load_recipe
from smoltulu.flows.sweeping.extension import with_extension
from smoltulu.flows.sweeping.scores import TaskScores, load_scores
from smoltulu.flows.sweeping.states import CellState, State, counts_of, remembered, states_of, sweep_folder
from smoltulu.schemas.common import first_problem
from smoltulu.schemas.ladder import STEPS_PER_OCTAVE, LadderSettings
from smoltulu.schemas.sweep import SweepSettings, SweptTask, overrides_of, places
from smoltulu.tasks.surface.ladder import Confirmation, Prediction, confirm, predict
from smoltulu.tasks.surface.optimum import Optima, find_optima

#: A target that is further above the proxies than they are apart, times this, is a leap.
_MAX_REACH = 2.0


@dataclass(frozen=True)
class TaskLadder:
    """What one score says. confirmation: None where the target was not trained yet."""

    task: SweptTask
    optima: Optima
    prediction: Prediction
    confirmation: Confirmation | None = None


@dataclass(frozen=True)
class LadderResult:
    """What a ladder says so far.

    log2_lr    the predicted rate as the target is trained with it; None where nothing can be predicted
    counts     of the cells of proxies and confirmation, in each state
    problems   what it lacks
    """

    ladder: LadderSettings
    tasks: tuple[TaskLadder, ...]
    log2_lr: float | None
    counts: dict[str, dict[State, int]]
    problems: tuple[str, ...]

    @property
    def decisive(self) -> TaskLadder:
        """The score whose prediction the target tests."""
        return self.tasks[self.ladder.decisive]


def result_of(ladder: LadderSettings, store_root: Path) -> LadderResult:
    """What the finished cells say.

    ValueError: the proxies were never run in this store, none of them has scores, or these do not belong together.
    """
    folder = sweep_folder(store_root, ladder.proxies.name)
    proxies = with_extension(ladder.proxies, folder)
    states = _states(proxies, store_root)
    counts = {proxies.name: counts_of(states)}
    target = ladder.target
    at = (target.log2_batch, math.log2(target.max_tokens), math.log2(target.num_parameters))
    made = []
    for scores in load_scores(proxies, store_root, states):
        optima = find_optima(scores.cells)
        made.append(TaskLadder(scores.task, optima, predict(optima, *at)))
    prediction = made[ladder.decisive].prediction
    problems = [*_unfinished(proxies, states, "the prediction may move"), *prediction.problems]
    if not math.isfinite(prediction.log2_lr):
        return LadderResult(ladder, tuple(made), None, counts, tuple(problems))
    if (leap := _leap(ladder)) is not None:
        problems.append(leap)
    log2_lr = round(prediction.log2_lr * STEPS_PER_OCTAVE) / STEPS_PER_OCTAVE
    try:
        confirmation = ladder.confirmation(log2_lr)
    except ValidationError as error:
        problems.append(f"the target cannot be trained around 2^{log2_lr:g}: {first_problem(error)}")
        return LadderResult(ladder, tuple(made), None, counts, tuple(problems))
    if (sweep_folder(store_root, confirmation.name) / "cells.json").exists():
        states = _states(confirmation, store_root)
        counts[confirmation.name] = counts_of(states)
        problems += _unfinished(confirmation, states, "the prediction is not tested to the end")
        if states and all(one.state in ("done", "diverged") for one in states):
            confirmed, why = _confirmed(confirmation, store_root, states, log2_lr)
            problems += why
            if len(target.seeds) == 1 and not why:
                problems.append(
                    "the target was trained with one seed: the error of its regret is that of the items alone; give "
                    "target.seeds more"
                )
            made = [
                TaskLadder(one.task, one.optima, one.prediction, found)
                for one, found in zip(made, confirmed, strict=True)
            ]
    return LadderResult(ladder, tuple(made), log2_lr, counts, tuple(problems))


def _states(sweep: SweepSettings, store_root: Path) -> list[CellState]:
    """Of the cells that a sweep has now; others were asked for before. ValueError where it was never run."""
    folder, wanted = sweep_folder(store_root, sweep.name), places(sweep)
    return states_of(store_root, folder, [one for one in remembered(folder) if one.place in wanted])


def _unfinished(sweep: SweepSettings, states: Sequence[CellState], so: str) -> list[str]:
    """A problem where cells that a sweep has now were not run, or failed."""
    num_cells = len(places(sweep))
    left = num_cells - sum(one.state in ("done", "diverged") for one in states)
    return [f"{left:,} of {num_cells:,} cells of {sweep.name} are not finished: {so}; run it again"] if left else []


def _confirmed(
    sweep: SweepSettings, store_root: Path, states: Sequence[CellState], log2_lr: float
) -> tuple[list[Confirmation | None], list[str]]:
    """The confirmation by every score, and why there is none."""
    none: list[Confirmation | None] = [None] * len(sweep.tasks)
    if all(one.state == "diverged" for one in states):
        return none, ["every training of the target diverged; extend the proxies to lower rates, and predict again"]
    try:
        scores: list[TaskScores] = load_scores(sweep, store_root, states)
        return [confirm(one.cells, log2_lr) for one in scores], []
    except ValueError as error:
        return none, [str(error)]


def _leap(ladder: LadderSettings) -> str | None:
    sizes = [math.log2(size.num_parameters or 1) for size in ladder.proxy_sizes.values()]
    reach, span = math.log2(ladder.target.num_parameters) - max(sizes), max(sizes) - min(sizes)
    if reach <= _MAX_REACH * span:
        return None
    return (
        f"the target is {reach:.1f} octaves of size above the largest proxy, and the proxies are only {span:.1f} "
        "apart; a proxy between them would tell more"
    )


def lines_of(result: LadderResult) -> list[str]:
    """The answer, for a log or a terminal."""
    told, lines = result.decisive, []
    found = told.prediction
    name = f"{told.task.task} ({told.task.metric})"
    if result.log2_lr is None:
        lines.append(f"{name}: no prediction for the target")
    else:
        lines.append(
            f"{name}: predicted learning rate {2**result.log2_lr:.3g} (2^{found.log2_lr:.2f}, 95 % "
            f"{_limit(found.low)} to {_limit(found.high)})"
        )
    if (confirmed := told.confirmation) is not None:
        regret = f"{confirmed.regret:.4g}" + (
            f" ± {confirmed.regret_stderr:.2g}" if math.isfinite(confirmed.regret_stderr) else ""
        )
        where = "at the predicted rate" if abs(confirmed.best) < 1e-9 else f"at {2**confirmed.best:g} times it"
        lines.append(f"confirmation: the best tested rate is {where}; regret {regret}")
        if confirmed.is_edge:
            lines.append("the best tested rate is the last one: widen target.octaves to see how far the best one is")
    return lines + [f"note: {problem}" for problem in result.problems]


def _limit(log2_lr: float) -> str:
    return f"{2**log2_lr:.2g}" if math.isfinite(log2_lr) else "unknown"


def write_ladder(ladder: LadderSettings, store_root: Path) -> Path:
    """Write the page of a ladder with its figure (SVG, PDF) and its values (JSON) into its folder. Returns the page.

    Errors: as `result_of`.
    """
    from smoltulu.tasks.surface.ladder_page import draw, html

    result = result_of(ladder, store_root)
    folder = sweep_folder(store_root, ladder.name)
    folder.mkdir(parents=True, exist_ok=True)
    target = ladder.target
    drawn = []
    for number, one in enumerate(result.tasks):
        svg, pdf = draw(
            one.optima,
            one.prediction,
            one.confirmation,
            (target.log2_batch, math.log2(target.max_tokens), math.log2(target.num_parameters)),
            result.log2_lr,
            f"{one.task.task}, {one.task.metric}",
            ladder.overlays,
        )
        stem = "ladder" if number == ladder.decisive else f"ladder-{number}"
        write_atomically(folder / f"{stem}.svg", svg)
        (folder / f"{stem}.pdf").write_bytes(pdf)
        drawn.append(svg)
    write_atomically(folder / "ladder.json", json_text(_values(result), indent=1))
    page = folder / "ladder.html"
    write_atomically(page, html(result_rows(result), drawn, ladder, is_transfer(ladder), lines_of(result)))
    return page


def result_rows(result: LadderResult) -> list[dict[str, Any]]:
    """A row for every score: where the optima are, what they predict, what the target said."""
    rows = []
    for one in result.tasks:
        found, confirmed = one.prediction, one.confirmation
        rows.append(
            {
                "task": one.task.task,
                "metric": one.task.metric,
                "is_decisive": one is result.decisive,
                "predicted": found.log2_lr,
                "low": found.low,
                "high": found.high,
                "slopes": found.slopes,
                "num_optima": found.num_optima,
                "num_spare": found.num_spare,
                "confirmation": None if confirmed is None else asdict(confirmed),
                "problems": list(found.problems),
            }
        )
    return rows


def _values(result: LadderResult) -> dict[str, Any]:
    values = {
        "ladder": result.ladder.model_dump(mode="json"),
        "log2_lr": result.log2_lr,
        "tasks": result_rows(result),
        "optima": [[asdict(o) for o in one.optima.optima] for one in result.tasks],
        "problems": list(result.problems),
    }
    return _without_nan(values)


def _without_nan(value: Any) -> Any:
    """JSON has no nan and no inf: None."""
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def is_transfer(ladder: LadderSettings) -> bool:
    """Whether all sizes are made from nothing with one muP and heads of one width, so that a rate is meant to carry
    over.
    """
    whole = ladder.whole()
    first = {place.size: place for place in reversed(places(whole))}.values()
    recipes = [load_recipe(whole.recipe, overrides_of(whole, place)) for place in first]
    made = [one.base_model.scratch for one in recipes]
    if any(getattr(getattr(one, whole.stage), "mup_base_width", None) is None for one in recipes):
        return False
    shared = {
        scratch and (scratch.mup, scratch.initializer_range, scratch.hidden_size // scratch.num_attention_heads)
        for scratch in made
    }
    return len(shared) == 1 and all(scratch is not None and scratch.mup is not None for scratch in made)
