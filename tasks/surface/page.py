"""The page of a sweep: figures and values, laid out by a template of tasks/report. The paper's figure comes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smoltulu.schemas.recommendation import Recommendation
from smoltulu.tasks.report.render import render
from smoltulu.tasks.report.text import artifact_key
from smoltulu.tasks.surface import figures, words
from smoltulu.tasks.surface.accounts import ACCOUNTS
from smoltulu.tasks.surface.analysis import Analysis, ClassAnalysis, Said, TaskAnalysis
from smoltulu.tasks.surface.figures import Drawing, Labels
from smoltulu.tasks.surface.panels import TaskPanels, arms_of, panels_of, paper_panels


@dataclass(frozen=True)
class DrawnFigure:
    """A figure: panels as `<svg>` elements for the page, and all of them as a PDF.

    file   name of its files, without suffix
    kind   paper, surface, slices or arms
    """

    file: str
    kind: str
    title: str
    panels: tuple[str, ...]
    pdf: bytes


@dataclass(frozen=True)
class CellRow:
    """A cell in the page's table. `scores`: of every score of the sweep, as text."""

    name: str
    state: str
    learning_rate: float
    batch: int
    tokens_a_step: float | None
    max_tokens: int
    seed: int
    size: str
    arm: str
    block: str
    scores: tuple[str, ...]
    message: str


def draw_all(analyses: Sequence[Analysis], labels: Labels) -> list[DrawnFigure]:
    """Every figure of a sweep."""
    if not analyses:
        return []
    made: list[DrawnFigure] = []

    def add(kind: str, title: str, draws: list[Drawing]) -> None:
        file = f"{len(made):02d}-{artifact_key(f'{kind} {title}')[:60].rstrip('-')}"
        panels, pdf = figures.pages(draws)
        # The paper's figure is one to print: side by side.
        made.append(DrawnFigure(file, kind, title, panels, figures.sheet(draws) if kind == "paper" else pdf))

    paper = [figures.surface(panels, panel, labels, plain=True) for panels, panel in paper_panels(analyses[0])]
    add("paper", "Score over learning rate and batch size", paper)
    for analysis in analyses:
        for one in analysis.tasks:
            panels = panels_of(one, analysis.arm)
            title = panels.name + ("" if analysis.arm == "main" else f", arm {analysis.arm}")
            add("surface", title, [figures.surface(panels, panel, labels) for panel in panels.panels])
            add("slices", title, [figures.slices(panels, panel, labels) for panel in panels.panels])
    if len(analyses) > 1:
        draws = [figures.arms(one.task.task, arms_of(analyses, one.task)) for one in analyses[0].units]
        add("arms", "Best learning rate by arm", draws)
    return made


def sweep_page(
    *,
    name: str,
    facts: Sequence[tuple[str, str]],
    is_scan: bool,
    description: str,
    notes: Sequence[str],
    analyses: Sequence[Analysis],
    drawn: Sequence[DrawnFigure],
    recommendation: Recommendation | None,
    scores: Sequence[str],
    rows: Sequence[CellRow],
    failures: Sequence[tuple[str, str]],
    files: Sequence[str],
    turning: str,
    written_at: str,
) -> str:
    """The page.

    Args:
        scores: heads of the scores of the rows.
        failures: cells that failed or diverged, and why.
        files: names of the tables beside the page.
        turning: file of the page whose figures can be turned; empty where there is none.
    """
    return render(
        "sweep.html.jinja",
        name=name,
        facts=facts,
        description=description,
        headline=words.headline(analyses[0] if analyses else None, is_scan),
        notes=notes,
        arms=[_arm(one) for one in analyses],
        claims=[words.claim_text(test) for test in analyses[0].claims] if analyses else [],
        paper=[_shown(one) for one in drawn if one.kind == "paper"],
        surfaces=_pairs(drawn),
        compared=[_shown(one) for one in drawn if one.kind == "arms"],
        accounts=ACCOUNTS,
        choices=_choices(recommendation),
        scores=scores,
        rows=rows,
        failures=failures,
        files=files,
        turning=turning,
        written_at=written_at,
    )


def _shown(one: DrawnFigure) -> dict[str, Any]:
    from markupsafe import Markup

    return {"title": one.title, "file": one.file, "panels": [Markup(panel) for panel in one.panels]}


def _pairs(drawn: Sequence[DrawnFigure]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Surface and slices of each task."""
    surfaces = [_shown(one) for one in drawn if one.kind == "surface"]
    slices = [_shown(one) for one in drawn if one.kind == "slices"]
    return list(zip(surfaces, slices, strict=True))


def _arm(analysis: Analysis) -> dict[str, Any]:
    tasks = [_task(one) for one in analysis.tasks]
    return {
        "name": analysis.arm,
        "classes": [_class(one) for one in analysis.classes],
        "tasks": tasks,
        "check": words.check_text(analysis.tasks),
    }


def _class(one: ClassAnalysis) -> dict[str, Any]:
    return _told(one.name, one.said) | {"of": ", ".join(one.tasks)}


def _task(one: TaskAnalysis) -> dict[str, Any]:
    forms = [(form.form, form.bic, form.f_value, words.p_text(form.p_value)) for form in one.forms]
    name = TaskPanels(one.task, "", (), 0, 1).name
    return _told(name, one.said) | {
        "task_class": one.task.task_class,
        "forms": forms,
        "is_at_floor": one.is_at_floor,
        "optima": [
            {
                "batch": 2**best.log2_batch,
                "tokens": figures.tokens_text(best.log2_tokens),
                "log2_lr": best.log2_lr,
                "stderr": best.stderr,
                "check": check,
                "num_seeds": best.num_seeds,
                "flaw": figures.flag_text(best.flaw),
            }
            for best, check in zip(one.found.optima, one.checks, strict=True)
        ],
    }


def _told(name: str, said: Said) -> dict[str, Any]:
    return {
        "name": name,
        "sentence": words.sentence(name, said),
        "slopes": words.slope_texts(said),
        "alpha": words.slope_text(said, "alpha"),
        "gamma": words.slope_text(said, "gamma"),
        "delta": words.slope_text(said, "delta"),
        "words": said.words,
        "reasons": words.reasons(said),
        "misfit": words.misfit_text(said),
    }


def _choices(recommendation: Recommendation | None) -> list[dict[str, Any]]:
    if recommendation is None:
        return []
    return [{"place": one, "yaml": recommendation.as_yaml(number)} for number, one in enumerate(recommendation.choices)]
