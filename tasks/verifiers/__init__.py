"""Verifiers: does a completion answer a prompt correctly? Pure functions of text; no model, no network, no `eval`.

`verify(name, completion, ground_truth)` returns 1.0 or 0.0, or None where the *ground truth* cannot be read: a data
error must not punish or reward the policy. A completion, however odd, never raises: an exception would end an RL run
after hours. Only programming errors raise: an unknown verifier name, or an argument that is not text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

# One number: an optional sign, digits with or without thousands commas, an optional fraction.
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-+]?\.\d+")
# A sign between two numbers is an operator ("3-5" holds 3 and 5), so it is looked at only after a non-digit.
_ITEM_MARK = re.compile(r"^(?:[-*•]|\d+[.)])\s*")
_EDGE = " \t\r\n.!?\"'"


def verify(name: str, completion: str, ground_truth: str) -> float | None:
    """Score one completion.

    Args:
        name: a verifier, see `VERIFIERS`.
        completion: what the model wrote (the assistant's text only, without the template's headers).
        ground_truth: the answer in that verifier's own form.

    Returns:
        1.0 right, 0.0 wrong, None if the ground truth cannot be graded.

    Raises:
        ValueError: unknown verifier name.
    """
    return get_verifier(name)(completion, ground_truth)


def get_verifier(name: str) -> Callable[[str, str], float | None]:
    """The verifier called `name`; names are compared without case, as datasets write both `MATH` and `math`."""
    verifier = VERIFIERS.get(name.lower()) if isinstance(name, str) else None
    if verifier is None:
        known = ", ".join(sorted(VERIFIERS))
        hint = (
            " IFEval's own constraint functions are not implemented yet: drop those rows from data.rlvr."
            if isinstance(name, str) and name.lower() == "ifeval"
            else " Map the dataset's name to one of these, or drop its rows."
        )
        raise ValueError(f"unknown verifier {name!r}; known verifiers: {known}.{hint}")
    return verifier


def verify_gsm8k(completion: str, ground_truth: str) -> float | None:
    """Numeric equality of the one number after the last `####`.

    The ground truth is a number or a worked answer with `#### number`. Text after `####` that holds no number, or more
    than one (a guess spread over several), is wrong.
    """
    expected = _only_number(ground_truth.rpartition("####")[2])
    if expected is None:
        return None
    _, mark, tail = completion.rpartition("####")
    given = _only_number(tail) if mark else None
    return float(given is not None and given == expected)


def verify_math(completion: str, ground_truth: str) -> float | None:
    r"""Equality of the final expression: the last `\boxed{}`, else the text between the last two `$`.

    What it lacks: no symbolic equivalence (`1/2` against `\frac{1}{2}` or `0.5` against `\frac12` is wrong, `x+1`
    against `1+x` too) and no units; numbers are compared by value. It errs on the strict side: a right answer may
    score 0, a wrong one does not score 1.
    """
    expected = _normalised_math(_final_expression(ground_truth) or ground_truth)
    if not expected:
        return None
    given = _final_expression(completion)
    if given is None:
        return 0.0
    normalised = _normalised_math(given)
    if normalised == expected:
        return 1.0
    first, second = _whole_number(normalised), _whole_number(expected)
    return float(first is not None and first == second)


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


def _upper_case(text: str) -> bool:
    return text.isupper()  # needs at least one cased letter


def _ends_with(text: str, *, text_: str) -> bool:
    return bool(text_) and text.rstrip(_EDGE).endswith(text_.rstrip(_EDGE))


def _starts_with(text: str, *, text_: str) -> bool:
    return bool(text_) and text.startswith(text_)


def _word_count(text: str, *, count: int) -> bool:
    return len(text.split()) == int(count)


def _items(text: str, *, count: int, among: list[str]) -> bool:
    """Exactly `count` lines, each a different item of `among`, with or without a list mark."""
    items = [_ITEM_MARK.sub("", line.strip()).strip(_EDGE).lower() for line in text.splitlines() if line.strip()]
    allowed = {item.lower() for item in among}
    return len(items) == int(count) and len(set(items)) == len(items) and all(item in allowed for item in items)


# `text` is the ground truth's name for the ending or the beginning; the completion is the positional argument.
_CONSTRAINTS: dict[str, Callable[..., bool]] = {
    "upper_case": _upper_case,
    "ends_with": lambda completion, *, text: _ends_with(completion, text_=text),
    "starts_with": lambda completion, *, text: _starts_with(completion, text_=text),
    "word_count": _word_count,
    "items": _items,
}

VERIFIERS: dict[str, Callable[[str, str], float | None]] = {
    "gsm8k": verify_gsm8k,
    "math": verify_math,
    "constraint": verify_constraint,
}


def _only_number(text: str) -> Decimal | None:
    """The number in `text` if there is exactly one, else None. `$`, units and a full stop may surround it."""
    text = text.replace("−", "-")  # the typographic minus
    found = list(_NUMBER.finditer(text))
    if len(found) != 1:
        return None
    match = found[0]
    written = match.group()
    # "-$5" carries its sign in front of the currency.
    before = text[: match.start()].rstrip(" $")
    if before.endswith("-") and not written.startswith(("-", "+")):
        written = "-" + written
    return _whole_number(written)


def _whole_number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.replace(",", "").strip())
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _final_expression(text: str) -> str | None:
    r"""Contents of the last `\boxed{...}` (braces may nest), else the text between the last two `$`; else None."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth, begin = 0, start + len("\\boxed")
        for position in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[begin + 1 : position]
        return None  # the brace never closes: a truncated answer
    pieces = text.split("$")
    return pieces[-2] if len(pieces) >= 3 and pieces[-2].strip() else None


def _normalised_math(text: str) -> str:
    """Drop what never changes a value: spacing commands, \\left and \\right, display fractions, outer punctuation."""
    for old, new in (
        ("\\dfrac", "\\frac"),
        ("\\tfrac", "\\frac"),
        ("\\!", ""),
        ("\\,", ""),
        ("\\;", ""),
        ("\\ ", ""),
        ("\\$", ""),
        ("$", ""),
        ("\\%", ""),
        ("%", ""),
        ("^{\\circ}", ""),
        ("^\\circ", ""),
    ):
        text = text.replace(old, new)
    text = re.sub(r"\\(?:left|right)(?![a-z])", "", text)  # not \\rightarrow
    text = re.sub(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\s+", "", text).strip(".").replace("{,}", "")


__all__: list[Any] = ["VERIFIERS", "get_verifier", "verify", "verify_constraint", "verify_gsm8k", "verify_math"]
