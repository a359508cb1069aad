"""Names, times and Markdown of reports; numbers are those of artifacts/readable.py."""

from __future__ import annotations

import re
from datetime import datetime

from smoltulu.artifacts.readable import duration, number, percent, score, seconds_between, size  # noqa: F401
from smoltulu.schemas.recipe import Recipe

SHORT_KEY = 8


def title(stage: str) -> str:
    """What people read: the title of a recipe's block (`sft` -> `SFT`), else `reward_model` -> `Reward model`."""
    field = Recipe.model_fields.get(stage)
    return (field.title if field else None) or stage.replace("_", " ").capitalize()


def moment(timestamp: str) -> str:
    """`2026-11-21 07:04:12 UTC` from an ISO time; what is no time stays as it is."""
    try:
        return datetime.fromisoformat(timestamp).strftime("%Y-%m-%d %H:%M:%S UTC")
    except ValueError:
        return timestamp


def artifact_key(text: str) -> str:
    """A Prefect artifact key (`^[a-z0-9-]+$`) from any text: `Tiny run/DPO` -> `tiny-run-dpo`."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def markdown_text(value: object) -> str:
    """`value` as one line of plain text inside Markdown, also in a table cell: names and errors come from outside."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown_block(value: str) -> str:
    """A fenced block whose fence is longer than any run of backticks in `value`."""
    fence = "`" * (1 + max([2, *(len(run) for run in re.findall(r"`+", value))]))
    return f"{fence}text\n{value}\n{fence}"
