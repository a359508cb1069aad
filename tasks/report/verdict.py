"""The verdict of a run in words: `RLVR over DPO: sampled +6.1 ± 0.6, greedy not distinguishable`. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from smoltulu.schemas.verdict import ModelComparison, ScoreChange, Verdict
from smoltulu.tasks.report.text import title

#: Names of tasks that read better otherwise.
_TASKS = {"verified_sampled": "sampled"}
_MAX_DECIMALS = 4


def task_title(task: str) -> str:
    """Name of a task in sentences."""
    return _TASKS.get(task, task)


def headline(verdict: Verdict) -> str:
    """One sentence: whether the last model is better than the one before it, and than the first.

    Nothing is claimed where nothing could be compared.
    """
    if not verdict.measured:
        return "No language model has been measured, so nothing can be said of one."
    last = title(verdict.measured[-1])
    if not verdict.comparisons:
        return f"Only {last} has been measured: there is no other model of this run to compare it with."
    own = [one for one in verdict.comparisons if one.after == verdict.measured[-1]]
    return f"{last} {' and '.join(_clause(one) for one in own)}."


def tone(verdict: Verdict) -> str:
    """Class of the headline: `good`, `bad`, `warn` (better and worse), or `muted` (no difference was found)."""
    last = [one for one in verdict.comparisons if one.after in verdict.measured[-1:]]
    changes = {change.change for one in last for change in one.changes}
    if {"gain", "drop"} <= changes:
        return "warn"
    return "good" if "gain" in changes else "bad" if "drop" in changes else "muted"


def _clause(one: ModelComparison) -> str:
    """`is better than DPO on 1 of 3 scores and worse on 1`."""
    before, compared = title(one.before), one.compared
    if not compared:
        return f"could not be compared with {before}"
    num_gained, num_lost = (sum(change.change == kind for change in compared) for kind in ("gain", "drop"))
    scores = f"{len(compared)} score{'' if len(compared) == 1 else 's'}"
    if not num_gained and not num_lost:
        return f"cannot be told from {before} on {scores}"
    kinds = [(num_gained, "better"), (num_lost, "worse")]
    (number, kind), *rest = [pair for pair in kinds if pair[0]]
    more = f" and {rest[0][1]} on {rest[0][0]}" if rest else ""
    return f"is {kind} than {before} on {number} of {scores}{more}"


def sentences(verdict: Verdict) -> list[tuple[str, str]]:
    """For each comparison which models, and what: those of the last model first."""
    last = [one for one in verdict.comparisons if one.after in verdict.measured[-1:]]
    return [sentence(one) for one in [*last, *(one for one in verdict.comparisons[::-1] if one not in last)]]


def sentence(one: ModelComparison) -> tuple[str, str]:
    """`RLVR over DPO` and `sampled +6.1 ± 0.6, greedy not distinguishable`."""
    parts = [difference_text(change) for change in one.changes if change.change in ("gain", "drop")]
    for kind, words in (("within noise", "not distinguishable"), ("same", "alike on every item")):
        if names := [_name(change) for change in one.changes if change.change == kind]:
            parts.append(f"{_listed(names)} {words}")
    reasons: dict[str, list[str]] = {}
    for change in one.changes:
        if change.change == "not comparable":
            reasons.setdefault(_reason(change, one), []).append(task_title(change.task))
    parts += [f"{_listed(names)} {reason}" for reason, names in reasons.items()]
    what = ", ".join(parts) if one.compared else f"nothing could be compared ({'; '.join(parts) or 'no scores'})"
    return f"{title(one.after)} over {title(one.before)}", what


def difference_text(change: ScoreChange) -> str:
    """`sampled +6.1 ± 0.6`, in points of 100 where the score is a share; a drop is marked by its sign."""
    return f"{_name(change)} {signed(change)}"


def signed(change: ScoreChange) -> str:
    """`+6.1 ± 0.6`: the difference and its standard error; with as many decimals as it needs not to read as 0."""
    if change.difference is None:
        return "–"
    scale = 100 if change.is_share else 1
    value, stderr = scale * change.difference, scale * (change.stderr or 0.0)
    decimals = 1 if change.is_share else 3
    while value and not round(value, decimals) and decimals < _MAX_DECIMALS:
        decimals += 1
    sign = "+" if value > 0 else "−" if value < 0 else ""
    return f"{sign}{abs(value):.{decimals}f} ± {stderr:.{decimals}f}"


def _name(change: ScoreChange) -> str:
    return task_title(change.task) + (" (both near chance)" if change.is_near_chance else "")


def _reason(change: ScoreChange, one: ModelComparison) -> str:
    if change.reason == "was not measured before":
        return f"not measured for {title(one.before)}"
    if change.reason == "is not measured any more":
        return f"not measured for {title(one.after)}"
    return f"not comparable ({change.reason})"


def _listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
