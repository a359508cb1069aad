"""Kinds of rows whose answers are verified: the verifier, and of a constraint which one it is."""

from __future__ import annotations

from smoltulu.tasks.verifiers import constraints, ifeval
from smoltulu.tasks.verifiers.names import VERSIONS, did_you_mean
from smoltulu.tasks.verifiers.truths import BadTruth, json_object

#: What holds a constraint's own name in its ground truth, by verifier.
_NAMED_BY = {"ifeval": "func_name", "constraint": "kind"}
#: Every kind: verifiers without their versions, then the constraints of each.
KINDS = (*VERSIONS, *ifeval.ARGUMENTS, *constraints.KINDS)


def check_kind(kind: str) -> None:
    """ValueError for a kind that nobody knows, with the nearest and all that are known."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind[:60]!r}{did_you_mean(kind, KINDS)}; known are {', '.join(KINDS)}")


def kinds_of(verifier: str, ground_truth: str) -> tuple[str, ...]:
    """The kinds of a row, the narrowest last: its verifier, and its constraint where it names one."""
    name = verifier.strip().lower().partition("@")[0]
    if name not in _NAMED_BY:
        return (name,)
    try:
        constraint = json_object(ground_truth).get(_NAMED_BY[name])
    except BadTruth:
        return (name,)
    return (name, constraint) if isinstance(constraint, str) else (name,)
