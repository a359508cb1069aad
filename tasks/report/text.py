"""Names, times and Markdown in reports; the numbers are formatted by artifacts/readable.py."""

from __future__ import annotations

import re
from datetime import datetime

from smoltulu.artifacts.readable import (  # noqa: F401
    clean,
    duration,
    number,
    percent,
    score,
    seconds_between,
    size,
    visible,
)
from smoltulu.schemas.recipe import Recipe

SHORT_KEY = 8


def title(stage: str) -> str:
    """Title of a stage: that of its recipe block (`sft` -> `SFT`), else its name (`reward_model` -> `Reward model`)."""
    field = Recipe.model_fields.get(stage)
    return (field.title if field else None) or stage.replace("_", " ").capitalize()


def moment(timestamp: str) -> str:
    """`2026-11-21 07:04:12 UTC` from an ISO time, for pages; other text stays as it is."""
    try:
        return datetime.fromisoformat(timestamp).strftime("%Y-%m-%d %H:%M:%S UTC")
    except ValueError:
        return timestamp


def local_minute(timestamp: object) -> str:
    """`2026-11-21 08:04` in local time from an ISO time, for terminals; other text stays as it is."""
    try:
        return datetime.fromisoformat(str(timestamp)).astimezone().strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return str(timestamp or "")


def artifact_key(text: str) -> str:
    """A Prefect artifact key (`^[a-z0-9-]+$`) from any text: `Tiny run/DPO` -> `tiny-run-dpo`."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def markdown_text(value: object) -> str:
    """`value` as plain text within a line of Markdown, or in a table cell."""
    line = re.sub(r"([\\`*\[\]|~$])|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", clean(" ".join(str(value).split())))
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown_code(value: object) -> str:
    """`value` as code within a line. No backtick in it ends the code, no pipe ends the table cell."""
    line = clean(" ".join(str(value).split())).replace("`", "'").replace("|", "¦")
    return f"`{line or '–'}`"


def markdown_block(value: str, language: str = "text") -> str:
    """A fenced block whose fence is longer than any run of backticks in `value`."""
    fence = "`" * (1 + max([2, *(len(run) for run in re.findall(r"`+", value))]))
    return f"{fence}{language}\n{clean(value).rstrip()}\n{fence}"
