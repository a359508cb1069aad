"""The page of an experiment with selection: verdicts, a figure a class, tables, and what the arms trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.sweep import SelectionRoles, SweptTask
from smoltulu.tasks.report.render import render
from smoltulu.tasks.selection_experiment import words
from smoltulu.tasks.selection_experiment.verdict import Beside, Judged, Row
from smoltulu.tasks.surface.figures import Drawing, pages
from smoltulu.tasks.surface.page import CellRow, DrawnFigure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Colour-blind safe (Okabe and Ito).
_SELECTOR, _CONTROL, _OTHER, _RUNS = "#D55E00", "#0072B2", "#000000", "#999999"
_MAX_NAME = 18


def draw_experiment(
    settings: Sequence[tuple[str, Sequence[Row]]], roles: SelectionRoles, classes: Mapping[str, Sequence[SweptTask]]
) -> list[DrawnFigure]:
    """A figure a setting (name, rows), a panel a class: by how much each arm is better than the mean of `random`."""
    made = []
    for number, (name, rows) in enumerate(settings):
        of_class = {one: [row for row in rows if row.task_class == one and row.task is None] for one in classes}
        draws = [_forest(one, own, roles) for one, own in of_class.items() if own]
        if draws:
            panels, pdf = pages(draws)
            file = f"{number:02d}-arms" if number else "00-arms"
            made.append(DrawnFigure(file, "arms", name or "Arms beside random", panels, pdf))
    return made


def _forest(task_class: str, rows: Sequence[Row], roles: SelectionRoles) -> Drawing:
    def draw(axes: Axes, beside: Any) -> None:
        beside.remove()  # there is no colour bar: its place is the panel's
        axes.set_position((0.3, 0.15, 0.66, 0.7))
        zero = next((row.mean for row in rows if row.arm == roles.random), 0.0)
        axes.axvline(0.0, color=_CONTROL, lw=0.8, dashes=(2, 2))
        for height, row in enumerate(reversed(rows)):
            is_control = row.arm in (roles.random, roles.longest)
            colour = _SELECTOR if row.arm in roles.selectors else _CONTROL if is_control else _OTHER
            shifted = [run - zero for run in row.runs]
            axes.plot(shifted, [height - 0.18] * len(shifted), "|", color=_RUNS, ms=5, mew=0.8, gid=f"runs-{row.arm}")
            axes.plot([row.mean - zero], [height], "o", color=colour, ms=4, gid=f"arm-{row.arm}", zorder=3)
            if row.against is not None:
                axes.plot(
                    [row.against.low, row.against.high], [height] * 2, color=colour, lw=1.4, solid_capstyle="butt"
                )
        axes.set_yticks(range(len(rows)), [_short(row.arm) for row in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_title(_short(task_class, 40))
        axes.set_xlabel("better than random by")

    return draw


def _short(text: str, longest: int = _MAX_NAME) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def experiment_page(
    *,
    name: str,
    description: str,
    facts: Sequence[tuple[str, str]],
    notes: Sequence[str],
    roles: SelectionRoles,
    classes: Mapping[str, Sequence[SweptTask]],
    judged: Sequence[Judged],
    num_tests: int,
    settings: Sequence[Mapping[str, Any]],
    drawn: Sequence[DrawnFigure],
    scores: Sequence[str],
    rows: Sequence[CellRow],
    failures: Sequence[tuple[str, str]],
    files: Sequence[str],
    written_at: str,
) -> str:
    """The page.

    Args:
        settings: of each rate, batch and budget: name, rows, beside, notes, tokens (arm, texts), null (a sentence).
        scores: heads of the scores of the cells.
        failures: cells that failed or diverged, and why.
        files: names of the tables beside the page.
    """
    from markupsafe import Markup

    return render(
        "selection_experiment.html.jinja",
        name=name,
        description=description,
        facts=facts,
        notes=notes,
        headline=headline(judged),
        roles=roles,
        judged=[_told(one) for one in judged],
        num_tests=num_tests,
        settings=[
            {
                **one,
                "rows": [_arm(row, classes) for row in one["rows"]],
                "beside": [_pair(pair) for pair in one["beside"]],
            }
            for one in settings
        ],
        figures=[
            {"title": one.title, "file": one.file, "panels": [Markup(panel) for panel in one.panels]} for one in drawn
        ],
        scores=scores,
        rows=rows,
        failures=failures,
        files=files,
        written_at=written_at,
    )


def headline(judged: Sequence[Judged]) -> str:
    """The first sentence of the page: every class by itself."""
    if not judged:
        return "No arm has scores beside those of random yet."
    told = []
    for name in dict.fromkeys(one.task_class for one in judged):
        of_class = [one for one in judged if one.task_class == name]
        if good := list(dict.fromkeys(one.selector for one in of_class if one.word == "beats random and longest")):
            told.append(f"{name}: {', '.join(good)} {'beats' if len(good) == 1 else 'beat'} random and longest")
        elif all(one.word == "no verdict" for one in of_class):
            told.append(f"{name}: no verdict")
        else:
            told.append(f"{name}: no selector beats random and longest")
    return "; ".join(told) + "."


def _told(one: Judged) -> dict[str, Any]:
    return {
        "setting": one.setting,
        "selector": one.selector,
        "task_class": one.task_class,
        "word": one.word,
        "against": [words.against_text(against) for against in one.against],
        "reason": one.reason,
    }


def _arm(row: Row, classes: Mapping[str, Sequence[SweptTask]]) -> dict[str, Any]:
    tasks = (row.task,) if row.task else tuple(classes[row.task_class])
    return {
        "arm": row.arm,
        "what": row.task.task if row.task else row.task_class,
        "is_class": row.task is None,
        "metric": words.metric_text(tasks),
        "num_seeds": len(row.runs),
        "mean": words.mean_text(row, tasks),
        "against": words.interval_text(row.against) if row.against else "–",
    }


def _pair(one: Beside) -> dict[str, str]:
    return {
        "selector": one.selector,
        "other": one.other,
        "task_class": one.task_class,
        "interval": words.interval_text(one.test),
    }
