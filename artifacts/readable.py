"""Numbers and texts as people read them: in logs, tables, errors and reports alike. Pure.

It lies here because the errors of `artifacts/` are its lowest callers. What is not 0 never reads as 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

#: Control characters but tab and newline, line separators, marks of direction, surrogates.
_UNSHOWABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")


def clean(value: object) -> str:
    """Text without what HTML, UTF-8 or a terminal cannot show, or what turns the reading direction: as U+FFFD."""
    return _UNSHOWABLE.sub("�", str(value))


def visible(value: object) -> str:
    """Text in which what `clean` would replace is written out (`\\u202e`), so that a reader sees that it is there."""
    return _UNSHOWABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", str(value))


def log_text(text: str) -> str:
    """What a process says, for a log: without colours, else as `clean`."""
    return clean(_COLOUR.sub("", text))


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that a person may also look at: as it is, but what `clean` would replace is escaped."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return visible(text)


def duration(seconds: float) -> str:
    """`45 ms`, `3.4 s`, `45 s`, `4 min 12 s`, `3 h 05 min`, `2 d 4 h`: rounded to the last unit that is shown."""
    if seconds < 0.0995:
        return "0 s" if seconds <= 0 else "< 1 ms" if seconds < 0.0005 else f"{1000 * seconds:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if (whole := round(seconds)) < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if (minutes := round(seconds / 60)) < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def seconds_between(start: str | None, end: str | None) -> float | None:
    """Seconds from one ISO time to another; None where either is none or they are out of order."""
    try:
        seconds = (datetime.fromisoformat(end or "") - datetime.fromisoformat(start or "")).total_seconds()
    except (ValueError, TypeError):
        return None
    return seconds if seconds >= 0 else None


def size(num_bytes: float) -> str:
    """Bytes in three digits and decimal units: `512 B`, `1.02 kB`, `3.81 MB`, `82.1 GB`, `2 TB`."""
    return _three_digits(num_bytes, (" B", " kB", " MB", " GB", " TB", " PB"))


def count(value: float) -> str:
    """A count in three digits: `998`, `12.3k`, `486M`, `1.05e+19`."""
    return f"{value:.2e}" if value >= 999.5e9 else _three_digits(value, ("", "k", "M", "G"))


def _three_digits(value: float, units: Sequence[str]) -> str:
    """`value` with the first unit, each a thousand of the one before, in which it does not read as 1000."""
    for unit in units[:-1]:
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}{units[-1]}"


def number(value: float) -> str:
    """Four significant digits; whole numbers in full with separators."""
    if isinstance(value, int) or (abs(value) < 1e15 and float(value).is_integer()):
        return f"{int(value):,}"
    if abs(value) >= 999.95:
        return f"{value:,.0f}"
    return f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.4g}"


def score(value: float, stderr: float | None) -> str:
    """`0.703 ± 0.020`: three decimals below ten, else one; no ± where the standard error is unknown."""
    decimals = 3 if abs(value) < 10 else 1
    return f"{value:.{decimals}f}" + ("" if stderr is None else f" ± {stderr:.{decimals}f}")


def percent(share: float) -> str:
    """Share in percent, with the two decimals of the contamination papers: `0 %`, `< 0.01 %`, `6.25 %`."""
    return "0 %" if share == 0 else "< 0.01 %" if share < 0.00005 else f"{100 * share:.2f} %"
