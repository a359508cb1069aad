"""Instructions with a constraint that code can check: the tiny world's own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

_ITEM_MARK = re.compile(r"^(?:[-*•]|\d+[.)])\s*")
_EDGE = " \t\r\n.!?\"'"


def verify_constraint(completion: str, ground_truth: str) -> float | None:
    """Check the constraint `{"kind": ..., ...}`; see `_CONSTRAINTS` for the kinds and their arguments.

    Every kind also asks for something to be there (`mention`: words, or items `among` given ones), so that empty text
    never passes.
    """
    try:
        constraint = json.loads(ground_truth)
        check = _CONSTRAINTS[constraint["kind"]]
        arguments = {name: value for name, value in constraint.items() if name not in ("kind", "mention")}
        words = [word.lower() for word in constraint.get("mention", [])]
        # A dry run: wrong arguments are the ground truth's fault, whatever the completion.
        check("probe", **arguments)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    text = completion.strip()
    present = set(re.findall(r"\w+", text.lower()))
    return float(bool(text) and all(word in present for word in words) and check(text, **arguments))


def _ends_with(completion: str, *, text: str) -> bool:
    return bool(text) and completion.rstrip(_EDGE).endswith(text.rstrip(_EDGE))


def _starts_with(completion: str, *, text: str) -> bool:
    return bool(text) and completion.startswith(text)


def _word_count(completion: str, *, count: int) -> bool:
    return len(completion.split()) == int(count)


def _items(completion: str, *, count: int, among: list[str]) -> bool:
    """Exactly `count` lines, each a different item of `among`, with or without a list mark."""
    lines = [line.strip() for line in completion.splitlines() if line.strip()]
    items = [_ITEM_MARK.sub("", line).strip(_EDGE).lower() for line in lines]
    allowed = {item.lower() for item in among}
    return len(items) == int(count) and len(set(items)) == len(items) and all(item in allowed for item in items)


_CONSTRAINTS: dict[str, Callable[..., bool]] = {
    "upper_case": str.isupper,  # needs at least one cased letter
    "ends_with": _ends_with,
    "starts_with": _starts_with,
    "word_count": _word_count,
    "items": _items,
}
