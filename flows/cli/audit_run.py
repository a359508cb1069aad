"""The body of `smoltulu audit`: the same stages and store as the flow, one after the other, without a server."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from smoltulu.artifacts import readable
from smoltulu.flows.graphs.audit_graph import AuditGraph
from smoltulu.flows.local import run_graph
from smoltulu.flows.machine.places import PROJECT
from smoltulu.flows.runs import begin_run, end_run
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.schemas.audit import AuditResult, AuditSettings
from smoltulu.tasks.data.benchmarks import load_registry
from smoltulu.tasks.data.sources import expand_path
from smoltulu.tasks.engine.stores import open_store
from smoltulu.tasks.report.audit import rule, write_audit_report
from smoltulu.tasks.report.contamination_table import (
    CAVEATS,
    NOT_CHECKED,
    has_paper_figures,
    malformed_note,
    table_rows,
)


def audit(data: Sequence[str], settings: AuditSettings, console: Console) -> list[AuditResult]:
    """Audit, write the reports, print the tables. ValueError for what the user must fix."""
    data = [str(Path(text).expanduser().absolute()) if Path(text).expanduser().exists() else text for text in data]
    settings = settings.model_copy(update={"benchmarks": tuple(map(_absolute_file, settings.benchmarks))})
    if settings.benchmarks_folder:
        folder = str(expand_path(settings.benchmarks_folder).absolute())
        settings = settings.model_copy(update={"benchmarks_folder": folder})
    # The store is that of the flows, which run there.
    os.chdir(PROJECT)
    graph = AuditGraph(data, settings)
    store = open_store(settings.compute)
    for audited in graph.data:
        console.print(f"{escape(audited.source.label)}: read as {escape(audited.detected.said)}", highlight=False)
    # Recorded as a run, so that gc keeps what an audit found.
    record = begin_run(store, graph.name, graph, "")
    state, made = "Failed", {}
    try:
        made = run_graph(graph, store, _log())
        state = "Completed"
    finally:
        end_run(store, record, state, _outcomes(made))
    results = []
    for result in graph.results(made):
        report = write_audit_report(result, load_registry(), store.root.parent / "reports")
        results.append(result.model_copy(update={"report": str(report.resolve())}))
        show(results[-1], console)
    return results


def _outcomes(made: dict[str, ArtifactReference]) -> dict[str, str]:
    return {name: reference.outcome for name, reference in made.items()}


def _absolute_file(text: str) -> str:
    name, equals, file = text.partition("=")
    return f"{name}={Path(file).expanduser().absolute()}" if equals else text


def _log() -> logging.Logger:
    """Progress of the stages, on the error stream: the output holds the tables only."""
    log = logging.getLogger("smoltulu.audit")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    return log


def show(result: AuditResult, console: Console) -> None:
    """One data set in the terminal: the paper's table, its weak points, the languages, where everything lies."""
    rows = table_rows(result, load_registry())
    contamination = result.contamination
    paper = has_paper_figures(rows)
    table = Table(title=f"Contamination of {escape(result.label)}", title_justify="left")
    table.add_column("benchmark", no_wrap=True)
    for name in ("N", "found", "share", *(["paper"] if paper else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("remarks")
    for row in rows:
        style = "dim" if row.share == NOT_CHECKED else "red" if row.num_found not in ("", "0") else ""
        share = f"[{style}]{row.share}[/]" if style else row.share
        published = [row.paper] if paper else []
        table.add_row(row.title, row.num_instances, row.num_found, share, *published, escape(row.remarks))
    console.print(table)
    console.print(f"rule       {escape(rule(result))}", highlight=False)
    console.print(
        f"rows       {contamination.num_rows_read:,} searched, {contamination.num_rows_contaminated:,} of them hit",
        highlight=False,
    )
    if note := malformed_note(result):
        console.print(f"[yellow]rows       {escape(note)}[/]", highlight=False)
    console.print(f"note       {CAVEATS[result.settings.mode]}", highlight=False)
    _show_languages(result, console)
    cached = sum(outcome == "Cached" for outcome in result.outcomes.values())
    console.print(f"artifacts  {cached} of {len(result.outcomes)} stages cached", highlight=False)
    hits = Path(result.folders["contamination"]) / contamination.hits_file
    for name, path in (("hits", str(hits.resolve())), ("report", result.report)):
        console.print(f"{name:<11}{escape(path)}", highlight=False, soft_wrap=True)


def _show_languages(result: AuditResult, console: Console) -> None:
    languages = result.languages
    if languages is None:
        console.print(f"languages  not judged: {escape(result.no_languages)}", highlight=False)
        return
    table = Table(title=f"Languages ({languages.detector} {languages.detector_version})", title_justify="left")
    table.add_column("language")
    for name in ("rows", "of all", "of determined"):
        table.add_column(name, justify="right")
    for share in languages.shares:
        figures = (readable.percent(share.share), readable.percent(share.share_of_determined))
        table.add_row(share.name, f"{share.num_rows:,}", *figures)
    for reason, count in languages.undetermined.items():
        name = f"undetermined: {reason.replace('_', ' ')}"
        table.add_row(f"[dim]{name}[/]", f"{count:,}", readable.percent(count / languages.num_rows), "")
    console.print(table)
