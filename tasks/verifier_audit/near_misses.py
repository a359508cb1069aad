"""Near misses: answers that are nearly the gold answer, and wrong. Pure.

A rule that takes what is close, ignores a sign or looks for the gold answer anywhere passes all that is far from it.
"""

from __future__ import annotations

import re
from fractions import Fraction

#: A number as a gold answer writes it.
_PLAIN = re.compile(r"(-?)((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)")
_MAX_DIGITS = 40


def near_misses(answer: str) -> dict[str, str]:
    """Name -> a number near `answer` of another value. None where the answer is no plain number."""
    match = _PLAIN.fullmatch(answer.strip())
    if match is None or len(match[2]) > _MAX_DIGITS:
        return {}
    sign, digits = match[1], match[2].replace(",", "")
    value = Fraction(sign + digits)
    num_decimals = len(digits.partition(".")[2])
    tried = {
        "one more": _decimal(value + 1, num_decimals),
        "one less": _decimal(value - 1, num_decimals),
        "the other sign": _decimal(-value, num_decimals),
        "ten times": _decimal(value * 10, num_decimals),
        "a tenth": _decimal(value / 10, num_decimals + 1),
        "a digit before": f"{sign}1{digits}",
        "a digit after": f"{sign}{digits}1",
        "two digits swapped": sign + _swapped(digits),
    }
    return {f"near miss: {name}": text for name, text in tried.items() if Fraction(text) != value}


def hedges(answer: str, with_latex: bool) -> dict[str, str]:
    """Name -> the answer and another one: a text that commits itself to neither. None for what is no plain number."""
    other = near_misses(answer).get("near miss: one more")
    if other is None:
        return {}
    name = "near miss: the answer or another"
    found = {name: f"{answer} or {other}"}
    if with_latex:
        found[f"{name}, in LaTeX"] = f"{answer}\\text{{ or }}{other}"
        found[f"{name}, within \\text"] = f"{answer}\\text{{ or {other}}}"
    return found


def _decimal(value: Fraction, num_decimals: int) -> str:
    """Exactly: the value has no more decimals than that."""
    scaled = value * 10**num_decimals
    assert scaled.denominator == 1
    digits = f"{abs(scaled.numerator):0{num_decimals + 1}d}"
    whole, fraction = (digits[:-num_decimals], digits[-num_decimals:].rstrip("0")) if num_decimals else (digits, "")
    return ("-" if value < 0 else "") + whole + (f".{fraction}" if fraction else "")


def _swapped(digits: str) -> str:
    """The first two neighbours that differ, in the other order."""
    for place in range(len(digits) - 1):
        first, second = digits[place], digits[place + 1]
        if first != second and "." not in (first, second):
            return digits[:place] + second + first + digits[place + 2 :]
    return digits
