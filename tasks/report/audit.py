"""Report of an audit: a folder of pages that need no other files, and the same numbers as JSON."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

from smoltulu.artifacts.files import private_folder
from smoltulu.schemas.audit import AuditResult
from smoltulu.schemas.benchmarks import BenchmarkRegistry
from smoltulu.tasks.report import text
from smoltulu.tasks.report.contamination_table import (
    CAVEATS,
    NOT_CHECKED,
    malformed_examples,
    malformed_note,
    paper_note,
    table_rows,
)
from smoltulu.tasks.report.hits import BenchmarkPages, write_hit_pages
from smoltulu.tasks.report.render import render

#: Characters of a label in the name of a folder.
_MAX_LABEL = 100


def write_audit_report(result: AuditResult, registry: BenchmarkRegistry, reports: Path) -> Path:
    """Write `index.html`, the pages of hits and `result.json` into a folder of `reports`. Returns its index.html."""
    label = text.artifact_key(result.label)[:_MAX_LABEL]
    folder = private_folder(reports) / f"audit-{label}-{result.keys['contamination'][:12]}"
    shutil.rmtree(folder, ignore_errors=True)
    pages = {}
    for mode, outputs in result.checks.items():
        pages[mode] = write_hit_pages(
            Path(result.folders[result.stage("contamination", mode)]) / outputs.hits_file,
            Path(result.folders[result.stage("benchmark_index", mode)]) / "queries.parquet",
            Path(result.folders["dataset"]) / result.dataset.file,
            folder,
            prefix="" if mode == result.settings.modes[0] else f"{mode}-",
        )
    index = folder / "index.html"
    (folder / "result.json").write_text(result.model_copy(update={"report": str(index)}).model_dump_json(indent=1))
    index.write_text(audit_page(result, registry, pages), encoding="utf-8")
    return index


def audit_page(result: AuditResult, registry: BenchmarkRegistry, pages: dict[str, list[BenchmarkPages]]) -> str:
    """The overview: the paper's table with links to the hits, and the language shares."""
    rows = table_rows(result, registry)
    return render(
        "audit.html.jinja",
        result=result,
        rows=rows,
        has_paper_figures=any(row.paper for row in rows),
        not_checked=NOT_CHECKED,
        files={mode: {page.benchmark: page.files[0] for page in of_mode} for mode, of_mode in pages.items()},
        also=list(result.also),
        rules={mode: rule(result, mode) for mode in result.checks},
        searched=searched(result),
        left_out=left_out(result),
        malformed_note=malformed_note(result),
        malformed_examples=malformed_examples(result),
        caveats=[CAVEATS[mode] for mode in result.settings.modes],
        paper_note=paper_note(result, registry),
    )


def rule(result: AuditResult, mode: str) -> str:
    """The matching rule of a mode in a few words."""
    settings = result.settings
    if mode == "full":
        return "full match: every field of an instance, word for word, in one turn"
    if mode == "ngram":
        return (
            f"{settings.ngram_size}-gram match: more than {settings.match_threshold:.0%} of an instance's tokens in "
            "one turn"
        )
    return f"{mode} match: every field of an instance in one turn, whatever the formatting"


def searched(result: AuditResult) -> str:
    """What was searched, in words."""
    settings = result.settings
    roles = f"{' and '.join(settings.roles)} turns of " if settings.roles else ""
    if not settings.reads_all_text:
        return f"{roles or 'all turns of '}{result.read_as}"
    texts: Counter[str] = Counter()
    for source in result.dataset.sources:
        texts.update(source.texts)
    listed = ", ".join(f"{name} ({number:,})" for name, number in texts.items())
    return f"{roles or 'all text of '}columns (texts): {listed or 'none'}"


def left_out(result: AuditResult) -> str:
    """What was not searched, in words; empty where that is no text."""
    settings = result.settings
    parts = []
    columns: Counter[str] = Counter()
    for source in result.dataset.sources:
        columns.update(source.unread)
    if columns:
        listed = ", ".join(f"{name} ({number:,})" for name, number in list(columns.items())[:30])
        more = f" and {len(columns) - 30} more" if len(columns) > 30 else ""
        parts.append(f"columns (rows): {listed}{more}")
    if settings.roles:
        parts.append(f"what is no turn of {' or '.join(settings.roles)}")
    dropped = sum(source.num_dropped for source in result.dataset.sources)
    if dropped:
        parts.append(f"{dropped:,} rows that the format leaves out")
    return "; ".join(parts)
