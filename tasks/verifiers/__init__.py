"""Verifiers: does a completion answer a prompt correctly? No model, no network, no `eval`. Rules: docs/verifiers.md.

`grade` and `grade_all` say *right*, *wrong* or *could not grade*, with a reason for a reader. No text makes them raise,
hang or grow: an exception would end an RL run after hours. Only a programming error raises: an unknown verifier.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterable

from smoltulu.tasks.verifiers.names import VERIFIERS_VERSION, VERSIONS, canonical_name
from smoltulu.tasks.verifiers.pool import Graders, Job
from smoltulu.tasks.verifiers.rules import fault_of_truth as _fault_of_truth
from smoltulu.tasks.verifiers.verdict import Verdict

__all__ = [
    "VERIFIERS_VERSION", "VERSIONS", "Graders", "Job", "Verdict", "canonical_name", "fault_of_truth", "grade",
    "grade_all", "verify",
]  # fmt: skip

#: Workers of this process for whoever holds none; none is started before an answer needs one.
_shared = Graders()
atexit.register(_shared.close)


def grade(verifier: str, completion: str, ground_truth: str) -> Verdict:
    """Grade one completion.

    Args:
        verifier: a name of `VERSIONS`, with or without a version: `gsm8k`, `math@paper`. Case does not count.
        completion: what the model wrote (the assistant's text only, without the template's headers).
        ground_truth: the answer in that verifier's own form.

    Raises:
        ValueError: unknown verifier or version.
    """
    return _shared.grade(verifier, completion, ground_truth)


def grade_all(jobs: Iterable[Job], graders: Graders | None = None) -> list[Verdict]:
    """Grade (verifier, completion, ground truth) in order, as `grade` does; in several processes what is slow."""
    return (graders or _shared).grade_all(jobs)


def verify(name: str, completion: str, ground_truth: str) -> float | None:
    """`grade` as a number: 1.0 right, 0.0 wrong, None could not grade."""
    return grade(name, completion, ground_truth).score


def fault_of_truth(verifier: str, ground_truth: str) -> str | None:
    """Why a verifier cannot grade this ground truth, for whoever reads rows; None where it can. Starts no worker.

    Raises:
        ValueError: unknown verifier or version.
    """
    return _fault_of_truth(canonical_name(verifier), ground_truth)
