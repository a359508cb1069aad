"""The tests of one row of a table: which scores truly differ, all tests together (Holm). Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import hypot
from statistics import NormalDist

from smoltulu.schemas.evaluation import Score
from smoltulu.tasks.comparison.evaluations import Measured, compare
from smoltulu.tasks.comparison.paired import holm

#: Scores of which less is better, by the name of their metric, and those of which neither is.
_LESS_IS_BETTER = ("bits_per_byte", "byte_perplexity", "word_perplexity", "perplexity", "bpb", "brier_score")
_NEITHER = ("mean_margin", "mean_margin_unnormalised")


def direction(score: Score) -> int:
    """1 where more is better, -1 where less is, 0 where models are not ranked by it (a margin has a scale of its own).

    As the score says itself, or as its metric is known for.
    """
    name = score.metric.partition(",")[0]
    if name in _NEITHER:
        return 0
    said = score.details.get("higher_is_better")
    return 1 if (name not in _LESS_IS_BETTER if said is None else said) else -1


@dataclass(frozen=True)
class Figure:
    """A score of ours, or a published one, in one unit.

    stderr     None where it is not known
    measured   its items, for a paired test; None: published, or no items were kept
    group      what must be the same for a paired test, beside what the comparison itself demands
    """

    value: float
    stderr: float | None = None
    measured: Measured | None = None
    group: str | None = None


@dataclass(frozen=True)
class RowTests:
    """What the tests of a row allow to say.

    best         place of the measured score that is best, and significantly better than every other that it can be
                 compared with
    above        of each measured score: places of published figures that it is significantly higher than
    below        lower than
    untested     pairs of measured scores that cannot be compared, and why
    num_tests    paired and unpaired ones
    """

    best: int | None
    above: tuple[tuple[int, ...], ...]
    below: tuple[tuple[int, ...], ...]
    untested: dict[tuple[int, int], str]
    num_tests: int


def unpaired_p(one: Figure, other: Figure) -> float | None:
    """Two-sided p-value that two scores are the same but for their sampling errors, taken as independent (normal).

    A paired test would see more: both models met the same items, which this one cannot know. None without both errors.
    """
    if one.stderr is None or other.stderr is None:
        return None
    spread = hypot(one.stderr, other.stderr)
    if not spread:
        return None
    return 2 * NormalDist().cdf(-abs(one.value - other.value) / spread)


def row_tests(
    measured: Sequence[Figure | None],
    published: Sequence[Figure | None] = (),
    *,
    level: float,
    better: int = 1,
    stands_beside: Sequence[bool] = (),
) -> RowTests:
    """Test a row: every two measured scores item by item, and each against each published figure, unpaired.

    Args:
        better: 1 where more is better, -1 where less is, 0: nothing is best.
        stands_beside: of each measured score: whether it may be held against published figures. Default: none may.

    All pairs are tested, not only those with the best one: which is best is seen from the same data.
    """
    paired: list[tuple[int, int]] = []
    untested: dict[tuple[int, int], str] = {}
    p_values: list[float] = []
    for first, second in combinations([place for place, one in enumerate(measured) if one is not None], 2):
        p_value, reason = _paired_p(measured[first], measured[second])
        if p_value is None:
            untested[first, second] = reason
        else:
            paired.append((first, second))
            p_values.append(p_value)
    against: list[tuple[int, int]] = []
    for place, one in enumerate(measured):
        for column, other in enumerate(published):
            if one is None or other is None or not (place < len(stands_beside) and stands_beside[place]):
                continue
            if (p_value := unpaired_p(one, other)) is not None:
                against.append((place, column))
                p_values.append(p_value)
    adjusted = dict(zip([*paired, *((place, -1 - column) for place, column in against)], holm(p_values), strict=True))
    above: list[list[int]] = [[] for _ in measured]
    below: list[list[int]] = [[] for _ in measured]
    for place, column in against:
        one, other = measured[place], published[column]
        assert one is not None and other is not None
        if adjusted[place, -1 - column] < level:
            (above if one.value > other.value else below)[place].append(column)
    differs = {pair for pair in paired if adjusted[pair] < level}
    best = _best(measured, paired, differs, better)
    return RowTests(best, tuple(map(tuple, above)), tuple(map(tuple, below)), untested, len(p_values))


def _best(
    measured: Sequence[Figure | None], paired: Sequence[tuple[int, int]], differs: set[tuple[int, int]], better: int
) -> int | None:
    ranked = {place: better * one.value for place, one in enumerate(measured) if one is not None}
    if not better or not ranked:
        return None
    top = max(ranked, key=lambda place: ranked[place])
    tested = {pair for pair in paired if top in pair}
    return top if tested and tested <= differs else None


def _paired_p(one: Figure | None, other: Figure | None) -> tuple[float | None, str]:
    """p-value of the paired test, or why there is none."""
    assert one is not None and other is not None
    if one.measured is None or other.measured is None:
        return None, "no items were kept"
    if one.group != other.group:
        return None, f"measured in another precision: {one.group or 'unknown'} -> {other.group or 'unknown'}"
    task = one.measured.score.task
    [made] = compare("", {task: one.measured}, {task: other.measured})
    return (None, made.reason) if made.test is None else (made.test.p_value, "")
