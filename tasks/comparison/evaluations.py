"""What two evaluations measured, item by item, and whether they differ."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smoltulu.schemas.evaluation import EvaluationOutputs, Score
from smoltulu.tasks.comparison.paired import PairedTest, holm, paired_test
from smoltulu.tasks.evaluation.samples import read_samples

#: What must be the same for two scores to be compared, and how it is called.
_SAME = {
    "metric": "metric", "harness": "harness", "task_version": "task version", "template_digest": "chat template",
    "num_fewshot": "number of shots", "limited": "part of the task",
}  # fmt: skip
#: The same of what a score says of itself in its details.
_SAME_DETAILS = {
    "temperature": "temperature", "num_samples_per_prompt": "number of samples", "max_new_tokens": "length of answers",
    "max_gen_toks": "length of answers", "seed": "seed",
}  # fmt: skip
#: A score is the mean of its items up to this.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Item:
    """One measured item.

    prompt   digest of what was asked
    cluster  the member of a group that it belongs to
    row      its line of the samples, for a reader
    """

    value: float
    prompt: str | None = None
    cluster: str = ""
    row: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Measured:
    """A score and the items behind it. The name of an item holds the digests of its question and its answer."""

    score: Score
    items: dict[str, Item] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """One score of one model, before and after.

    reason  why it cannot be compared; then there is no test
    """

    model: str
    task: str
    metric: str
    before: float
    after: float
    test: PairedTest | None = None
    reason: str = ""

    def verdict(self, adjusted: float | None, level: float) -> str:
        """`not comparable`, `same`, `within noise`, `drop` or `gain`. `adjusted`: the p-value, of all tests."""
        if self.test is None or adjusted is None:
            return "not comparable"
        if not self.test.num_lost and not self.test.num_gained:
            return "same"
        if adjusted >= level:
            return "within noise"
        return "drop" if self.test.difference < 0 else "gain"


def measured(folder: Path, outputs: EvaluationOutputs) -> dict[str, Measured]:
    """Task -> its headline score with its items, from the samples of the evaluation in `folder`.

    A task that the recipe names twice is there a second time, by task and metric.

    Raises:
        ValueError: samples that cannot be read.
    """
    headlines: dict[str, Measured] = {}
    names: list[str] = []  # of each score; those of lm-eval come first, an entry of the recipe each
    for score in outputs.scores:
        name = score.task
        if name in headlines and "," in score.metric:
            name = f"{name} {score.metric}"
            name += f" {score.num_fewshot} shots" if name in headlines else ""
        names.append(name)
        headlines.setdefault(name, Measured(score))  # the first is the headline
    if outputs.samples_file is None:
        return headlines
    members = _members(folder / outputs.results_file) if outputs.results_file else {}
    seen: Counter[tuple[str, str]] = Counter()
    for row in read_samples(folder / outputs.samples_file):
        entry = row.get("entry")  # older samples have none
        task = members.get(row["task"], row["task"]) if entry is None else names[entry]
        if task not in headlines:
            continue
        value = _value(row, headlines[task].score.metric)
        if value is not None:
            cluster = row["task"] if headlines[task].score.task != row["task"] else ""
            headlines[task].items[item_name(row, task, seen)] = Item(value, row.get("prompt_hash"), cluster, row)
    return headlines


def _members(file: Path) -> dict[str, str]:
    """Member of a group -> the task of the recipe that it was measured for."""
    results = json.loads(file.read_text(encoding="utf-8")).get("lm_eval", {})
    return {leaf: task for task, result in results.items() for leaf in result.get("n-samples", {}) if leaf != task}


def _value(row: Mapping[str, Any], metric: str) -> float | None:
    """What the headline's own metric and filter say of an item; None where this line is not of them."""
    if "metrics" not in row:
        value = row.get("right", row.get("mean"))
    else:
        name, _, of_filter = metric.partition(",")
        value = row["metrics"].get(name) if row.get("filter", of_filter) == of_filter else None
    return None if value is None else float(value)


def item_name(row: Mapping[str, Any], score: str, seen: Counter[tuple[str, str]]) -> str:
    """Of the question and its answer; by its id where no digest is kept. ValueError where there is neither.

    `seen`: how often each name came under each score so far; from the second time on a name has its number.
    """
    names = [str(row[key]) for key in ("doc_hash", "target_hash") if row.get(key)] or [str(row.get("id", ""))]
    if not names[0]:
        raise ValueError(f"a sample of {row['task']} has no id and no doc_hash; evaluate this model again")
    name = "/".join([row["task"], *names])
    seen[score, name] += 1
    return name if seen[score, name] == 1 else f"{name}#{seen[score, name]}"


def compare(model: str, before: Mapping[str, Measured], after: Mapping[str, Measured]) -> list[Comparison]:
    """Every score that either evaluation has. One that cannot be compared says why."""
    return [_compare(model, task, before.get(task), after.get(task)) for task in sorted({*before, *after})]


def _compare(model: str, task: str, before: Measured | None, after: Measured | None) -> Comparison:
    if before is None or after is None:
        only = before or after
        assert only is not None
        value = only.score.value
        missing = "was not measured before" if before is None else "is not measured any more"
        return Comparison(model, task, only.score.metric, value, value, reason=missing)
    scores = (before.score.value, after.score.value)
    reason = _difference(before, after)
    weights = None if reason else _weights(before, after)
    if weights is None:
        reason = reason or "the score is no mean of its items"
        return Comparison(model, task, after.score.metric, *scores, reason=reason)
    old, new = ({name: weights[name] * item.value for name, item in side.items.items()} for side in (before, after))
    return Comparison(model, task, after.score.metric, *scores, paired_test(old, new))


def _weights(before: Measured, after: Measured) -> dict[str, float] | None:
    """What each item counts, 1 on average, so that both scores are the mean of their items; None where none is so.

    A group's score is the mean of its items, or of its members' means (then an item of a small member counts more).
    """
    sizes = Counter(item.cluster for item in after.items.values())
    alike = dict.fromkeys(after.items, 1.0)
    by_member = {name: len(after.items) / (len(sizes) * sizes[one.cluster]) for name, one in after.items.items()}
    for weights in (alike, by_member):
        if all(
            abs(
                math.fsum(weights[name] * item.value for name, item in side.items.items()) / len(weights)
                - side.score.value
            )
            <= _ROUNDING * max(1.0, abs(side.score.value))
            for side in (before, after)
        ):
            return weights
    return None


def _difference(before: Measured, after: Measured) -> str:
    """Why two measurements of a task are not of the same thing; empty where they are."""
    for name, words in _SAME.items():
        old, new = getattr(before.score, name), getattr(after.score, name)
        if old != new:
            return f"another {words}: {old} -> {new}"
    for name, words in _SAME_DETAILS.items():
        old, new = before.score.details.get(name), after.score.details.get(name)
        if old != new:
            return f"another {words}: {old} -> {new}"
    if not after.items or not before.items:
        return "no items were kept"
    gone, new = before.items.keys() - after.items.keys(), after.items.keys() - before.items.keys()
    if gone or new:
        return f"other documents: {len(gone):,} of {len(before.items):,} are gone, {len(new):,} are new"
    prompts = sum(before.items[name].prompt != item.prompt for name, item in after.items.items())
    if prompts:
        return f"other prompts: {prompts:,} of {len(after.items):,} are asked otherwise"
    pairs = [(before.items[name].value, item.value) for name, item in after.items.items()]
    if odd := sum(not (math.isfinite(old) and math.isfinite(new)) for old, new in pairs):
        return f"{odd:,} of {len(pairs):,} items have a score that is no number"
    return ""


def flipped(before: Measured, after: Measured) -> list[tuple[Item, Item]]:
    """Items whose score changed, the lost ones first."""
    pairs = [(item, after.items[name]) for name, item in before.items.items() if name in after.items]
    return sorted((pair for pair in pairs if pair[0].value != pair[1].value), key=lambda p: p[1].value - p[0].value)


def verdicts(comparisons: list[Comparison], level: float) -> list[tuple[Comparison, float | None, str]]:
    """Each comparison, its p-value adjusted for all of them (Holm), and its verdict."""
    tests = [one.test.p_value for one in comparisons if one.test is not None]
    adjusted = iter(holm(tests))
    made = []
    for one in comparisons:
        p_value = next(adjusted) if one.test is not None else None
        made.append((one, p_value, one.verdict(p_value, level)))
    return made
