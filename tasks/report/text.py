"""Numbers, times and names as a reader sees them."""

from __future__ import annotations

import re
from datetime import datetime

from smoltulu.schemas.recipe import Recipe

SHORT_KEY = 8
#: Control characters but tab and newline, line separators, marks of direction, surrogates.
_UNSHOWABLE = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"


def title(stage: str) -> str:
    """What people read: the title of a recipe's block (`sft` -> `SFT`), else `reward_model` -> `Reward model`."""
    field = Recipe.model_fields.get(stage)
    return (field.title if field else None) or stage.replace("_", " ").capitalize()


def number(value: float | int) -> str:
    """Four significant digits; whole numbers in full with separators."""
    if isinstance(value, int) or (abs(value) < 1e15 and float(value).is_integer()):
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.4g}"


def score(value: float, stderr: float | None) -> str:
    """`0.703 ± 0.020`: three decimals below ten, else one; no ± where the standard error is unknown."""
    decimals = 3 if abs(value) < 10 else 1
    return f"{value:.{decimals}f}" + ("" if stderr is None else f" ± {stderr:.{decimals}f}")


def percent(share: float) -> str:
    """Share in percent; a share that is not 0 never reads as 0."""
    return "0 %" if share == 0 else "< 0.01 %" if share < 1e-4 else f"{100 * share:.2f} %"


def duration(seconds: float) -> str:
    """`3.4 s`, `4 min 12 s`, `3 h 05 min`, `2 d 4 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def size(num_bytes: int) -> str:
    """Bytes in decimal units."""
    amount = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.4g} {unit}"
        amount /= 1000
    return f"{amount:.4g} GB"


def moment(timestamp: str) -> str:
    """`2026-11-21 07:04:12 UTC` from an ISO time; what is no time stays as it is."""
    try:
        return datetime.fromisoformat(timestamp).strftime("%Y-%m-%d %H:%M:%S UTC")
    except ValueError:
        return timestamp


def seconds_between(start: str, end: str) -> float | None:
    """Seconds from one ISO time to another; None where either is none or they are out of order."""
    try:
        seconds = (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
    except (ValueError, TypeError):
        return None
    return seconds if seconds >= 0 else None


def artifact_key(text: str) -> str:
    """A Prefect artifact key (`^[a-z0-9-]+$`) from any text: `Tiny run/DPO` -> `tiny-run-dpo`."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def clean(value: object) -> str:
    """Text without what HTML, UTF-8 or a terminal cannot show, or what turns the reading direction: as U+FFFD."""
    return re.sub(_UNSHOWABLE, "�", str(value))


def markdown_text(value: object) -> str:
    """`value` as plain text within a line of Markdown, also in a cell of a table."""
    line = re.sub(r"([\\`*\[\]|~$])|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", clean(" ".join(str(value).split())))
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown_code(value: object) -> str:
    """`value` as code within a line: no backtick ends it, no pipe ends the cell that it is in."""
    line = clean(" ".join(str(value).split())).replace("`", "'").replace("|", "¦")
    return f"`{line or '–'}`"


def markdown_block(value: str, language: str = "text") -> str:
    """A fenced block whose fence is longer than any run of backticks in `value`."""
    fence = "`" * (1 + max([2, *(len(run) for run in re.findall(r"`+", value))]))
    return f"{fence}{language}\n{clean(value).rstrip()}\n{fence}"
