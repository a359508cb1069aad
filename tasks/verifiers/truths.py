"""Ground truths as text: one answer, or a JSON list of texts of which any is right."""

from __future__ import annotations

import json
from typing import Any

#: Longer ground truths are refused.
MAX_TRUTH_CHARACTERS = 20_000
_MAX_ALTERNATIVES = 100
_MAX_COUNT = 1_000_000


class BadTruth(Exception):
    """A ground truth that cannot be graded; the text is the reason, the same for all truths with that fault."""


def alternatives(ground_truth: str) -> list[str]:
    """The answers that a ground truth names.

    A JSON list of texts means any of these. A list of numbers does not: `[1,2]` is an interval, too.
    """
    if len(ground_truth) > MAX_TRUTH_CHARACTERS:
        raise BadTruth(f"the ground truth is longer than {MAX_TRUTH_CHARACTERS:,} characters")
    text = ground_truth.strip()
    if text.startswith("[") and text.endswith("]"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if value == []:
            raise BadTruth("the list of right answers is empty")
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            if len(value) > _MAX_ALTERNATIVES:
                raise BadTruth(f"more than {_MAX_ALTERNATIVES} right answers")
            if not all(item.strip() for item in value):
                raise BadTruth("one of the right answers is empty")
            return [item.strip() for item in value]
    if not text:
        raise BadTruth("the ground truth is empty")
    return [text]


def json_object(ground_truth: str) -> dict[str, Any]:
    """A ground truth that is a JSON object without NaN and Infinity; some exports hold its JSON text once more."""
    if len(ground_truth) > MAX_TRUTH_CHARACTERS:
        raise BadTruth(f"the ground truth is longer than {MAX_TRUTH_CHARACTERS:,} characters")
    value: Any = ground_truth
    for _ in range(2):
        if isinstance(value, str):
            try:
                value = json.loads(value, parse_constant=_refuse_constant)
            except (ValueError, RecursionError) as error:
                raise BadTruth("the ground truth is no JSON object") from error
    if not isinstance(value, dict):
        raise BadTruth("the ground truth is no JSON object")
    return dict(value)  # what the caller holds is never changed


def whole_number(value: Any, least: int | None = 0) -> int:
    """A count of a constraint; tables turn 3 into 3.0. ValueError for anything else, and for what no text reaches."""
    if isinstance(value, float) and abs(value) <= _MAX_COUNT and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("a count is no whole number")
    if abs(value) > _MAX_COUNT or (least is not None and value < least):
        raise ValueError(f"a count is not between {least or 0} and {_MAX_COUNT:,}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(name)
