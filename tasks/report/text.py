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
from smoltulu.schemas.artifact import Manifest
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


#: Where a forecast of time is from, in words.
_BASES = {"similar": "by a similar stage", "stated": "by compute.device_tflops", "measured": "by measured rates"}


def forecast_and_fact(manifest: Manifest) -> str:
    """What was reckoned of a stage just before it was made, beside what it came to; only figures that were reckoned."""
    forecast = manifest.forecast
    if forecast is None:
        return "–"
    parts = []
    if forecast.seconds is not None:
        fact = manifest.duration_seconds
        times = f", {fact / forecast.seconds:.2g} of it" if forecast.seconds else ""
        basis = f" {_BASES[forecast.basis]}" if forecast.basis else ""
        parts.append(f"time {duration(forecast.seconds)}{basis}, took {duration(fact)}{times}")
    resumed = manifest.resumed_from_steps[-1] if manifest.resumed_from_steps else 0
    for name, reckoned in (("steps", forecast.num_steps), ("tokens", forecast.num_tokens)):
        made = manifest.outputs.get(f"num_{name}")
        # Of a stage that went on from a checkpoint the forecast is of the rest, its outputs count the whole.
        if reckoned is not None and isinstance(made, int) and (name == "steps" or not resumed):
            parts.append(f"{name} {reckoned:,}, were {made - (resumed if name == 'steps' else 0):,}")
    if forecast.device_bytes is not None:
        parts.append(f"memory of a device at least {size(forecast.device_bytes)}")
    return "; ".join(parts) or "–"


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
