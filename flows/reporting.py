"""The reports of a store: each run's page while it goes on and at its end, and the index of them all.

Everything is replaced by one rename: who reads while a page is written, or after a kill, sees a whole one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from smoltulu.artifacts.files import private_folder, read_plain, write_atomically
from smoltulu.artifacts.manifests import parse_json
from smoltulu.artifacts.store import Found, Store, read_manifest
from smoltulu.artifacts.upkeep.catalogue import Catalogue, state_of
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.schemas.artifact import ArtifactReference, Manifest
from smoltulu.schemas.common import first_problem
from smoltulu.schemas.evaluation import EvaluationOutputs
from smoltulu.schemas.publish import PublishOutputs
from smoltulu.schemas.run import RunRecord, RunSummary
from smoltulu.schemas.verdict import AnsweredPrompt, Verdict
from smoltulu.tasks.comparison.verdict import Evaluation, assess
from smoltulu.tasks.report import html_report, summarise
from smoltulu.tasks.report.index import IndexedRun, index_page
from smoltulu.tasks.report.page import table_files
from smoltulu.tasks.report.summary import outputs_of
from smoltulu.tasks.stages import made_by

SUMMARY, PAGE, RECIPE, INDEX, LATEST = "summary.json", "report.html", "recipe.yaml", "index.html", "latest"


def reports_of(root: Path) -> Path:
    """Folder of the reports of the store at `root`."""
    return Path(root).parent / "reports"


class RunReport:
    """Report of a run that goes on."""

    def __init__(self, graph: Graph, store: Store, run: RunRecord) -> None:
        self.graph, self.store, self.run = graph, store, run
        self.reports = reports_of(store.root)
        self.folder = self.reports / run.run_name
        self._shown: tuple[object, ...] | None = None

    @property
    def page(self) -> Path:
        """The page, there once `write` was called."""
        return self.folder / PAGE

    def write_while_running(
        self,
        made: Mapping[str, ArtifactReference],
        failures: Mapping[str, str],
        seconds: Mapping[str, float],
        running: Sequence[str],
    ) -> None:
        """Write the page if a stage was made or failed since it was written: what was cached can wait for the next.

        The first time, pages of runs that were killed before are set right too.
        """
        new = tuple(name for name, reference in list(made.items()) if reference.outcome != "Cached")
        if (there := (new, tuple(failures))) == self._shown:
            return
        if self._shown is None:
            mark_killed(self.store.root)
        self._shown = there
        finished = [made[name] for name in self.graph.nodes if name in made]
        self.write(self.run, finished, failures, seconds, running=running)

    def write(
        self,
        run: RunRecord,
        made: Sequence[ArtifactReference],
        failures: Mapping[str, str],
        seconds: Mapping[str, float],
        *,
        running: Sequence[str] = (),
        error: str | None = None,
        pushed: str = "",
    ) -> RunSummary:
        """Write recipe.yaml, summary.json, report.html, `latest` and the index.

        Args:
            run: the record as it is to be shown; its state is Running while the run goes on.
            made: finished nodes, in the order of the graph.
            failures: node -> error.
            seconds: node -> seconds spent in this run.
            running: nodes that run now.
        """
        found = [(reference, self.store.find(self.graph.spec(reference.node))) for reference in made]
        pairs = [(reference, result.manifest) for reference, result in found if isinstance(result, Found)]
        published = next((ref for ref in made if self.graph.nodes[ref.node].stage.makes(PublishOutputs)), None)
        verdict, answers = verdict_of([(manifest, Path(reference.path)) for reference, manifest in pairs])
        summary = summarise(
            planned=[(node, stage, made_by(stage)) for node, stage in run.stages.items()],
            made=pairs,
            failed={node: (run.outcomes.get(node, "Failed"), text) for node, text in failures.items()},
            running=running,
            seconds=seconds,
            error=error,
            pushed=pushed,
            published=str(Path(published.path) / published.outputs["folder"]) if published else None,
            summary_path=str(self.folder / SUMMARY),
            report_path=str(self.page),
            written_at=now(),
            verdict=verdict,
            **run.model_dump(include={"run_name", "recipe", "state", "started_at", "finished_at"}),
        )
        recipe = yaml.dump(
            self.graph.recipe.model_dump(mode="json"),
            Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper),
            sort_keys=False,
            allow_unicode=True,
        )
        private_folder(self.reports)
        self.folder.mkdir(exist_ok=True)
        write_atomically(self.folder / RECIPE, recipe)
        manifests = {reference.node: manifest for reference, manifest in pairs}
        folders = {reference.node: Path(reference.path) for reference, _ in pairs}
        _write_page(self.folder, summary, manifests, folders, recipe, answers)
        write_atomically(self.reports / LATEST, run.run_name)
        write_index(self.store.root)
        return summary


def _write_page(
    folder: Path,
    summary: RunSummary,
    manifests: Mapping[str, Manifest],
    folders: Mapping[str, Path],
    recipe: str,
    answers: Sequence[AnsweredPrompt],
) -> None:
    page = html_report(summary, manifests, folders, recipe, answers)
    # The page last: where it is new, so is the summary that programs read.
    for name, text in table_files(manifests, folders).items():
        write_atomically(folder / name, text)
    write_atomically(folder / SUMMARY, summary.model_dump_json(indent=1))
    write_atomically(folder / PAGE, page)


def verdict_of(made: Sequence[tuple[Manifest, Path]]) -> tuple[Verdict, tuple[AnsweredPrompt, ...]]:
    """What the evaluations among these artifacts say. `made`: (manifest, folder), in the order of the run."""
    evaluations = []
    for manifest, folder in made:
        outputs = outputs_of(EvaluationOutputs, manifest)
        if outputs is not None and manifest.spec.config.get("kind") == "language_model":
            evaluations.append(Evaluation(outputs.subject, folder, manifest.digest, outputs))
    verdict, answers = assess(tuple(evaluations))
    if verdict.unreadable:
        assess.cache_clear()  # what cannot be read may be read for the next page
    return verdict, answers


# ------------------------------------------------------------------------------------------------ runs that have ended


def rewrite(root: Path, run_name: str, state: str | None = None) -> Path:
    """Write the page of a run again from its summary and what is in the store. Returns the page.

    state  what has become of the run since, e.g. Killed; None: as the summary says

    Raises:
        ValueError: there is no such report, or it cannot be read.
    """
    folder = reports_of(root) / run_name
    if Path(run_name).name != run_name:
        raise ValueError(f"{run_name!r} is no name of a run; `smoltulu runs` lists them")
    try:
        summary = RunSummary.model_validate_json(read_plain(folder / SUMMARY))
        recipe = read_plain(folder / RECIPE).decode("utf-8", "replace") if (folder / RECIPE).exists() else ""
    except ValidationError as error:
        raise ValueError(f"{folder / SUMMARY}: {first_problem(error)}; another version wrote it") from None
    except OSError as error:
        raise ValueError(f"{folder / SUMMARY}: {error.strerror}; `smoltulu runs` lists the runs") from None
    manifests: dict[str, Manifest] = {}
    for stage in summary.stages:
        if stage.path:
            try:
                manifests[stage.node] = read_manifest(Path(stage.path))
            except (OSError, ValueError):
                continue  # removed by gc, or by another version: the page shows what is there
    changes: dict[str, Any] = {}
    if state is not None and state != summary.state:
        stages = [
            one.model_copy(update={"outcome": "Killed"}) if one.outcome == "Running" else one for one in summary.stages
        ]
        changes = {"state": state, "stages": tuple(stages)}
    folders = {stage.node: Path(stage.path) for stage in summary.stages if stage.node in manifests}
    verdict, answers = verdict_of([(manifest, folders[node]) for node, manifest in manifests.items()])
    # Of evaluations that are gone the summary still knows the verdict.
    if len(verdict.measured) >= len(summary.verdict.measured):
        changes["verdict"] = verdict
    _write_page(folder, summary.model_copy(update=changes), manifests, folders, recipe, answers)
    return folder / PAGE


def mark_killed(root: Path) -> list[str]:
    """Say on the pages of runs whose process is gone that they were killed. Returns their names."""
    marked = []
    for record in Catalogue(root).runs():
        if record.state == "Running" and state_of(record) != "Running":
            summary = _summary(reports_of(root), record.run_name)
            if isinstance(summary, dict) and summary.get("state") == "Running":
                try:
                    rewrite(root, record.run_name, "Killed")
                    marked.append(record.run_name)
                except (OSError, ValueError):
                    continue  # the index names it
    return marked


def write_index(root: Path) -> Path:
    """Write the index of all runs of a store, newest first. Records that cannot be read are named on it."""
    reports = private_folder(reports_of(root))
    catalogue = Catalogue(root)
    notes = []
    runs = []
    for record in catalogue.runs():
        summary = _summary(reports, record.run_name)
        if isinstance(summary, str):
            notes.append(summary)
            summary = {}
        state = {"Crashed?": "Killed"}.get(state := state_of(record), state)
        runs.append(IndexedRun.of(record, state, summary, _link(reports, record)))
    page = index_page(str(root), runs, [*catalogue.notes, *notes], now())
    write_atomically(reports / INDEX, page)
    return reports / INDEX


def _summary(reports: Path, run_name: str) -> dict[str, Any] | str:
    """Summary of a run; empty where it has none; a sentence where it cannot be read."""
    file = reports / run_name / SUMMARY
    try:
        return parse_json(read_plain(file))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        return f"reports/{run_name}/{SUMMARY}: passed over, {getattr(error, 'strerror', None) or f'it {error}'}"


def _link(reports: Path, record: RunRecord) -> str:
    """The run's page, relative to the index; empty where there is none below the reports."""
    own = reports / record.run_name / PAGE
    page = own if own.is_file() else Path(record.report_path) if record.report_path else None
    if page is None or not page.is_absolute() or not page.is_relative_to(reports) or not page.is_file():
        return ""
    return page.relative_to(reports).as_posix()


def now() -> str:
    """UTC, as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
