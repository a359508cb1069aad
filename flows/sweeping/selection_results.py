"""What a sweep of kind `selection` says so far: arms with their tokens, intervals, and the verdict on each selector."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smoltulu.flows.sweeping.gather import Gathered
from smoltulu.flows.sweeping.selection_rows import TrainedOn, tokens_notes, trained_on, unequal
from smoltulu.schemas.sweep import MIN_RANDOM_SEEDS, MIN_SELECTION_SEEDS, Place, SelectionRoles, SweptTask
from smoltulu.tasks.selection_experiment.verdict import (
    ArmScores,
    Beside,
    Judged,
    NullRate,
    Row,
    beside,
    judge,
    pairs_of_runs,
    table,
    units,
)
from smoltulu.tasks.selection_experiment.words import metric_text, row_text, sign_of, verdict_text

#: Runs of `random` from which on it is told how often they differ from each other.
_MIN_NULL_RUNS = 10
Setting = tuple[float, float, int, str]
ARM_COLUMNS = {
    "setting": "string", "task_class": "string", "task": "string", "metric": "string", "arm": "string",
    "num_seeds": "int64", "mean": "float64", "spread": "float64", "better_than_random": "float64", "low": "float64",
    "high": "float64", "num_rows": "int64", "num_kept_tokens": "int64", "num_trained_tokens": "int64",
    "num_steps": "int64", "num_epochs": "float64",
}  # fmt: skip


@dataclass(frozen=True)
class AtSetting:
    """What there is at one learning rate, batch, budget and size.

    name   in words; empty where the sweep has one alone
    rows   every arm on every class and task
    beside selectors beside arms that are no controls: full, full at equal epochs, lowest, each other
    cells  arm -> what its cells trained on
    null   how often two runs of `random` differ; None of few runs
    """

    name: str
    rows: tuple[Row, ...]
    beside: tuple[Beside, ...]
    cells: Mapping[str, tuple[TrainedOn | None, ...]]
    notes: tuple[str, ...]
    null: NullRate | None

    @property
    def null_text(self) -> str:
        """How often two runs of `random` differ; empty where that is not known."""
        if self.null is None:
            return ""
        found, pairs = self.null.num_found, self.null.num_pairs
        return f"{found} of {pairs} pairs of its {self.null.num_runs} runs differ ({self.null.share:.1%})"

    def shown(self) -> dict[str, Any]:
        """For the page."""
        tokens = [
            {"arm": arm, "texts": _token_texts(cells)} for arm, cells in self.cells.items() if any(one for one in cells)
        ]
        null = f"random against random: {self.null_text}" if self.null_text else ""
        return {
            "name": self.name, "rows": self.rows, "beside": self.beside, "notes": self.notes, "tokens": tokens,
            "null": null,
        }  # fmt: skip


def _token_texts(cells: Sequence[TrainedOn | None]) -> list[str]:
    """Seeds, rows, kept tokens, trained tokens, steps, epochs: of several cells from the fewest to the most."""
    known = [one for one in cells if one is not None]

    def span(values: list[float], digits: int = 0) -> str:
        texts = [f"{value:,.{digits}f}" for value in (min(values), max(values))]
        return texts[0] if texts[0] == texts[1] else " to ".join(texts)

    kept = [float(one.num_kept_tokens) for one in known if one.num_kept_tokens is not None]
    return [
        str(len(cells)),
        span([one.num_rows for one in known]),
        span(kept) if kept else "all",
        span([one.num_trained_tokens for one in known]),
        span([one.num_steps for one in known]),
        span([one.num_epochs for one in known], 2),
    ]


@dataclass(frozen=True)
class Experiment:
    """All that is said."""

    roles: SelectionRoles
    classes: Mapping[str, tuple[SweptTask, ...]]
    settings: tuple[AtSetting, ...]
    judged: tuple[Judged, ...]
    num_tests: int

    def lines(self) -> list[str]:
        """For a terminal."""
        made = []
        for one in self.settings:
            at = f"{one.name}, " if one.name else ""
            for row in one.rows:
                if row.task is None:
                    made.append(f"arm       {at}{row_text(row, self.classes[row.task_class])}")
            made += [f"tokens    {at}{note}" for note in one.notes]
            if one.null_text:
                made.append(f"random    {at}{one.null_text}")
        return made + [f"verdict   {verdict_text(one)}" for one in self.judged]


def experiment_of(found: Gathered) -> Experiment:
    """Everything that is said of what a sweep of this kind has measured so far. ValueError: other items in two arms."""
    roles = found.sweep.selection
    assert roles is not None
    _check_items(found)
    classes = units(found.sweep.tasks)
    runs, cells = _by_setting(found)
    judged_at = [at for at, arms in runs.items() if roles.random in arms and set(roles.selectors) & arms.keys()]
    names = {at: _name(at, found) if len(judged_at) > 1 else "" for at in judged_at}
    fewest = dict.fromkeys(roles.arms, MIN_SELECTION_SEEDS) | {roles.random: MIN_RANDOM_SEEDS}
    apart = {names[at]: unequal(_known(cells[at])) for at in judged_at}
    judged = judge({names[at]: runs[at] for at in judged_at}, roles, classes, fewest, apart)
    settings = [_at(names[at], at, runs, cells, roles, classes) for at in judged_at]
    return Experiment(roles, classes, tuple(settings), tuple(judged), sum(len(one.against) for one in judged))


def _at(
    name: str,
    at: Setting,
    runs: Mapping[Setting, Mapping[str, ArmScores]],
    cells: Mapping[Setting, Mapping[str, tuple[TrainedOn | None, ...]]],
    roles: SelectionRoles,
    classes: Mapping[str, Sequence[SweptTask]],
) -> AtSetting:
    arms = runs[at]
    others = {
        arm: arms[arm] for arm in (*roles.selectors[1:], roles.lowest, roles.full) if arm is not None and arm in arms
    }
    for other, elsewhere in runs.items():
        is_like = (other[0], other[1], other[3]) == (at[0], at[1], at[3])
        if is_like and other != at and roles.full is not None and roles.full in elsewhere:
            own = [one for one in cells[other][roles.full] if one is not None]
            epochs = f"{own[0].num_epochs:.1f} epochs" if own else f"{other[2]:,} tokens"
            others[f"{roles.full} at {epochs}"] = elsewhere[roles.full]
    control = arms[roles.random]
    null = pairs_of_runs(control, classes) if control.num_seeds >= _MIN_NULL_RUNS else None
    return AtSetting(
        name,
        tuple(table(arms, roles, classes)),
        tuple(beside(arms, others, roles, classes)),
        cells[at],
        tuple(tokens_notes(cells[at])),
        null,
    )


def _by_setting(
    found: Gathered,
) -> tuple[dict[Setting, dict[str, ArmScores]], dict[Setting, dict[str, tuple[TrainedOn | None, ...]]]]:
    runs: dict[Setting, dict[str, ArmScores]] = defaultdict(dict)
    cells: dict[Setting, dict[str, tuple[TrainedOn | None, ...]]] = defaultdict(dict)
    for arm, scores in found.scores.items():
        of_setting: dict[Setting, list[int]] = defaultdict(list)
        for number, record in enumerate(scores[0].of):
            of_setting[record.place.setting].append(number)
        diverged = scores[0].cells.diverged
        for at, numbers in of_setting.items():
            whole = [number for number in numbers if not diverged[number]]
            tasks = {one.task: one.cells.items[whole] for one in scores}
            runs[at][arm] = ArmScores(tasks, len(numbers) - len(whole))
            cells[at][arm] = tuple(trained_on(found.store_root, scores[0].of[number]) for number in whole)
    return runs, cells


def _known(cells: Mapping[str, Sequence[TrainedOn | None]]) -> dict[str, list[TrainedOn]]:
    return {name: [one for one in own if one is not None] for name, own in cells.items()}


def _name(at: Setting, found: Gathered) -> str:
    place = Place(log2_learning_rate=at[0], log2_batch=at[1], seed=0, max_tokens=at[2], size=at[3])
    size = f", {place.size}" if len(found.sweep.sizes) > 1 else ""
    return f"rate {place.learning_rate:.3g}, batch {place.effective_batch_size}, {place.max_tokens:,} tokens{size}"


def _check_items(found: Gathered) -> None:
    """ValueError where two arms were not measured on the same items: their differences are by item."""
    for number, task in enumerate(found.sweep.tasks):
        items = {arm: scores[number].items for arm, scores in found.scores.items()}
        first = next(iter(items), "")
        if odd := [arm for arm in items if items[arm] != items[first]]:
            raise ValueError(
                f"sweep {found.sweep.name}: arms {first} and {odd[0]} have other items of {task.task}; evaluate both "
                "with the same data"
            )


def arm_rows(experiment: Experiment) -> list[dict[str, Any]]:
    """For a table: a row for every arm on every class (without a task) and task. Means as the metric is spelt."""
    rows = []
    for one in experiment.settings:
        for row in one.rows:
            tasks = (row.task,) if row.task else experiment.classes[row.task_class]
            known = [cell for cell in one.cells.get(row.arm, ()) if cell is not None]
            trained = known[0] if known else None
            rows.append({
                "setting": one.name or None, "task_class": row.task_class, "task": row.task.task if row.task else None,
                "metric": metric_text(tasks), "arm": row.arm, "num_seeds": len(row.runs),
                "mean": sign_of(tasks) * row.mean,
                "spread": row.spread, "better_than_random": row.against.difference if row.against else None,
                "low": row.against.low if row.against else None, "high": row.against.high if row.against else None,
                "num_rows": trained and trained.num_rows, "num_kept_tokens": trained and trained.num_kept_tokens,
                "num_trained_tokens": trained and trained.num_trained_tokens,
                "num_steps": trained and trained.num_steps,
                "num_epochs": trained.num_epochs if trained and math.isfinite(trained.num_epochs) else None,
            })  # fmt: skip
    return rows
