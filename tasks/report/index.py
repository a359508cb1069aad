"""The index of a store's runs: one table, newest first, with the scores of every model and links to the reports.

A store may hold a thousand runs, made by several versions: summaries are read as plain JSON, and of what has another
form nothing is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from pydantic import ValidationError

from smoltulu.schemas.run import RunRecord
from smoltulu.schemas.verdict import Verdict
from smoltulu.tasks.report import text, verdict
from smoltulu.tasks.report.render import render

_MAX_SCORES = 4


@dataclass(frozen=True)
class IndexedRun:
    """A line of the index.

    link    to its report, relative to the index, as an address; empty where there is none
    scores  (model, its first scores as text) of every language model that was measured
    said    the sentence over its last model; empty where nothing was compared
    """

    name: str
    recipe: str
    state: str
    started_at: str
    seconds: float | None
    num_made: int
    num_planned: int
    link: str
    scores: list[tuple[str, str]]
    said: str

    @classmethod
    def of(cls, record: RunRecord, state: str, summary: Mapping[str, Any], link: str) -> IndexedRun:
        """From a run's record and its summary as JSON (empty where there is none)."""
        there = ("Completed", "Cached", "Resumed")
        stages = summary.get("stages")
        outcomes = (
            [one.get("outcome") for one in stages if isinstance(one, dict)]
            if isinstance(stages, list)
            else list(record.outcomes.values())
        )
        return cls(
            name=record.run_name,
            recipe=record.recipe,
            state=state,
            started_at=record.started_at,
            seconds=text.seconds_between(record.started_at, record.finished_at),
            num_made=sum(outcome in there for outcome in outcomes),
            num_planned=len(record.stages),
            link=quote(link),
            scores=_scores(summary.get("scores")),
            said=_said(summary.get("verdict")),
        )


def index_page(store: str, runs: Sequence[IndexedRun], notes: Sequence[str], written_at: str) -> str:
    """The page. `notes`: records that were passed over, and why."""
    return render("index.html.jinja", store=store, runs=runs, notes=notes, written_at=written_at)


def _scores(scores: object) -> list[tuple[str, str]]:
    by_model: dict[str, list[str]] = {}
    for score in scores if isinstance(scores, list) else ():
        if not isinstance(score, dict) or score.get("kind") != "language_model":
            continue
        value, stderr = score.get("value"), score.get("stderr")
        if isinstance(value, (int, float)):
            shown = text.score(value, stderr if isinstance(stderr, (int, float)) else None)
            name = verdict.task_title(str(score.get("task")))
            by_model.setdefault(str(score.get("subject")), []).append(f"{name} {shown}")
    return [(text.title(model), ", ".join(_first(found))) for model, found in by_model.items()]


def _first(found: Sequence[str]) -> list[str]:
    more = len(found) - _MAX_SCORES
    return [*found[:_MAX_SCORES], *([f"{more} more"] if more > 0 else [])]


def _said(found: object) -> str:
    try:
        said = Verdict.model_validate(found)
    except ValidationError:
        return ""
    return verdict.headline(said) if said.num_tests else ""
