"""Contamination table of a data set, as in the paper: the share of each benchmark, the published one, remarks. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from smoltulu.artifacts import readable
from smoltulu.schemas.audit import AuditResult
from smoltulu.schemas.benchmarks import BenchmarkRegistry
from smoltulu.schemas.contamination import BenchmarkReport, MatchMode

NOT_CHECKED = "not checked"

#: Printed below every table: what a clean result does not prove.
CAVEATS: dict[MatchMode, str] = {
    "full": "Full match finds verbatim copies: one changed number escapes it, paraphrases escape both modes.",
    "ngram": "8-gram match does not see items under 8 tokens, and paraphrases escape both modes.",
    "normalised": "Normalised match finds copies whatever their formatting: one changed number or word escapes it, and "
    "so do sentences in another order and paraphrases.",
}


@dataclass(frozen=True)
class TableRow:
    """One benchmark, as text."""

    name: str
    title: str
    num_instances: str
    num_found: str
    share: str  # "79.98 %", or NOT_CHECKED: never 0 if it was not checked
    paper: str  # "" if the paper has no figure for this data set and benchmark
    remarks: str
    also: dict[str, tuple[str, str]] = field(default_factory=dict)  # further mode -> number found and share, as text


def table_rows(result: AuditResult, registry: BenchmarkRegistry) -> list[TableRow]:
    """Benchmarks in the order of the registry (as in the paper), then all others."""
    order = {benchmark.name: position for position, benchmark in enumerate(registry.benchmarks)}
    reports = sorted(result.benchmarks, key=lambda report: order.get(report.name, len(order)))
    also = {mode: {one.name: one for one in outputs.benchmarks} for mode, outputs in result.also.items()}
    return [
        _row(report, {mode: of[report.name] for mode, of in also.items() if report.name in of}, result, registry)
        for report in reports
    ]


def paper_note(result: AuditResult, registry: BenchmarkRegistry) -> str:
    """Why the paper's figures are not shown for a data set that it has figures for; empty otherwise."""
    if result.settings.as_paper or result.repository not in registry.paper_sets.values():
        return ""
    return (
        "The paper has figures for this data set: full match in all user turns. To stand beside them, audit with "
        "--role user, mode full, all columns and no limit."
    )


def _row(
    report: BenchmarkReport, also: dict[str, BenchmarkReport], result: AuditResult, registry: BenchmarkRegistry
) -> TableRow:
    known = registry.find(report.name)
    title = known.title if known else report.name
    published = registry.published_share(report.name, result.repository) if result.settings.as_paper else None
    paper = "" if published is None else readable.percent(published)
    if report.share is None:
        reason = report.not_checked or "no instance that can be checked"
        return TableRow(report.name, title, "", "", NOT_CHECKED, paper, reason)
    return TableRow(
        name=report.name,
        title=title,
        num_instances=f"{report.num_instances:,}",
        num_found=f"{report.num_contaminated:,}",
        share=readable.percent(report.share),
        paper=paper,
        remarks="; ".join(remarks(report, result, registry)),
        also={
            mode: (f"{one.num_contaminated:,}", readable.percent(one.share))
            for mode, one in also.items()
            if one.share is not None
        },
    )


def remarks(report: BenchmarkReport, result: AuditResult, registry: BenchmarkRegistry) -> list[str]:
    """Known limits of this number."""
    settings, known = result.settings, registry.find(report.name)
    said = []
    if report.num_short_hits:
        said.append(f"{report.num_short_hits:,} of the found have under 8 terms, often by accident")
    if report.num_unmatchable and settings.modes[0] == "ngram":
        said.append(f"{report.num_unmatchable:,} too short for this rule: never found in any data")
    elif report.num_unmatchable:
        said.append(f"{report.num_unmatchable:,} with a field without terms: never found in any data")
    if report.num_skipped:
        said.append(f"{report.num_skipped:,} left out: a field is null")
    if known and known.num_instances and known.num_instances != report.num_instances + report.num_skipped:
        said.append(f"the paper's N is {known.num_instances:,}" if known.paper else f"usually {known.num_instances:,}")
    note = (known.hit_note if report.num_contaminated else known.clean_note) if known else ""
    if note and settings.modes[0] == "full":
        said.append(note)
    return said


def malformed_note(result: AuditResult) -> str:
    """One sentence about malformed rows, which were not searched; empty if there are none."""
    num_rows = sum(source.num_rows for source in result.dataset.sources)
    num_malformed = sum(source.num_malformed for source in result.dataset.sources)
    if not num_malformed:
        return ""
    reasons: Counter[str] = Counter()
    for source in result.dataset.sources:
        reasons.update(source.reasons)
    listed = "; ".join(f"{reason}: {count:,}" for reason, count in list(reasons.items())[:3])
    return f"{num_malformed:,} of {num_rows:,} rows are malformed and were not searched ({listed})"


def malformed_examples(result: AuditResult) -> list[str]:
    """The first malformed rows: position, reason, the row itself."""
    return [example for source in result.dataset.sources for example in source.examples][:5]
