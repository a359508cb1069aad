"""Is it good? Each model of a run against the one before it, and the last against the first, item by item.

All tests of the page are adjusted together (Holm): one p-value of a page that shows many says little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from smoltulu.schemas.evaluation import EvaluationOutputs
from smoltulu.schemas.verdict import AnsweredPrompt, Change, ModelComparison, ScoreChange, Verdict
from smoltulu.tasks.comparison.answers import choose_prompts
from smoltulu.tasks.comparison.evaluations import Comparison, Item, Measured, compare, measured, verdicts

LEVEL = 0.05
#: What is kept of a text: the rest of a page's answers would fill the memory beside a training.
_MAX_CHARACTERS = 20_000


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of one language model.

    subject  stage that made the model
    digest   of the artifact's content: it is read once
    """

    subject: str
    folder: Path
    digest: str
    outputs: EvaluationOutputs = field(compare=False)


@lru_cache(maxsize=2)  # the page is written after every stage, and few of them are evaluations
def assess(evaluations: tuple[Evaluation, ...]) -> tuple[Verdict, tuple[AnsweredPrompt, ...]]:
    """The verdict over a run's language models, in the run's order, and prompts with their answers.

    Samples that cannot be read end nothing: their model is compared with none, and the verdict says why.
    """
    models: dict[str, dict[str, Measured]] = {}
    unreadable: dict[str, str] = {}
    for one in evaluations:
        try:
            models[one.subject] = {name: _smaller(found) for name, found in measured(one.folder, one.outputs).items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            models[one.subject] = {score.task: Measured(score) for score in one.outputs.scores[::-1]}
            unreadable[one.subject] = str(error) or type(error).__name__
    comparisons = compare_models(list(models.items()), unreadable)
    verdict = Verdict(measured=tuple(models), comparisons=comparisons, level=LEVEL, unreadable=unreadable)
    return verdict, choose_prompts(list(models.items()))


def compare_models(
    models: Sequence[tuple[str, Mapping[str, Measured]]], unreadable: Mapping[str, str] = {}
) -> tuple[ModelComparison, ...]:
    """Every model with the one before it, then the last with the first. `models`: (stage, its scores), in order."""
    pairs = [(place, place + 1) for place in range(len(models) - 1)]
    if len(models) > 2:
        pairs.append((0, len(models) - 1))
    found: list[list[Comparison]] = []
    for before, after in pairs:
        compared = compare(models[after][0], models[before][1], models[after][1])
        lost = [name for name in (models[before][0], models[after][0]) if name in unreadable]
        reason = f"the samples of {' and '.join(lost)} cannot be read"
        found.append([replace(one, test=None, reason=reason) for one in compared] if lost else compared)
    judged = iter(verdicts([one for compared in found for one in compared], LEVEL))
    return tuple(
        ModelComparison(
            before=models[before][0],
            after=models[after][0],
            changes=tuple(
                _change(*next(judged), models[before][1].get(one.task), models[after][1].get(one.task))
                for one in compared
            ),
        )
        for (before, after), compared in zip(pairs, found, strict=True)
    )


def _change(
    one: Comparison, adjusted: float | None, verdict: str, before: Measured | None, after: Measured | None
) -> ScoreChange:
    change: Change = verdict  # type: ignore[assignment]
    sides = [side for side in (before, after) if side is not None]
    test = one.test
    return ScoreChange(
        task=one.task,
        metric=one.metric,
        change=change,
        before=one.before,
        after=one.after,
        # Of the scores as they are: the test's is positive where they got better.
        difference=None if test is None else test.difference if one.higher_is_better else -test.difference,
        stderr=None if test is None else test.stderr,
        num_items=0 if test is None else test.num_items,
        p_value=None if test is None else test.p_value,
        adjusted=None if test is None else adjusted,
        is_share=all(0 <= item.value <= 1 for side in sides for item in side.items.values()),
        is_near_chance=all(side.score.details.get("is_near_chance") is True for side in sides),
        reason=one.reason if test is None else "",
    )


def _smaller(found: Measured) -> Measured:
    """The items without the lines that no page shows: only what a model wrote is read again."""

    def kept(item: Item) -> Item:
        if not isinstance(item.row.get("completion"), str):
            return replace(item, row={})
        row = {name: value for name, value in item.row.items() if name not in ("parsed", "logliks", "metrics")}
        # What is cut is counted, so that the page can say so.
        row["num_left_out"] = max(0, len(row["completion"]) - _MAX_CHARACTERS)
        for name in ("completion", "prompt", "target"):
            if isinstance(row.get(name), str):
                row[name] = row[name][:_MAX_CHARACTERS]
        return replace(item, row=row)

    return replace(found, items={name: kept(item) for name, item in found.items.items()})
