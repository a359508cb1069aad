"""Tables of scores and of data as Markdown, LaTeX, HTML and CSV, and what of a run they are made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from smoltulu.schemas.artifact import Manifest
from smoltulu.schemas.contamination import ContaminationOutputs
from smoltulu.schemas.data import DatasetOutputs
from smoltulu.schemas.evaluation import EvaluationOutputs, ScoreKind
from smoltulu.schemas.languages import LanguageOutputs
from smoltulu.tasks.comparison.evaluations import READ_ERRORS, Measured, measured
from smoltulu.tasks.data.benchmarks import load_registry
from smoltulu.tasks.report import text
from smoltulu.tasks.report.csv_tables import csv_tables
from smoltulu.tasks.report.latex import latex
from smoltulu.tasks.report.render import render
from smoltulu.tasks.report.summary import outputs_of
from smoltulu.tasks.tables.build import LEVEL, tables_of
from smoltulu.tasks.tables.data_tables import MeasuredSet
from smoltulu.tasks.tables.published import load_published
from smoltulu.tasks.tables.values import MeasuredModel, Table

if TYPE_CHECKING:
    from markupsafe import Markup

Format = Literal["markdown", "latex", "html", "csv"]


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
            items = measured(folder, outputs, texts=False)
        except READ_ERRORS as error:
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


def sets_of_run(manifests: Mapping[str, Manifest], prefix: str = "") -> list[MeasuredSet]:
    """The data sets of a run that were checked for benchmarks, or whose languages were told.

    prefix  of the columns' names, where there are several runs
    """
    by_key = {manifest.key: manifest for manifest in manifests.values()}
    found: dict[str, MeasuredSet] = {}
    for node, manifest in manifests.items():
        made: dict[str, Any] = {}
        if (check := outputs_of(ContaminationOutputs, manifest)) is not None:
            made = {"contamination": check, "kind": check.kind}
        elif (languages := outputs_of(LanguageOutputs, manifest)) is not None:
            made = {"languages": languages, "kind": languages.kind}
        else:
            continue
        name = node.removeprefix(f"{manifest.spec.stage.replace('_', '-')}-")
        known = found.get(name, MeasuredSet(f"{prefix} {name}".strip(), made["kind"], _whole_of(manifest, by_key)))
        found[name] = replace(known, **made)
    return list(found.values())


def _whole_of(manifest: Manifest, by_key: Mapping[str, Manifest]) -> str | None:
    """The Hub data set whose training split the rows are, all of it; None where they are others, or unknown."""
    seen = set()
    while (read := outputs_of(DatasetOutputs, manifest)) is None:
        record = manifest.inputs.get("dataset")
        if record is None or record.key in seen or record.key not in by_key:
            return None
        seen.add(record.key)
        manifest = by_key[record.key]
    data = manifest.spec.config.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
        return None
    (source,) = sources
    whole = source.get("limit") is None and source.get("split", "train") == "train" and source.get("subset") is None
    whole = whole and not any(report.num_dropped for report in read.sources)
    repository = source.get("repository")
    return repository if whole and isinstance(repository, str) else None


def model_label(outputs: EvaluationOutputs, config: Mapping[str, Any]) -> str:
    """What a column is called within a run: `SFT`, `DPO, implicit reward`."""
    return text.title(outputs.subject) + (", implicit reward" if config.get("kind") == "implicit_reward" else "")


def tables_of_run(
    manifests: Mapping[str, Manifest], folders: Mapping[str, Path], level: float = LEVEL
) -> tuple[list[Table], list[str]]:
    """Stages × tasks, and each published table of which something was measured; and what of the samples could not be
    read. Arguments are by node, in the order of the columns.
    """
    models, problems = models_of_run(manifests, folders)
    sets = sets_of_run(manifests)
    return tables_of(load_published(), models, (), level, registry=load_registry(), sets=sets), problems


def tables_section(tables: Sequence[Table], problems: Sequence[str], beside: bool = False) -> Markup:
    """What a run's report shows. Empty where nothing was measured. `beside`: files of them lie beside the page."""
    from markupsafe import Markup

    shown = render("tables_section.html.jinja", tables=tables, problems=problems, beside=beside)
    return Markup(shown.strip() if tables else "")


def markdown_tables(tables: Sequence[Table]) -> str:
    """For a README or a chat."""
    return render("tables.md.jinja", tables=tables).strip() + "\n"


def html_tables(tables: Sequence[Table]) -> str:
    """One page that loads nothing."""
    return render("tables_page.html.jinja", title="Tables", tables=tables)


def latex_tables(tables: Sequence[Table]) -> str:
    """`tabular` environments; need no package."""
    return "\n".join(map(latex, tables))


FORMATS: dict[Format, Callable[[Sequence[Table]], str]] = {
    "markdown": markdown_tables,
    "latex": latex_tables,
    "html": html_tables,
    "csv": csv_tables,
}
