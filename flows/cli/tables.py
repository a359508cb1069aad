"""`smoltulu tables`: scores of models side by side, and beside published ones. Needs no server, imports no torch."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smoltulu.flows.cli.compare import evaluation_of
from smoltulu.flows.cli.output import echo, failures
from smoltulu.flows.cli.store import StoreOption, finished, open_catalogue

if TYPE_CHECKING:
    from smoltulu.artifacts.manifests import Ref
    from smoltulu.artifacts.upkeep.catalogue import Catalogue
    from smoltulu.schemas.published import PublishedTables
    from smoltulu.tasks.tables.data_tables import MeasuredSet
    from smoltulu.tasks.tables.values import MeasuredModel


class Form(StrEnum):
    """How tables are written."""

    markdown = "markdown"
    latex = "latex"
    html = "html"
    csv = "csv"


def tables(
    what: Annotated[
        list[str],
        typer.Argument(
            help="a run, or models and evaluations: RUN:STAGE (as tiny-…:sft), a tag, or first digits of a key"
        ),
    ],
    table: Annotated[
        list[str] | None,
        typer.Option(
            help="stages, a table of the paper (1, 3, 4, 6, 8 to 13) or another of the published file; several: 3,6"
        ),
    ] = None,
    form: Annotated[Form, typer.Option("--format", help="how they are written")] = Form.markdown,
    level: Annotated[float, typer.Option(min=1e-9, max=0.5, help="of significance, for all tests of a row")] = 0.05,
    published: Annotated[
        Path | None, typer.Option(help="a file of published figures of your own; default: the one that ships")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Show tables of the paper with yours as further columns: scores (3, 6, 8, 9), contamination (1, 4, 13).

    Without published figures: stages × tasks, and languages of the data (10, 11, 12). Bold is what is significantly
    better than all else in its row. What was measured otherwise than the published figures is marked, with the reason.
    Without --table: every table of which something was measured.
    """
    from smoltulu.tasks.data.benchmarks import load_registry
    from smoltulu.tasks.report.tables import FORMATS
    from smoltulu.tasks.tables.build import tables_of
    from smoltulu.tasks.tables.data_tables import NAMES

    with failures():
        catalogue = open_catalogue(store)
        figures = _published(published)
        sets = _sets(catalogue, what)
        models = _models(catalogue, what, has_sets=bool(sets))
        wanted = [name.strip() for names in table or () for name in names.split(",")]
        made = tables_of(figures, models, wanted, level, registry=load_registry(), sets=sets)
        text = FORMATS[form.value](made)
    if not made:
        tables = ", ".join(NAMES)
        echo(
            f"note: {', '.join(what)} measured nothing that a table has by itself; --table names one: {tables}",
            err=True,
        )
    for one in made:
        if not one.has_scores:
            echo(f"note: nothing of {one.title!r} was measured by {', '.join(what)}", err=True)
    echo(text.rstrip())


def _published(file: Path | None) -> PublishedTables:
    from smoltulu.flows.reading import Unreadable, read_file
    from smoltulu.tasks.tables.published import load_published, parse_published

    if file is None:
        return load_published()
    try:
        return parse_published(read_file(file), str(file))
    except Unreadable as error:
        raise ValueError(f"{file}: {error}") from None


def _sets(catalogue: Catalogue, what: list[str]) -> list[MeasuredSet]:
    """A column for each data set of the runs among them."""
    from pydantic import ValidationError

    from smoltulu.flows.cli.store_views import refs_of_run
    from smoltulu.schemas.artifact import Manifest
    from smoltulu.schemas.run import RunRecord
    from smoltulu.tasks.report.tables import sets_of_run

    made: list[MeasuredSet] = []
    for name in dict.fromkeys(what):
        run = None if ":" in name else catalogue.resolve(name)
        if not isinstance(run, RunRecord):
            continue
        manifests = {}
        for node, ref in refs_of_run(run).items():
            try:
                manifests[node] = Manifest.model_validate(finished(catalogue, ref)[1])
            except (ValidationError, ValueError, OSError):
                continue  # not made, removed since, or of another version: nothing of it is shown
        made += sets_of_run(manifests, run.run_name if len(what) > 1 else "")
    return made


def _models(catalogue: Catalogue, what: list[str], has_sets: bool = False) -> list[MeasuredModel]:
    """A column for each evaluation that is meant. ValueError: something that has none (with `has_sets`: no run)."""
    from pydantic import ValidationError

    from smoltulu.schemas.common import first_problem
    from smoltulu.schemas.evaluation import EvaluationOutputs
    from smoltulu.tasks.report.tables import measured_model, model_label

    models: dict[Ref, MeasuredModel] = {}
    for name in what:
        for ref, prefix in _evaluations(catalogue, name, has_sets).items():
            folder, manifest = finished(catalogue, ref)
            try:
                outputs = EvaluationOutputs.model_validate(manifest["outputs"])
            except ValidationError as error:
                raise ValueError(
                    f"{ref.stage}/{ref.key[:12]} is an evaluation of another version ({first_problem(error)}); "
                    "evaluate this model again"
                ) from None
            config = manifest["spec"]["config"]
            # One run needs no name; of several columns each says which it is.
            label = " ".join(filter(None, (prefix if len(what) > 1 else "", model_label(outputs, config))))
            model, problem = measured_model(label, outputs, config, folder)
            if problem:
                echo(f"note: {problem}", err=True)
            models.setdefault(ref, model)
    return list(models.values())


def _evaluations(catalogue: Catalogue, what: str, may_have_none: bool) -> dict[Ref, str]:
    """Evaluations that a name stands for, and what tells them from others of the same stage."""
    from smoltulu.artifacts.manifests import scores_of
    from smoltulu.flows.cli.store_views import refs_of_run
    from smoltulu.schemas.run import RunRecord

    found = None if ":" in what else catalogue.resolve(what)
    if not isinstance(found, RunRecord):
        ref = evaluation_of(catalogue, what)
        run, colon, _ = what.rpartition(":")
        return {ref: run if colon else ref.key[:8]}
    made = {ref: found.run_name for ref in refs_of_run(found).values() if scores_of(catalogue.known(ref))}
    if not made and not may_have_none:
        raise ValueError(f"{found.run_name} has no finished evaluation; run it up to evaluation, or name another run")
    return made
