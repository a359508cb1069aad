"""What an experiment with selected rows says: whether each selector beats its controls, for each class of tasks. Pure.

A selector that beats `random` alone may only have found long rows, and one that beats `longest` alone may be no better
than chance (arXiv 2410.15225, 2410.09335). So there is one good verdict, `beats random and longest`, and all else is
`does not`. All tests of an experiment are adjusted together (Holm). Classes are never averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from smoltulu.schemas.sweep import SelectionRoles, SweptTask
from smoltulu.tasks.comparison.paired import holm
from smoltulu.tasks.selection_experiment.compare import Difference, Spread, compare, spread_of

Floats = NDArray[np.float64]
LEVEL = 0.05
Word = Literal["beats random and longest", "does not", "no verdict"]


@dataclass(frozen=True)
class ArmScores:
    """What the runs of an arm scored.

    tasks          (num_seeds, num_items) of each task, larger is better; runs that diverged are left out
    num_diverged   of them
    """

    tasks: Mapping[SweptTask, Floats]
    num_diverged: int = 0

    @property
    def num_seeds(self) -> int:
        """Runs with scores."""
        return len(next(iter(self.tasks.values()))) if self.tasks else 0


@dataclass(frozen=True)
class Against:
    """A selector against a control. adjusted: the p-value, together with all others of the experiment (Holm)."""

    control: str
    test: Difference
    adjusted: float

    @property
    def is_better(self) -> bool:
        """The selector is."""
        return self.adjusted < LEVEL and self.test.difference > 0

    @property
    def is_worse(self) -> bool:
        """The selector is."""
        return self.adjusted < LEVEL and self.test.difference < 0


@dataclass(frozen=True)
class Judged:
    """A selector on a class of tasks.

    setting  rate, batch and budget, in words
    against  random, then longest; empty where there is no verdict
    reason   why there is none
    """

    setting: str
    selector: str
    task_class: str
    word: Word
    against: tuple[Against, ...]
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """An arm on a class, or on one task of it, beside `random`.

    runs     mean over items and tasks of each seed; larger is better
    against  arm - random; None of random itself, and where either has a single run
    """

    arm: str
    task_class: str
    task: SweptTask | None
    runs: tuple[float, ...]
    against: Difference | None

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.runs))

    @property
    def spread(self) -> float | None:
        """Standard deviation from seed to seed; None of a single run."""
        return float(np.std(self.runs, ddof=1)) if len(self.runs) > 1 else None


@dataclass(frozen=True)
class Beside:
    """A selector beside another arm that is no control: shown with an interval that is not adjusted, and not judged."""

    selector: str
    other: str
    task_class: str
    test: Difference


def units(tasks: Iterable[SweptTask]) -> dict[str, tuple[SweptTask, ...]]:
    """Class -> its tasks, one score of each: the one that the sweep names first. A second one is no second task."""
    first: dict[str, SweptTask] = {}
    for task in tasks:
        first.setdefault(task.task, task)
    classes = dict.fromkeys(task.task_class for task in first.values())
    return {name: tuple(task for task in first.values() if task.task_class == name) for name in classes}


def judge(
    settings: Mapping[str, Mapping[str, ArmScores]],
    roles: SelectionRoles,
    classes: Mapping[str, Sequence[SweptTask]],
    fewest: Mapping[str, int],
    unequal: Mapping[str, str] = {},
) -> list[Judged]:
    """The verdict on every selector and class, at every setting; all tests are of one family.

    Args:
        settings: rate, batch and budget in words -> arm -> its runs there.
        classes: as `units` gives them.
        fewest: arm -> seeds that it needs.
        unequal: setting -> why its arms are not at equal tokens; then it has no verdict.
    """
    controls = (roles.random, roles.longest)
    reasons, tests = {}, dict[tuple[str, str, str, str], Difference]()
    for setting, arms in settings.items():
        for selector in roles.selectors:
            reason = unequal.get(setting) or _missing(selector, controls, arms, fewest)
            reasons[setting, selector] = reason
            for name, tasks in classes.items() if not reason else ():
                for control in controls:
                    tests[setting, selector, name, control] = _compared(
                        arms[selector], arms[control], tasks, is_one_draw=control == roles.random
                    )
    adjusted = dict(zip(tests, holm([one.p_value for one in tests.values()]), strict=True))
    judged = []
    for (setting, selector), reason in reasons.items():
        for name in classes:
            if reason:
                judged.append(Judged(setting, selector, name, "no verdict", (), reason))
                continue
            at = [(setting, selector, name, control) for control in controls]
            against = tuple(Against(one[-1], tests[one], adjusted[one]) for one in at)
            word: Word = "beats random and longest" if all(one.is_better for one in against) else "does not"
            judged.append(Judged(setting, selector, name, word, against))
    return judged


def _compared(
    arm: ArmScores, control: ArmScores, tasks: Sequence[SweptTask], *, is_one_draw: bool = False
) -> Difference:
    ours, theirs = ([side.tasks[task] for task in tasks] for side in (arm, control))
    return compare(ours, theirs, is_one_draw=is_one_draw)


def _missing(selector: str, controls: Sequence[str], arms: Mapping[str, ArmScores], fewest: Mapping[str, int]) -> str:
    for name in (selector, *controls):
        own = arms.get(name, ArmScores({}))
        if own.num_diverged:
            return f"{own.num_diverged} of the runs of arm {name} diverged; lower the learning rate"
        if own.num_seeds < fewest[name]:
            return f"arm {name} has scores of {own.num_seeds} seeds, {fewest[name]} are needed; run the rest"
    return ""


def table(
    arms: Mapping[str, ArmScores], roles: SelectionRoles, classes: Mapping[str, Sequence[SweptTask]]
) -> list[Row]:
    """Every arm with scores on every class and on each of its tasks, by the order of roles. Intervals: not adjusted."""
    rows = []
    for name, tasks in classes.items():
        for task in (None, *tasks):
            wanted = tasks if task is None else (task,)
            for arm in roles.arms:
                if arm in arms and arms[arm].num_seeds:
                    rows.append(_row(arm, name, task, wanted, arms, roles))
    return rows


def _row(
    arm: str,
    name: str,
    task: SweptTask | None,
    wanted: Sequence[SweptTask],
    arms: Mapping[str, ArmScores],
    roles: SelectionRoles,
) -> Row:
    own, random = [arms[arm].tasks[one] for one in wanted], roles.random
    num_seeds, num_control = arms[arm].num_seeds, arms[random].num_seeds if random in arms else 0
    against = None
    if arm != random and min(num_seeds, num_control) > 1:
        against = _compared(arms[arm], arms[random], wanted, is_one_draw=arm in roles.selectors)
    runs = np.mean([one.mean(axis=1) for one in own], axis=0)
    return Row(arm, name, task, tuple(map(float, runs)), against)


def beside(
    arms: Mapping[str, ArmScores],
    others: Mapping[str, ArmScores],
    roles: SelectionRoles,
    classes: Mapping[str, Sequence[SweptTask]],
) -> list[Beside]:
    """Every selector beside every other arm of `others` (in words -> its runs), where both have two runs or more."""
    return [
        Beside(selector, other, name, _compared(arms[selector], runs, tasks))
        for name, tasks in classes.items()
        for selector in roles.selectors
        for other, runs in others.items()
        if other != selector and selector in arms and min(arms[selector].num_seeds, runs.num_seeds) > 1
    ]


@dataclass(frozen=True)
class NullRate:
    """How often the rule finds a difference between runs of which none is better.

    num_pairs   pairs of single runs; num_found: of them, in any class after Holm
    """

    num_runs: int
    num_pairs: int
    num_found: int

    @property
    def share(self) -> float:
        """Of pairs."""
        return self.num_found / self.num_pairs


def pairs_of_runs(runs: ArmScores, classes: Mapping[str, Sequence[SweptTask]]) -> NullRate:
    """Each run of `random` against each other: a rule that is right finds something in 5 % of pairs, or in fewer.

    A single run does not tell the spread from run to run, so that of all of them is taken.
    """
    spreads: dict[str, Spread] = {name: spread_of([runs.tasks[one] for one in classes[name]]) for name in classes}
    num_found = 0
    pairs = list(combinations(range(runs.num_seeds), 2))
    for one, other in pairs:
        p_values = []
        for name, tasks in classes.items():
            sides = [[runs.tasks[task][[which]] for task in tasks] for which in (one, other)]
            p_values.append(compare(sides[0], sides[1], spreads[name]).p_value)
        num_found += min(holm(p_values)) < LEVEL
    return NullRate(runs.num_seeds, len(pairs), num_found)


def groups_of_runs(
    runs: ArmScores, classes: Mapping[str, Sequence[SweptTask]], num_seeds: tuple[int, int], num_draws: int, seed: int
) -> NullRate:
    """The rule as it is used, on `num_draws` draws of two groups of the runs of `random` without a common one."""
    draws = np.random.default_rng(seed)
    num_found = 0
    for _ in range(num_draws):
        order = draws.permutation(runs.num_seeds)
        one, other = (
            ArmScores({task: items[group] for task, items in runs.tasks.items()})
            for group in (order[: num_seeds[0]], order[num_seeds[0] : sum(num_seeds)])
        )
        p_values = [_compared(one, other, tasks).p_value for tasks in classes.values()]
        num_found += min(holm(p_values)) < LEVEL
    return NullRate(runs.num_seeds, num_draws, num_found)
