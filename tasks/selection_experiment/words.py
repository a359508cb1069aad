"""What the terminal and the page say of an experiment with selection. Pure.

Differences are told as `better by`: above 0 is better, whichever way the metric goes.
"""

from __future__ import annotations

from collections.abc import Sequence

from smoltulu.schemas.sweep import SweptTask
from smoltulu.tasks.selection_experiment.compare import Difference
from smoltulu.tasks.selection_experiment.verdict import Against, Judged, Row


def row_text(row: Row, tasks: Sequence[SweptTask]) -> str:
    """`selected, reasoning: bits_per_byte 1.21 ± 0.03 (5 seeds), better than random by 0.10 [0.05, 0.15]`."""
    what = row.task.task if row.task else row.task_class
    text = f"{row.arm}, {what}: {metric_text(tasks)} {mean_text(row, tasks)} ({_seeds(len(row.runs))})"
    return text if row.against is None else f"{text}, better than random by {interval_text(row.against)}"


def metric_text(tasks: Sequence[SweptTask]) -> str:
    """Of the score of tasks, without the filter; of several metrics, all."""
    return "/".join(dict.fromkeys(task.metric.removesuffix(",none") for task in tasks))


def mean_text(row: Row, tasks: Sequence[SweptTask]) -> str:
    """`1.21 ± 0.03`, as the metric is spelt: mean over seeds, and their standard deviation."""
    return f"{sign_of(tasks) * row.mean:.3f}" + ("" if row.spread is None else f" ± {row.spread:.3f}")


def sign_of(tasks: Sequence[SweptTask]) -> int:
    """-1 where all are better when lower: then scores were turned. Of mixed ones, the turned values are shown."""
    return -1 if all(task.lower_is_better for task in tasks) else 1


def interval_text(test: Difference) -> str:
    """`0.10 [0.05, 0.15]`."""
    return f"{test.difference:.3f} [{test.low:.3f}, {test.high:.3f}]"


def against_text(one: Against) -> str:
    """`random: better by 0.10 [0.05, 0.15], p = 0.001`."""
    word = "better" if one.is_better else "worse" if one.is_worse else "no different"
    return f"{one.control}: {word}, by {interval_text(one.test)}, {p_text(one.adjusted)}"


def verdict_text(one: Judged) -> str:
    """The verdict on a selector and class in one line."""
    at = f"{one.setting}, " if one.setting else ""
    told = one.reason or "; ".join(f"against {against_text(against)}" for against in one.against)
    return f"{at}{one.selector}, {one.task_class}: {one.word} ({told})"


def p_text(value: float) -> str:
    """`p = 0.029`, `p < 0.001`."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _seeds(number: int) -> str:
    return f"{number} seed" if number == 1 else f"{number} seeds"
