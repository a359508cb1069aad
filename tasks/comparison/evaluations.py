"""What two evaluations measured, item by item, and whether they differ."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from smoltulu.schemas.evaluation import LOWER_IS_BETTER, EvaluationOutputs, Score
from smoltulu.tasks.comparison.contributions import Item, contributions
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
    "max_gen_toks": "length of answers", "seed": "seed", "generation": "generation settings",
    "model_settings": "model settings",
}  # fmt: skip
#: Those that only newer scores say.
_SAME_IF_SAID = {"backend": "backend", "dtype": "precision", "max_length": "maximal length"}
#: What a comparison reads of a sample.
_NO_TEXTS = (
    "task", "entry", "id", "filter", "doc_hash", "prompt_hash", "target_hash", "metrics", "parts", "right", "mean",
    "subset", "weight",
)  # fmt: skip
#: What reading an evaluation may raise: files that are damaged, or of another version.
READ_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError)
#: The test over members needs so many: of five that all fell, the exact p-value is 2 / 2^5 = 0.06.
MIN_MEMBERS = 6


@dataclass(frozen=True)
class Measured:
    """A score and the items behind it. The name of an item holds the digests of its question and its answer."""

    score: Score
    items: dict[str, Item] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """One score of one model, before and after.

    test              a loss is what got worse, and a positive difference is better: where lower is, signs are turned
    over_members      the same test over the members of a group, each one value: what it says of other such members
    higher_is_better  False: a rise is a drop in quality
    reason            why it cannot be compared; then there is no test
    """

    model: str
    task: str
    metric: str
    before: float
    after: float
    test: PairedTest | None = None
    reason: str = ""
    over_members: PairedTest | None = None
    higher_is_better: bool = True

    @property
    def gain(self) -> float:
        """By how much it got better; below 0: worse."""
        return self.after - self.before if self.higher_is_better else self.before - self.after

    def verdict(self, adjusted: float | None, level: float) -> str:
        """`not comparable`, `same`, `within noise`, `drop` or `gain`. `adjusted`: the p-value, of all tests."""
        if self.test is None or adjusted is None:
            return "not comparable"
        if not self.test.num_lost and not self.test.num_gained:
            return "same"
        if adjusted >= level:
            return "within noise"
        return "drop" if self.test.difference < 0 else "gain"


def measured(
    folder: Path, outputs: EvaluationOutputs, metric: str | None = None, *, texts: bool = True
) -> dict[str, Measured]:
    """Task -> its headline score with its items, from the samples of the evaluation in `folder`.

    A task that the recipe names twice is there a second time, by task and metric.

    metric  another one to judge by, e.g. `bits_per_byte`, with the headline's filter; tasks without it are left out
    texts   whether the rows of the items hold prompts and answers too, for a reader

    Raises:
        ValueError: samples that cannot be read.
    """
    headlines: dict[str, Measured] = {}
    names = score_names(outputs)
    for name, score in zip(names, outputs.scores, strict=True):
        headlines.setdefault(name, Measured(score))  # the first is the headline
    if metric is not None:
        others = {name: _by_metric(one.score, metric) for name, one in headlines.items()}
        headlines = {name: Measured(score) for name, score in others.items() if score is not None}
    if outputs.samples_file is None:
        return headlines
    members = _members(folder / outputs.results_file) if outputs.results_file else {}
    seen: Counter[tuple[str, str]] = Counter()
    for row in read_samples(folder / outputs.samples_file, None if texts else _NO_TEXTS):
        entry = row.get("entry")  # older samples have none
        task = members.get(row["task"], row["task"]) if entry is None else names[entry]
        if task not in headlines:
            continue
        values = _values(row, headlines[task].score.metric)
        if values is not None:
            is_member = headlines[task].score.task != row["task"]
            member = row["task"] if is_member else row.get("subset", "")  # a reward benchmark has subsets
            headlines[task].items[item_name(row, task, seen)] = item_of(values, row.get("prompt_hash"), member, row)
    return headlines


def score_names(outputs: EvaluationOutputs) -> list[str]:
    """What each score is called: its task, and where a recipe names that twice, its metric and shots too.

    Scores of lm-eval come first, an entry of the recipe each.
    """
    names: list[str] = []
    for score in outputs.scores:
        name = score.task
        if name in names and "," in score.metric:
            name = f"{name} {score.metric}"
            name += f" {score.num_fewshot} shots" if name in names else ""
        names.append(name)
    return names


def item_of(values: float | list[float], prompt: str | None, member: str, row: Mapping[str, Any]) -> Item:
    """An item of one value, or of the values of its parts."""
    weight = float(row.get("weight", 1.0))
    if isinstance(values, list):
        return Item(fmean(values), prompt, member, tuple(values), weight, row)
    return Item(values, prompt, member, (), weight, row)


def _by_metric(score: Score, metric: str) -> Score | None:
    """The same task's score by another metric, as its evaluation kept it."""
    name = ",".join([metric, *score.metric.split(",")[1:]])
    value = score.details.get("metrics", {}).get(name)
    details = {name: one for name, one in score.details.items() if name != "higher_is_better"}
    changes = {"metric": name, "value": float(value), "stderr": None, "details": details} if value is not None else None
    return None if changes is None else score.model_copy(update=changes)


def _members(file: Path) -> dict[str, str]:
    """Member of a group -> the task of the recipe that it was measured for."""
    results = json.loads(file.read_text(encoding="utf-8")).get("lm_eval", {})
    return {leaf: task for task, result in results.items() for leaf in result.get("n-samples", {}) if leaf != task}


def _values(row: Mapping[str, Any], metric: str) -> float | list[float] | None:
    """What the headline's metric and filter say of an item, or of its parts; None where the line is not of them."""
    name, _, of_filter = metric.partition(",")
    if "metrics" not in row:
        value = row.get("right", row.get("mean"))
    elif row.get("filter", of_filter) != of_filter:
        return None
    elif (parts := row.get("parts", {}).get(name)) is not None:
        return [float(part) for part in parts]
    else:
        value = row["metrics"].get(name)
    return None if value is None else float(value)


def item_name(row: Mapping[str, Any], score: str, seen: Counter[tuple[str, str]]) -> str:
    """Of the question and its answer; by its id where no digest is kept. ValueError where there is neither.

    `seen`: how often each name came under each score so far; from the second time on a name has its number.
    """
    document, target = row.get("doc_hash"), row.get("target_hash")
    asked = f"{document}/{target}" if document and target else document or target or row.get("id", "")
    if asked == "":
        raise ValueError(f"a sample of {row['task']} has no id and no doc_hash; evaluate this model again")
    name = f"{row['task']}/{asked}"
    number = seen[score, name] = seen[score, name] + 1
    return name if number == 1 else f"{name}#{number}"


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
    made = Comparison(
        model,
        task,
        after.score.metric,
        *scores,
        reason=_difference(before, after),
        higher_is_better=is_up(after.score),
    )
    if made.reason:
        return made
    added = contributions(before.items, after.items, scores)
    if added is None:
        return replace(made, reason="the score is no mean of its items")
    test = paired_test(added.before, added.after, stratum_of=added.stratum_of)
    return replace(made, test=_told(test, made), over_members=_over_members(before, after, made))


def _over_members(before: Measured, after: Measured, made: Comparison) -> PairedTest | None:
    """The test of the members' means; None of fewer than `MIN_MEMBERS`, which never differ beyond noise."""
    names: dict[str, list[str]] = {}
    for name, item in after.items.items():
        names.setdefault(item.member, []).append(name)
    if len(names) < MIN_MEMBERS:
        return None
    means = [{member: fmean(side.items[name].value for name in of) for member, of in names.items()}
             for side in (before, after)]  # fmt: skip
    return _told(paired_test(means[0], means[1]), made)


def _told(test: PairedTest, made: Comparison) -> PairedTest:
    """In terms of better and worse."""
    if made.higher_is_better:
        return test
    return replace(
        test, difference=-test.difference, low=-test.high, high=-test.low,
        num_lost=test.num_gained, num_gained=test.num_lost,
    )  # fmt: skip


def is_up(score: Score) -> bool:
    """Whether a higher value is better: as the score says, or as its metric is known for."""
    said = score.details.get("higher_is_better")
    return bool(said) if said is not None else score.metric.partition(",")[0] not in LOWER_IS_BETTER


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
    for name, words in _SAME_IF_SAID.items():
        old, new = before.score.details.get(name), after.score.details.get(name)
        if old != new and None not in (old, new):
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
    sign = 1 if is_up(after.score) else -1
    changed = [pair for pair in pairs if pair[0].value != pair[1].value]
    return sorted(changed, key=lambda pair: sign * (pair[1].value - pair[0].value))


def verdicts(comparisons: list[Comparison], level: float) -> list[tuple[Comparison, float | None, str]]:
    """Each comparison, its p-value adjusted for all of them (Holm), and its verdict."""
    tests = [one.test.p_value for one in comparisons if one.test is not None]
    adjusted = iter(holm(tests))
    made = []
    for one in comparisons:
        p_value = next(adjusted) if one.test is not None else None
        made.append((one, p_value, one.verdict(p_value, level)))
    return made
