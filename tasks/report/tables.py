"""Tables of scores as Markdown, LaTeX and HTML, and the models of a run that they are made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from smoltulu.schemas.artifact import Manifest
from smoltulu.schemas.evaluation import EvaluationOutputs, ScoreKind
from smoltulu.tasks.comparison.evaluations import Measured, measured
from smoltulu.tasks.report import text
from smoltulu.tasks.report.latex import latex
from smoltulu.tasks.report.render import render
from smoltulu.tasks.report.summary import outputs_of
from smoltulu.tasks.tables.build import LEVEL, tables_of
from smoltulu.tasks.tables.published import load_published
from smoltulu.tasks.tables.values import MeasuredModel, Table

if TYPE_CHECKING:
    from markupsafe import Markup

Format = Literal["markdown", "latex", "html"]


def measured_model(
    label: str, outputs: EvaluationOutputs, config: Mapping[str, Any], folder: Path | None
) -> tuple[MeasuredModel, str]:
    """A column from one evaluation, and why its items could not be read, if so: its scores then take part in no test.

    config   of the evaluation's spec, as its manifest has it
    """
    kinds: tuple[ScoreKind, ...] = get_args(ScoreKind)
    kind = next((kind for kind in kinds if kind == config.get("kind")), kinds[0])
    settings = config.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    items: Mapping[str, Measured] = {}
    problem = ""
    if folder is not None:
        try:
            items = measured(folder, outputs)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # the last: of another version
            said = str(error) if isinstance(error, (OSError, ValueError)) else repr(error)
            problem = f"{label}: the items cannot be read, so no score of it is tested: {said}"
    precision, max_length = settings.get("precision"), settings.get("max_length")
    return MeasuredModel(
        label,
        outputs.subject,
        kind,
        outputs.scores,
        items,
        precision if isinstance(precision, str) else None,
        max_length if isinstance(max_length, int) else None,
    ), problem


def models_of_run(
    manifests: Mapping[str, Manifest], folders: Mapping[str, Path]
) -> tuple[list[MeasuredModel], list[str]]:
    """The measured models of a run, in the order of `manifests`, and what could not be read."""
    models, problems = [], []
    for node, manifest in manifests.items():
        if (outputs := outputs_of(EvaluationOutputs, manifest)) is None:
            continue
        config = manifest.spec.config
        model, problem = measured_model(model_label(outputs, config), outputs, config, folders.get(node))
        models.append(model)
        problems += [problem] if problem else []
    return models, problems


def model_label(outputs: EvaluationOutputs, config: Mapping[str, Any]) -> str:
    """What a column is called within a run: `SFT`, `DPO, implicit reward`."""
    return text.title(outputs.subject) + (", implicit reward" if config.get("kind") == "implicit_reward" else "")


def tables_section(manifests: Mapping[str, Manifest], folders: Mapping[str, Path], level: float = LEVEL) -> Markup:
    """What a run's report shows: stages × tasks, and each published table of which something was measured.

    Empty where no evaluation has finished. Arguments are by node, in the order of the columns.
    """
    from markupsafe import Markup

    models, problems = models_of_run(manifests, folders)
    tables = tables_of(load_published(), models, (), level)
    shown = render("tables_section.html.jinja", tables=tables, problems=problems)
    return Markup(shown.strip() if tables else "")


def markdown_tables(tables: Sequence[Table]) -> str:
    """For a README or a chat."""
    return render("tables.md.jinja", tables=tables).strip() + "\n"


def html_tables(tables: Sequence[Table]) -> str:
    """One page that loads nothing."""
    return render("tables_page.html.jinja", title="Scores", tables=tables)


def latex_tables(tables: Sequence[Table]) -> str:
    """`tabular` environments; need no package."""
    return "\n".join(map(latex, tables))


FORMATS: dict[Format, Callable[[Sequence[Table]], str]] = {
    "markdown": markdown_tables,
    "latex": latex_tables,
    "html": html_tables,
}
