"""Report of an audit: a folder of pages that need no other files, and the same numbers as JSON."""

from __future__ import annotations

import shutil
from pathlib import Path

from smoltulu.artifacts.files import private_folder
from smoltulu.schemas.audit import AuditResult
from smoltulu.schemas.benchmarks import BenchmarkRegistry
from smoltulu.tasks.report import text
from smoltulu.tasks.report.contamination_table import CAVEATS, NOT_CHECKED, malformed_note, table_rows
from smoltulu.tasks.report.hits import BenchmarkPages, write_hit_pages
from smoltulu.tasks.report.render import render

#: Characters of a label in the name of a folder.
_MAX_LABEL = 100


def write_audit_report(result: AuditResult, registry: BenchmarkRegistry, reports: Path) -> Path:
    """Write `index.html`, the pages of hits and `result.json` into a folder of `reports`. Returns its index.html."""
    label = text.artifact_key(result.label)[:_MAX_LABEL]
    folder = private_folder(reports) / f"audit-{label}-{result.keys['contamination'][:12]}"
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
    rows = table_rows(result, registry)
    return render(
        "audit.html.jinja",
        result=result,
        rows=rows,
        has_paper_figures=any(row.paper for row in rows),
        not_checked=NOT_CHECKED,
        files={page.benchmark: page.files[0] for page in pages},
        rule=rule(result),
        malformed_note=malformed_note(result),
        caveat=CAVEATS[result.settings.mode],
    )


def rule(result: AuditResult) -> str:
    """The matching rule in a few words."""
    settings = result.settings
    turns = " and ".join(settings.roles)
    if settings.mode == "full":
        return f"full match in {turns} turns: every field of an instance in one turn"
    return (
        f"{settings.ngram_size}-gram match in {turns} turns: more than {settings.match_threshold:.0%} of an instance's "
        "tokens in one turn"
    )
