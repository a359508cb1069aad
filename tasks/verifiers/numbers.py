"""Numbers in a text, by value. Linear in the length of the text, whatever the text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

# One number: digits with or without thousands commas, an optional fraction. ASCII digits only.
_NUMBER = re.compile(r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")
_MINUS = str.maketrans("−－﹣–", "----")  # what typesetters write for a minus
_CURRENCY = "$€£¥"


def numbers_in(text: str) -> Iterator[tuple[str, int]]:
    """The numbers of a text of `plain_digits` in their one spelling (see `canonical`), each with the place after it."""
    return ((_signed(text, match), match.end()) for match in _NUMBER.finditer(text))


def last_number(text: str) -> str | None:
    """The last number of a text, in its one spelling."""
    text, last = plain_digits(text), None
    for match in _NUMBER.finditer(text):
        last = match
    return None if last is None else _signed(text, last)


def only_number(text: str) -> str | None:
    """The number in `text` if there is exactly one, else None. `$`, units and a full stop may surround it."""
    found = list(islice(numbers_in(plain_digits(text)), 2))
    return found[0][0] if len(found) == 1 else None


def plain_digits(text: str) -> str:
    """Typographic signs and LaTeX's thousands marks as ASCII."""
    return text.replace("{,}", ",").replace(",\\!", ",").replace("\\$", "$").translate(_MINUS)


def canonical(digits: str) -> str:
    """One spelling of a value: `007.50` and `7.5`, `1,000` and `1000`, `-0` and `0`."""
    sign = "-" if digits.startswith("-") else ""
    whole, _, fraction = digits.lstrip("+-").replace(",", "").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    value = f"{whole}.{fraction}" if fraction else whole
    return value if value == "0" else sign + value


def _signed(text: str, match: re.Match[str]) -> str:
    """A minus before a number, or before its `$`, is its sign unless it joins two things, as in `16-2` and `a-2`."""
    start = match.start()
    while start and text[start - 1] in _CURRENCY:
        start -= 1
    joins = start >= 2 and (text[start - 2].isalnum() or text[start - 2] in ")]}%")
    negative = start >= 1 and text[start - 1] == "-" and not joins
    return canonical(("-" if negative else "") + match.group())
