"""What a verifier says of one answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["right", "wrong", "could_not_grade"]

#: Characters of a quoted answer in a reason.
_QUOTED = 60


@dataclass(frozen=True)
class Verdict:
    """An outcome and, for a reader, why: one short sentence.

    could_not_grade  the ground truth cannot be read, or grading failed by no fault of the answer: the answer is left
                     out of the loss and counted, it is neither rewarded nor punished
    """

    outcome: Outcome
    reason: str

    @property
    def score(self) -> float | None:
        """1.0 right, 0.0 wrong, None could not grade."""
        return {"right": 1.0, "wrong": 0.0, "could_not_grade": None}[self.outcome]


def right(reason: str) -> Verdict:
    return Verdict("right", reason)


def wrong(reason: str) -> Verdict:
    return Verdict("wrong", reason)


def could_not_grade(reason: str) -> Verdict:
    return Verdict("could_not_grade", reason)


def quoted(text: str) -> str:
    """A piece of a model's text or of a row, for a reason: one line, short, without control characters."""
    short = text if len(text) <= _QUOTED else text[: _QUOTED - 1] + "…"
    return "".join(mark if mark.isprintable() else " " for mark in short).strip() or "nothing"
