"""Instructions with a constraint that code can check: the tiny world's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from smoltulu.tasks.verifiers.names import did_you_mean
from smoltulu.tasks.verifiers.truths import BadTruth, json_object, whole_number
from smoltulu.tasks.verifiers.verdict import Verdict, quoted, right, wrong

_ITEM_MARK = re.compile(r"^(?:[-*•]|\d+[.)])\s*")
_EDGE = " \t\r\n.!?\"'"


def grade_constraint(completion: str, ground_truth: str) -> Verdict:
    """Check the constraint `{"kind": ..., ...}`; see `_CONSTRAINTS` for the kinds and their arguments.

    Every kind also asks for something to be there (`mention`: words, or items `among` given ones), so that empty text
    never passes.
    """
    kind, arguments, mention = read_constraint(ground_truth)
    text = completion.strip()
    if not text:
        return wrong("there is no text")
    folded = " ".join(text.casefold().split())
    missing = [phrase for phrase in mention if not _is_mentioned(phrase, folded)]
    if missing:
        return wrong(f"{quoted(missing[0])} is not mentioned")
    kept = _CONSTRAINTS[kind](text, **arguments)
    return right(f"{kind} is kept") if kept else wrong(f"{kind} is not kept")


def read_constraint(ground_truth: str) -> tuple[str, dict[str, Any], list[str]]:
    """Kind, arguments, and the phrases that the text must mention, in one case. BadTruth for any other ground truth."""
    constraint = json_object(ground_truth)
    kind = constraint.pop("kind", None)
    if not isinstance(kind, str) or kind not in _CONSTRAINTS:
        raise BadTruth(f"unknown kind of constraint {str(kind)[:40]!r}{did_you_mean(str(kind), _CONSTRAINTS)}")
    try:
        mention = _texts(constraint.pop("mention", []))
        readers = _ARGUMENTS[kind]
        if constraint.keys() != readers.keys():
            raise ValueError(f"its arguments are {', '.join(readers) or 'none'}, got {', '.join(constraint) or 'none'}")
        return (
            kind,
            {name: read(constraint[name]) for name, read in readers.items()},
            [" ".join(phrase.casefold().split()) for phrase in mention],
        )
    except ValueError as error:
        raise BadTruth(f"constraint {kind}: {str(error)[:200]}") from error


def _is_mentioned(phrase: str, text: str) -> bool:
    """Whether a phrase stands in a text as whole words. Both without case, and with one space between words."""
    before = r"(?<!\w)" if re.match(r"\w", phrase) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", phrase) else ""
    return re.search(before + re.escape(phrase) + after, text) is not None


def _ends_with(completion: str, *, text: str) -> bool:
    return completion.rstrip(_EDGE).endswith(text.rstrip(_EDGE))


def _starts_with(completion: str, *, text: str) -> bool:
    return completion.startswith(text)


def _word_count(completion: str, *, count: int) -> bool:
    return len(completion.split()) == count


def _items(completion: str, *, count: int, among: list[str]) -> bool:
    """Exactly `count` lines, each a different item of `among`, with or without a list mark."""
    lines = [line.strip() for line in completion.splitlines() if line.strip()]
    items = [_ITEM_MARK.sub("", line).strip(_EDGE).lower() for line in lines]
    allowed = {item.lower() for item in among}
    return len(items) == count and len(set(items)) == len(items) and all(item in allowed for item in items)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip(_EDGE):
        raise ValueError("an argument is no text")
    return value


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ValueError("an argument is no list of texts")
    return [_text(item) for item in value]


_CONSTRAINTS: dict[str, Callable[..., bool]] = {
    "upper_case": str.isupper,  # needs at least one cased letter
    "ends_with": _ends_with,
    "starts_with": _starts_with,
    "word_count": _word_count,
    "items": _items,
}
_ARGUMENTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "upper_case": {},
    "ends_with": {"text": _text},
    "starts_with": {"text": _text},
    "word_count": {"count": whole_number},
    "items": {"count": whole_number, "among": _texts},
}
#: Names of the constraints.
KINDS = tuple(_CONSTRAINTS)
