"""What held-out prompts said so far: accuracy at every evaluation, which was best, and whether it has fallen. Pure.

Every number is a mean over prompts of the share of their answers that are right; its standard error is clustered by
prompt, since the answers to one prompt are alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from smoltulu.schemas.held_out import NUM_LATEST, HeldOutScore
from smoltulu.tasks.comparison.paired import paired_test
from smoltulu.tasks.training.held_out_rows import HeldOutRow

#: File of a checkpoint.
STATE_FILE = "held_out.json"
#: Level of a fall of the mean of the newest evaluations against the start, prompt by prompt.
MAX_P_VALUE = 0.01

#: Line of a prompt in all rows, as text -> share of its answers that are right; None: none could be graded.
Shares = Mapping[str, float | None]


@dataclass(frozen=True)
class Evaluation:
    """The answers to all held-out prompts after so many optimizer steps."""

    step: int
    prompts: Shares
    kinds: Shares
    stopped: float
    mean_length: float

    @property
    def accuracy(self) -> float:
        return fmean(graded(self.prompts).values())

    def score(self) -> HeldOutScore:
        prompts, kinds = (list(graded(shares).values()) for shares in (self.prompts, self.kinds))
        return HeldOutScore(
            step=self.step,
            accuracy=fmean(prompts),
            stderr=_stderr(prompts),
            kinds_accuracy=fmean(kinds) if kinds else None,
            kinds_stderr=_stderr(kinds),
        )


@dataclass
class Record:
    """All evaluations of a run, and why it ended before its budget did (None: it did not)."""

    evaluations: list[Evaluation] = field(default_factory=list)
    ended_early: str | None = None

    @property
    def best(self) -> Evaluation:
        """The one of the highest accuracy; of several the earliest, which is nearest to the starting model."""
        return max(self.evaluations, key=lambda one: one.accuracy)

    def save(self, checkpoint: Path) -> None:
        (checkpoint / STATE_FILE).write_text(json.dumps(asdict(self)))

    @staticmethod
    def of(checkpoint: Path) -> Record:
        seen = json.loads((checkpoint / STATE_FILE).read_text())
        return Record([Evaluation(**one) for one in seen["evaluations"]], seen["ended_early"])


def graded(shares: Shares) -> dict[str, float]:
    return {number: share for number, share in shares.items() if share is not None}


def _stderr(values: Sequence[float]) -> float | None:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def share_right(verdicts: Sequence[str]) -> float | None:
    """Of the answers to one prompt, whose verdicts these are; None where none could be graded."""
    known = [verdict == "right" for verdict in verdicts if verdict != "could_not_grade"]
    return sum(known) / len(known) if known else None


def fall(start: Shares, latest: Sequence[Shares], max_drop: float) -> tuple[float, float] | None:
    """How far accuracy fell from `start` to the mean of `latest`, and the p-value; None where it did not, beyond noise.

    Only prompts count that could be graded each time. Two-sided paired test over prompts, exact where few differ.
    """
    several = [graded(one) for one in (start, *latest)]
    numbers = set(several[0]).intersection(*several[1:])
    if not numbers:
        return None
    before = {number: several[0][number] for number in numbers}
    after = {number: fmean(one[number] for one in several[1:]) for number in numbers}
    test = paired_test(before, after)
    drop = -test.difference
    return (drop, test.p_value) if drop > max_drop and test.p_value < MAX_P_VALUE else None


def falls(record: Record, max_drop: float | None, max_kinds_drop: float | None) -> list[str]:
    """A sentence for each of the two accuracies that has fallen by more than is allowed."""
    start, latest = record.evaluations[0], record.evaluations[1:][-NUM_LATEST:]
    if len(latest) < NUM_LATEST:
        return []
    said = []
    for what, of, limit, name in (
        ("held-out prompts", lambda one: one.prompts, max_drop, "max_drop"),
        ("held-out kinds", lambda one: one.kinds, max_kinds_drop, "max_kinds_drop"),
    ):
        found = fall(of(start), [of(one) for one in latest], limit) if limit is not None else None
        if found is not None:
            said.append(
                f"accuracy on {what} fell by {found[0]:.3f} from {fmean(graded(of(start)).values()):.3f} at the start, "
                f"in the mean of the last {NUM_LATEST} evaluations (p = {found[1]:.2g}), and held_out.{name} is "
                f"{limit:g}"
            )
    return said


def metrics_of(evaluation: Evaluation, rows: Sequence[HeldOutRow]) -> dict[str, float]:
    """What is logged of an evaluation: accuracies of all, and of each verifier, source and kind of several."""
    score = evaluation.score()
    made = {"held_out/accuracy": score.accuracy, "held_out/kinds/accuracy": score.kinds_accuracy}
    made |= {"held_out/stderr": score.stderr, "held_out/kinds/stderr": score.kinds_stderr}
    made |= {"held_out/stopped": evaluation.stopped, "held_out/mean_length": evaluation.mean_length}
    shares = [*evaluation.prompts.values(), *evaluation.kinds.values()]
    made["held_out/could_not_grade"] = sum(share is None for share in shares) / len(shares)
    known = [row for row in rows if row.kind is None]
    made |= _by("held_out/", evaluation.prompts, known, [row.row["verifier"] for row in known])
    made |= _by("held_out/source_", evaluation.prompts, known, [str(row.row["id"]).partition(":")[0] for row in known])
    others = [row for row in rows if row.kind is not None]
    made |= _by("held_out/kinds/", evaluation.kinds, others, [str(row.kind) for row in others])
    return {name: value for name, value in made.items() if value is not None and math.isfinite(value)}


def _by(prefix: str, shares: Shares, rows: Sequence[HeldOutRow], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy of each label; none where there is but one, which is all."""
    found: dict[str, list[float]] = {}
    for row, label in zip(rows, labels, strict=True):
        if (share := shares[str(row.number)]) is not None:
            found.setdefault(f"{prefix}{label}", []).append(share)
    return {name: fmean(values) for name, values in sorted(found.items())} if len(set(labels)) > 1 else {}
