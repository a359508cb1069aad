"""One number in a text, by value."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

# One number: an optional sign, digits with or without thousands commas, an optional fraction.
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-+]?\.\d+")


def only_number(text: str) -> Decimal | None:
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
    return number(written)


def number(text: str) -> Decimal | None:
    """The value of a text that is nothing but a number, with or without thousands commas; else None."""
    try:
        value = Decimal(text.replace(",", "").strip())
    except InvalidOperation:
        return None
    return value if value.is_finite() else None
