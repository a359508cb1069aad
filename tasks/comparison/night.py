"""What a night's comparisons mean: a loss, something to watch, or noise. Pure.

A night compares each new model with a pinned baseline and with the last different model. Every test of the night is
one of a family (Holm). Two levels:

watch   below 5 % that night. Equally good models raise one in most quarters (benchmarks/RESULTS.md), so it is told,
        and fails nothing.
loss    below the level that, spent every night, adds up to 5 % in a quarter, and not smaller than a minimum effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from smoltulu.tasks.comparison.evaluations import Comparison, Measured
from smoltulu.tasks.comparison.paired import holm

#: Of all tests of one night together.
WATCH_LEVEL = 0.05
#: Of all nights of a quarter together, if every night's model is as good as what it is compared with.
QUARTER_LEVEL = 0.05
NIGHTS_PER_QUARTER = 90
#: Of one night: so many nights together have the quarter's level (Šidák).
LOSS_LEVEL = 1 - (1 - QUARTER_LEVEL) ** (1 / NIGHTS_PER_QUARTER)
#: A smaller change is no loss however sure it is, as a share of 1: with 10,000 items, less than a point can be sure.
MIN_EFFECT = 0.01

Against = Literal["baseline", "last"]
Verdict = Literal["not comparable", "same", "within noise", "gain", "watch", "loss"]
#: How a reference is called.
WORDS: dict[Against, str] = {"baseline": "the baseline", "last": "the last model"}
#: Of a sample, what a second measurement by itself may change: where it stood in the evaluation.
_PLACES = ("entry", "task")
_NUM_NAMED = 3


@dataclass(frozen=True)
class Judged:
    """A comparison, what it was with, its p-value adjusted for all of the night, and the verdict."""

    comparison: Comparison
    against: Against
    adjusted: float | None
    verdict: Verdict


def judge(comparisons: Sequence[tuple[Against, Comparison]]) -> list[Judged]:
    """The verdicts of one night: all its models, tasks and references are one family."""
    adjusted = iter(holm([one.test.p_value for _, one in comparisons if one.test is not None]))
    made = []
    for against, one in comparisons:
        p_value = next(adjusted) if one.test is not None else None
        made.append(Judged(one, against, p_value, verdict_of(one, p_value)))
    return made


def verdict_of(one: Comparison, adjusted: float | None) -> Verdict:
    """Of one comparison. `adjusted`: its p-value, of all tests of the night."""
    test = one.test
    if test is None or adjusted is None:
        return "not comparable"
    if not test.num_lost and not test.num_gained:
        return "same"
    if adjusted >= WATCH_LEVEL:
        return "within noise"
    if test.difference >= 0:
        return "gain"
    return "loss" if adjusted < LOSS_LEVEL and -test.difference >= MIN_EFFECT else "watch"


@dataclass(frozen=True)
class Repeated:
    """One task of a model, measured a second time with the same weights.

    num_different  items whose sample is another one
    reason         why the two cannot be laid side by side; then nothing is known
    """

    model: str
    task: str
    num_items: int = 0
    num_different: int = 0
    reason: str = ""
    changes: tuple[str, ...] = ()

    @property
    def is_identical(self) -> bool | None:
        """None where it is not known."""
        return None if self.reason else not self.num_different


def repeated(
    model: str, task: str, before: Measured | None, again: Measured | None, changes: Sequence[str] = ()
) -> Repeated:
    """Whether the same weights gave the same samples: outputs, log-likelihoods and scores, not only who is right.

    changes  what differs between the two environments, in words
    """
    if before is None or again is None or not before.items or not again.items:
        return Repeated(model, task, reason="no items were kept")
    for name in ("metric", "harness", "task_version", "template_digest", "num_fewshot"):
        old, new = getattr(before.score, name), getattr(again.score, name)
        if old != new:
            return Repeated(model, task, len(again.items), len(again.items), changes=(f"{name} {old} -> {new}",))
    names = before.items.keys() | again.items.keys()
    different = sum(
        name not in before.items
        or name not in again.items
        or before.items[name] != again.items[name]
        or _content(before.items[name].row) != _content(again.items[name].row)
        for name in names
    )
    return Repeated(model, task, len(names), different, changes=tuple(changes) if different else ())


def _content(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in _PLACES}


# --- What a night says ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Night:
    """What one night found.

    num_evaluations  of finished models
    new              models that no night told of before
    failed           model -> why its evaluation failed
    num_missed       nights since the last one that did not run
    standing         losses of earlier nights whose model is still the newest, in words
    """

    num_evaluations: int = 0
    new: Sequence[str] = ()
    judged: Sequence[Judged] = ()
    failed: Mapping[str, str] | None = None
    repeated: Sequence[Repeated] = ()
    num_missed: int = 0
    notes: Sequence[str] = ()
    standing: Sequence[str] = ()

    def of(self, verdict: Verdict) -> list[Judged]:
        """Comparisons with a verdict."""
        return [one for one in self.judged if one.verdict == verdict]

    @property
    def changed(self) -> list[Repeated]:
        """Repetitions that gave other samples."""
        return [one for one in self.repeated if one.is_identical is False]

    @property
    def went_well(self) -> bool:
        """A night fails for a loss and for a model that could not be measured; not for what is only to be watched."""
        return not (self.failed or self.of("loss"))

    @property
    def is_nothing_new(self) -> bool:
        """No model, and no reference, that was not told of before."""
        return not (self.new or self.judged or self.failed)

    def message(self) -> str:
        """The verdict in words: never that nothing dropped where nothing could be compared."""
        parts = [f"{self.num_missed:,} nights before this one did not run"] if self.num_missed > 1 else []
        parts += ["the night before this one did not run"] if self.num_missed == 1 else []
        if self.is_nothing_new:
            parts.append(f"nothing new: {self.num_evaluations:,} evaluations, all told before")
        else:
            parts.append(f"{self.num_evaluations:,} evaluations, new: {', '.join(self.new) or 'none'}")
        if self.failed:
            why = "; ".join(f"{model}: {text}" for model, text in self.failed.items())
            parts.append(f"{len(self.failed):,} FAILED: {why}")
        parts += self._verdicts()
        for one in self.repeated:
            parts.append(repetition_text(one))
        parts += [f"still standing: {text}" for text in self.standing]
        parts += self.notes
        return "; ".join(parts)

    def _verdicts(self) -> list[str]:
        parts = [f"LOSS: {change_text(one)}" for one in self.of("loss")]
        parts += [f"watch: {change_text(one)}" for one in self.of("watch")]
        lost = self.of("not comparable")
        num_compared = len(self.judged) - len(lost)
        if num_compared and not parts:
            parts.append(f"no real drop in {num_compared:,} scores")
        elif not num_compared and lost:
            parts.append("nothing was compared")
        alone = [model for model in self.new if model not in {one.comparison.model for one in self.judged}]
        if alone:
            whom = f"{', '.join(alone)} " if self.judged else ""
            parts.append(f"nothing to compare {whom}with yet")
        if lost:
            shown = ", ".join(
                f"{one.comparison.model} {one.comparison.task} against {WORDS[one.against]} ({one.comparison.reason})"
                for one in lost[:_NUM_NAMED]
            )
            more = f" and {len(lost) - _NUM_NAMED:,} more" if len(lost) > _NUM_NAMED else ""
            parts.append(f"{len(lost):,} not comparable: {shown}{more}")
        return parts


def change_text(one: Judged) -> str:
    """A change in words, e.g. `sft gsm8k 0.5000 -> 0.4000 against the baseline (132 lost, 0 gained of 1,319; …)`."""
    comparison, test = one.comparison, one.comparison.test
    assert test is not None and one.adjusted is not None
    return (
        f"{comparison.model} {comparison.task} {comparison.before:.4f} -> {comparison.after:.4f} against "
        f"{WORDS[one.against]} ({test.num_lost:,} lost, {test.num_gained:,} gained of {test.num_items:,}; "
        f"p {one.adjusted:.2g})"
    )


def repetition_text(one: Repeated) -> str:
    """What a second measurement of the same weights says."""
    if one.is_identical is None:
        return f"{one.model} {one.task} was measured again and could not be compared: {one.reason}"
    if one.is_identical:
        return f"{one.model} {one.task} measured again: {one.num_items:,} identical samples"
    why = f" ({', '.join(one.changes)})" if one.changes else ""
    return (
        f"HARNESS CHANGED: {one.model} {one.task}: the same weights gave other samples for {one.num_different:,} of "
        f"{one.num_items:,} items{why}; that is no regression, and differences since may be of it"
    )


def table(judged: Sequence[Judged]) -> list[dict[str, str]]:
    """The table of a night."""
    return [
        {
            "model": one.comparison.model,
            "task": one.comparison.task,
            "metric": one.comparison.metric,
            "against": one.against,
            "before": f"{one.comparison.before:.4f}",
            "tonight": f"{one.comparison.after:.4f}",
            "items": f"{test.num_items:,}" if test else "-",
            "lost, gained": f"{test.num_lost:,}, {test.num_gained:,}" if test else "-",
            "p (paired)": f"{test.p_value:.3g}" if test else "-",
            "p (Holm)": "-" if one.adjusted is None else f"{one.adjusted:.3g}",
            "verdict": f"not comparable: {one.comparison.reason}" if one.comparison.reason else one.verdict,
        }
        for one in judged
        for test in [one.comparison.test]
    ]
