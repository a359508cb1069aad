"""Competition mathematics: the final expression of an answer (MATH)."""

from __future__ import annotations

import re

from smoltulu.tasks.verifiers.numbers import number


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
    first, second = number(normalised), number(expected)
    return float(first is not None and first == second)


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
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    for mark in ("\\!", "\\,", "\\;", "\\ ", "\\$", "$", "\\%", "%", "^{\\circ}", "^\\circ"):
        text = text.replace(mark, "")
    text = re.sub(r"\\(?:left|right)(?![a-z])", "", text)  # not \\rightarrow
    text = re.sub(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\s+", "", text).strip(".").replace("{,}", "")
