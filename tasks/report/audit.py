"""The report of an audit: a folder of pages that need nothing but each other, and the same numbers as JSON."""

from __future__ import annotations

import shutil
from pathlib import Path

from smoltulu.schemas.audit import AuditResult
from smoltulu.schemas.benchmarks import BenchmarkRegistry
from smoltulu.tasks.report import text
from smoltulu.tasks.report.contamination_table import (
    CAVEATS,
    NOT_CHECKED,
    has_paper_figures,
    malformed_note,
    table_rows,
)
from smoltulu.tasks.report.document import document
from smoltulu.tasks.report.hits import BenchmarkPages, write_hit_pages
from smoltulu.tasks.report.languages import language_bars, language_table
from smoltulu.tasks.report.markup import e, table


def write_audit_report(result: AuditResult, registry: BenchmarkRegistry, reports: Path) -> Path:
    """Write `index.html`, the pages of hits and `result.json` into a folder of `reports`; path of index.html."""
    folder = reports / f"audit-{text.artifact_key(result.label)}-{result.keys['contamination'][:12]}"
    shutil.rmtree(folder, ignore_errors=True)
    contamination = Path(result.folders["contamination"])
    pages = write_hit_pages(
        contamination / result.contamination.hits_file,
        Path(result.folders["benchmark_index"]) / "queries.parquet",
        Path(result.folders["dataset"]) / result.dataset.file,
        folder,
    )
    index = folder / "index.html"
    (folder / "result.json").write_text(result.model_copy(update={"report": str(index)}).model_dump_json(indent=1))
    index.write_text(audit_page(result, registry, pages), encoding="utf-8")
    return index


def audit_page(result: AuditResult, registry: BenchmarkRegistry, pages: list[BenchmarkPages]) -> str:
    """The overview: the paper's table with links to the hits, and the language shares."""
    by_title = {}
    for page in pages:
        known = registry.find(page.benchmark)
        by_title[known.title if known else page.benchmark] = page
    rows = table_rows(result, registry)
    paper = has_paper_figures(rows)
    cells = []
    for row in rows:
        own = by_title.get(row.title)
        found = f'<a href="{own.files[0]}">{row.num_found}</a>' if own else row.num_found
        style = ' class="n muted"' if row.share == NOT_CHECKED else ' class="n"'
        published = f'<td class="n">{row.paper}</td>' if paper else ""
        cells.append(
            f'<tr><th scope="row">{e(row.title)}</th><td class="n">{row.num_instances}</td><td class="n">{found}</td>'
            f"<td{style}>{e(row.share)}</td>{published}<td><small>{e(row.remarks)}</small></td></tr>"
        )
    heads: list[str | tuple[str, str]] = ["benchmark", ("N", "n"), ("found", "n"), ("share", "n")]
    heads += [("paper", "n")] if paper else []
    contamination = result.contamination
    facts = [
        ("Rows", f"{contamination.num_rows_read:,}, read as {e(result.read_as)}"),
        ("Turns searched", f"{contamination.num_turns:,} ({text.size(contamination.num_bytes)})"),
        ("Rows that hit", f"{contamination.num_rows_contaminated:,}"),
        ("Rule", e(rule(result))),
    ]
    if note := malformed_note(result):
        facts.append(("Not searched", f'<span class="warn">{e(note)}</span>'))
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    if result.languages is not None:
        languages = (
            f"<p>Judged by {e(result.languages.detector)} {e(result.languages.detector_version)}.</p>"
            f"{language_bars(result.languages)}{language_table(result.languages)}"
        )
    else:
        languages = f"<p>Not judged: {e(result.no_languages)}.</p>"
    body = (
        f'<header><h1>Audit of {e(result.label)}</h1><dl class="facts">{listed}</dl></header><main>'
        f"<section><h2>Contamination</h2><p>Share of each benchmark's instances found in these rows.</p>"
        f'{table([*heads, "remarks"], cells)}<p class="muted">{e(CAVEATS[result.settings.mode])}</p></section>'
        f"<section><h2>Languages</h2>{languages}</section></main>"
    )
    return document(f"Audit of {result.label}", body)


def rule(result: AuditResult) -> str:
    """The rule in a few words."""
    settings = result.settings
    turns = " and ".join(settings.roles)
    if settings.mode == "full":
        return f"full match in {turns} turns: every field of an instance in one turn"
    return (
        f"{settings.ngram_size}-gram match in {turns} turns: more than {settings.match_threshold:.0%} of an instance's "
        "tokens in one turn"
    )
