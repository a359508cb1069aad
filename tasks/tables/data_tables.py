"""Tables of data sets, ours beside the paper's: contamination (1, 4, 13) and languages (10, 11, 12). Pure; no layout.

What was not checked is said in words, never as 0. Only a check that was made as the published one stands beside it:
the paper's rule (full match, user turns), all rows of the same data set, and as many instances of the benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from smoltulu.schemas.benchmarks import BenchmarkRegistry, PaperTable, RegisteredBenchmark
from smoltulu.schemas.contamination import BenchmarkReport, ContaminationOutputs
from smoltulu.schemas.data import DatasetKind
from smoltulu.schemas.languages import LanguageOutputs
from smoltulu.tasks.tables.values import Cell, Column, Notes, Row, Table

#: Table -> kind of rows, and what its data are called.
CONTAMINATION: dict[str, tuple[DatasetKind, str]] = {
    "1": ("sft", "SFT"), "4": ("preference", "DPO"), "13": ("rlvr", "RLVR"),
}  # fmt: skip
LANGUAGES: dict[str, tuple[DatasetKind, str]] = {
    "10": ("sft", "SFT"), "11": ("preference", "DPO"), "12": ("rlvr", "RLVR"),
}  # fmt: skip
NAMES = (*CONTAMINATION, *LANGUAGES)
NOT_CHECKED = "not checked"
_PUBLISHED_IN: dict[DatasetKind, PaperTable] = {"sft": "sft", "preference": "dpo", "rlvr": "rlvr"}
_SOURCE = "published: SmolTulu, https://arxiv.org/abs/2412.08347"


@dataclass(frozen=True)
class MeasuredSet:
    """A data set that was looked at: a column.

    label          what the column is called
    repository     the Hub data set whose training split it is, all of it; None: other rows
    contamination  what the check found; None: it was not checked
    languages      None: they were not told
    """

    label: str
    kind: DatasetKind
    repository: str | None = None
    contamination: ContaminationOutputs | None = None
    languages: LanguageOutputs | None = None


def data_table(name: str, registry: BenchmarkRegistry, sets: Sequence[MeasuredSet]) -> Table:
    """One of `NAMES`, with every set of its kind that was looked at."""
    if name in CONTAMINATION:
        return _contamination(name, registry, sets)
    return _languages(name, sets)


# ---------------------------------------------------------------------------------------------- contamination


def _contamination(name: str, registry: BenchmarkRegistry, sets: Sequence[MeasuredSet]) -> Table:
    kind, title = CONTAMINATION[name]
    table, notes = _PUBLISHED_IN[kind], Notes()
    ours = [one for one in sets if one.kind == kind and one.contamination is not None]
    head = Column(registry.paper_sets[table], "A", (notes.number(f"{_SOURCE}, table {name}"),))
    found = [{report.name: report for report in one.contamination.benchmarks} for one in ours if one.contamination]
    of_paper = [benchmark for benchmark in registry.benchmarks if benchmark.paper]
    names = [benchmark.name for benchmark in of_paper]
    others = [report for reports in found for report in reports if report not in names]
    rows = []
    for own in (*names, *dict.fromkeys(others)):
        known = registry.find(own)
        printed = known.published.get(table) if known and known.paper else None
        reports = [reports.get(own) for reports in found]
        cells = [
            _share(report, one, known, registry.paper_sets[table], printed, notes)
            for one, report in zip(ours, reports, strict=True)
        ]
        marks = [mark for report in reports if report for mark in _marks(report, known, notes)]
        published = None if printed is None else Cell(f"{printed:.2f}")
        rule = "; ".join(dict.fromkeys(_rule(one) for one, report in zip(ours, reports, strict=True) if report))
        rows.append(
            Row(known.title if known else own, "", rule, (published,), tuple(cells), tuple(dict.fromkeys(marks)))
        )
    legend = [
        "Percent of a benchmark's instances that are in the training data; n is their number.",
        f"{NOT_CHECKED}: nothing is known of it, which is not 0; - was not published.",
        "The published column is as printed; nothing of it was measured here.",
    ]
    if not ours:
        legend.append("No such data were checked here.")
    heads = tuple(Column(one.label) for one in ours)
    shown = f"Table {name}: contamination of the {title} data"
    return Table(name, shown, (head,), heads, tuple(rows), tuple(notes), tuple(legend), "Benchmark")


def _share(
    report: BenchmarkReport | None,
    one: MeasuredSet,
    known: RegisteredBenchmark | None,
    repository: str,
    printed: float | None,
    notes: Notes,
) -> Cell:
    if report is None:
        return Cell(NOT_CHECKED)
    if report.share is None:
        note = notes.number(f"{NOT_CHECKED}: {report.not_checked or 'it has no instance that can be checked'}")
        return Cell(NOT_CHECKED, notes=(note,))
    cell = Cell(f"{100 * report.share:.2f}", f"{report.num_instances:,}")
    if printed is None or known is None:
        return cell
    reasons = not_comparable(report, one, known, repository)
    if not reasons:
        return cell
    note = notes.number(f"not comparable: {'; '.join(reasons)}")
    return Cell(cell.value, cell.num_samples, not_comparable=True, notes=(note,))


def not_comparable(report: BenchmarkReport, one: MeasuredSet, known: RegisteredBenchmark, repository: str) -> list[str]:
    """Why a share may not stand beside the published one; empty where it may."""
    check = one.contamination
    assert check is not None
    reasons = []
    if one.repository != repository:
        reasons.append(f"other rows than the training split of {repository}")
    if check.mode != "full":
        reasons.append(f"mode {check.mode}, published full")
    if tuple(check.roles) != ("user",):
        reasons.append(f"turns of {', '.join(check.roles)}, published user")
    there = report.num_instances + report.num_skipped
    if known.num_instances and there != known.num_instances:
        reasons.append(f"{there:,} instances, published of {known.num_instances:,}")
    return reasons


def _marks(report: BenchmarkReport, known: RegisteredBenchmark | None, notes: Notes) -> list[int]:
    said = []
    if report.share is not None and known:
        said += [note for note in (known.hit_note if report.num_contaminated else known.clean_note,) if note]
    return [notes.number(note) for note in said]


def _rule(one: MeasuredSet) -> str:
    check = one.contamination
    assert check is not None
    return f"mode {check.mode}, turns of {', '.join(check.roles)}"


# ---------------------------------------------------------------------------------------------- languages


def _languages(name: str, sets: Sequence[MeasuredSet]) -> Table:
    kind, title = LANGUAGES[name]
    ours = [(one, one.languages) for one in sets if one.kind == kind and one.languages is not None]
    totals: dict[str, int] = {}
    for _, languages in ours:
        for share in languages.shares:
            totals[share.name] = totals.get(share.name, 0) + share.num_rows
    rows = []
    for language in sorted(totals, key=lambda language: (-totals[language], language)):
        cells = []
        for _, languages in ours:
            own = next((one for one in languages.shares if one.name == language), None)
            none = f"none of {languages.num_determined:,} rows"
            cells.append(
                Cell(none) if own is None else Cell(f"{100 * own.share_of_determined:.2f}", f"{own.num_rows:,}")
            )
        rows.append(Row(language, "", "; ".join(dict.fromkeys(_detector(one) for _, one in ours)), (), tuple(cells)))
    reasons = list(dict.fromkeys(reason for _, languages in ours for reason in languages.undetermined))
    beside = {"another language": [languages.num_other for _, languages in ours]} if ours else {}
    for reason in reasons:
        beside[f"no language ({reason.replace('_', ' ')})"] = [
            languages.undetermined.get(reason, 0) for _, languages in ours
        ]
    for said, counts in beside.items():
        cells = [
            Cell(f"{100 * count / languages.num_rows:.2f}", f"{count:,}")
            for count, (_, languages) in zip(counts, ours, strict=True)
        ]
        rows.append(Row(said, "percent of all rows", "", (), tuple(cells)))
    legend = [
        "Percent of the rows in one of these languages; n is the number of rows.",
        "The paper's own figures are not beside them: nobody here has read them, and the paper does not name its tool, "
        "so that no other one would be comparable.",
    ]
    if not ours:
        legend.append("The languages of no such data were told here: add a block languages to the recipe.")
    heads = tuple(Column(one.label) for one, _ in ours)
    shown = f"Table {name}: languages of the {title} data"
    return Table(name, shown, (), heads, tuple(rows), (), tuple(legend), "Language")


def _detector(languages: LanguageOutputs) -> str:
    return f"{languages.detector} {languages.detector_version}"
