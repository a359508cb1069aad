"""Tables of data: contamination (1, 4, 13), languages (10 to 12). What stands side by side, what is said in words."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from smoltulu.schemas.contamination import BenchmarkReport, ContaminationOutputs
from smoltulu.schemas.languages import LanguageOutputs, LanguageShare
from smoltulu.tasks.data.benchmarks import load_registry
from smoltulu.tasks.report.tables import FORMATS
from smoltulu.tasks.tables.build import tables_of
from smoltulu.tasks.tables.data_tables import MeasuredSet, data_table
from smoltulu.tasks.tables.published import load_published
from smoltulu.tasks.tables.values import Cell, Row, Table

REGISTRY = load_registry()
SFT = "allenai/tulu-3-sft-mixture"


def report(name: str, num_found: int, num_instances: int, **changes: Any) -> BenchmarkReport:
    given = {"name": name, "num_instances": num_instances, "num_contaminated": num_found, "num_skipped": 0}
    return BenchmarkReport.model_validate(given | changes)


def checked(*reports: BenchmarkReport, label: str = "sft", repository: str | None = SFT, **changes: Any) -> MeasuredSet:
    given: dict[str, Any] = {
        "kind": "sft", "num_rows_read": 9, "num_rows": 9, "num_removed": 0, "num_rows_contaminated": 0,
        "benchmarks": reports,
    }  # fmt: skip
    check = ContaminationOutputs.model_validate(given | changes)
    return MeasuredSet(label, check.kind, repository, contamination=check)


def row_of(table: Table, title: str) -> Row:
    [found] = [row for row in table.rows if row.title == title]
    return found


def cell_of(one: MeasuredSet, title: str, name: str = "1") -> tuple[Cell, Table]:
    table = data_table(name, REGISTRY, [one])
    [cell] = row_of(table, title).measured
    assert cell is not None
    return cell, table


def test_ours_beside_the_published_share() -> None:
    """GSM8K: 1 of 1,319 is 0.08 %, as printed."""
    cell, table = cell_of(checked(report("gsm8k", 1, 1319)), "GSM8K")
    assert (cell.value, cell.num_samples, cell.not_comparable) == ("0.08", "1,319", False)
    row = row_of(table, "GSM8K")
    assert [one and one.value for one in row.published] == ["0.08"] and row.source == "mode full, turns of user"
    assert [column.title for column in table.published] == [SFT] and len(table.rows) == 17
    assert "arxiv.org/abs/2412.08347, table 1" in table.notes[0]


def test_what_was_not_checked_is_no_nought() -> None:
    gone = report("gpqa", 0, 0, not_checked="gated, and HF_TOKEN is not set")
    cell, table = cell_of(checked(gone, report("gsm8k", 0, 1319)), "GPQA")
    assert cell.value == "not checked" and not cell.num_samples
    assert [table.notes[number - 1] for number in cell.notes] == ["not checked: gated, and HF_TOKEN is not set"]
    # Not in the recipe at all: words too. Checked and clean: 0.00.
    [mmlu], [gsm8k] = row_of(table, "MMLU").measured, row_of(table, "GSM8K").measured
    assert mmlu == Cell("not checked") and gsm8k is not None and gsm8k.value == "0.00"


@pytest.mark.parametrize(("one", "reason"), [
    (checked(report("gsm8k", 1, 1319), repository=None), f"other rows than the training split of {SFT}"),
    (checked(report("gsm8k", 1, 1319), mode="ngram"), "mode ngram, published full"),
    (checked(report("gsm8k", 1, 1319), roles=("user", "assistant")), "turns of user, assistant, published user"),
    (checked(report("gsm8k", 1, 1000)), "1,000 instances, published of 1,319"),
])  # fmt: skip
def test_another_check_is_not_comparable(one: MeasuredSet, reason: str) -> None:
    cell, table = cell_of(one, "GSM8K")
    assert cell.not_comparable and [table.notes[number - 1] for number in cell.notes] == [f"not comparable: {reason}"]


def test_other_benchmarks_come_last_and_stand_beside_nothing() -> None:
    cell, table = cell_of(checked(report("ours", 3, 60)), "ours")
    assert (cell.value, cell.not_comparable) == ("5.00", False)
    assert table.rows[-1].title == "ours" and table.rows[-1].published == (None,)


def test_each_kind_of_data_has_its_table() -> None:
    pairs = checked(report("mmlu", 97, 14042), kind="preference", label="preference",
                    repository=REGISTRY.paper_sets["dpo"])  # fmt: skip
    cell, table = cell_of(pairs, "MMLU", "4")
    assert cell.value == "0.69" and not cell.not_comparable and row_of(table, "MMLU").published == (Cell("0.69"),)
    assert data_table("1", REGISTRY, [pairs]).measured == ()
    names = [table.name for table in tables_of(load_published(), [], registry=REGISTRY, sets=[pairs])]
    assert names == ["4"]
    # Data of which no benchmark of the paper was checked fill no table of the paper, unless it is asked for.
    own = checked(report("ours", 3, 60))
    assert tables_of(load_published(), [], registry=REGISTRY, sets=[own]) == []
    assert [table.name for table in tables_of(load_published(), [], ["13", "12"], registry=REGISTRY)] == ["13", "12"]


LANGUAGES = MeasuredSet(
    "sft",
    "sft",
    languages=LanguageOutputs(
        kind="sft",
        detector="lingua",
        detector_version="2.1.1",
        num_rows=100,
        num_determined=80,
        num_other=5,
        shares=(
            LanguageShare(language="en", name="English", num_rows=60, share=0.6, share_of_determined=0.75),
            LanguageShare(language="zh", name="Chinese", num_rows=20, share=0.2, share_of_determined=0.25),
        ),
        undetermined={"code": 15},
    ),
)


def test_languages_of_the_rows_that_have_one() -> None:
    table = data_table("10", REGISTRY, [LANGUAGES])
    shown = [(row.title, row.measured[0].value, row.measured[0].num_samples) for row in table.rows if row.measured[0]]
    assert shown == [
        ("English", "75.00", "60"), ("Chinese", "25.00", "20"),
        ("another language", "5.00", "5"), ("no language (code)", "15.00", "15"),
    ]  # fmt: skip
    assert table.rows[-1].detail == "percent of all rows" and table.published == ()
    assert any("nobody here has read them" in line for line in table.legend)
    other = MeasuredSet("ours", "sft", languages=LANGUAGES.languages and LANGUAGES.languages.model_copy(
        update={"shares": LANGUAGES.languages.shares[:1], "num_determined": 60}))  # fmt: skip
    [_, missing] = row_of(data_table("10", REGISTRY, [LANGUAGES, other]), "Chinese").measured
    assert missing == Cell("none of 60 rows"), "looked for, and not there: no share of 0 that nobody measured"


def test_csv_has_numbers_and_words() -> None:
    gone = report("gpqa", 0, 0, not_checked="gated")
    tables = [data_table("1", REGISTRY, [checked(report("gsm8k", 1, 1319), gone, label="=cmd")]),
              data_table("10", REGISTRY, [LANGUAGES])]  # fmt: skip
    lines = list(csv.DictReader(io.StringIO(FORMATS["csv"](tables))))
    of = {(line["table"], line["row"], line["origin"]): line for line in lines}
    ours, theirs = of["1", "GSM8K", "measured"], of["1", "GSM8K", "published"]
    assert (ours["value"], ours["num_samples"], ours["comparable"]) == ("0.08", "1319", "yes")
    assert (theirs["value"], theirs["said"], theirs["column"]) == ("0.08", "", SFT)
    assert (of["1", "GPQA", "measured"]["value"], of["1", "GPQA", "measured"]["said"]) == ("", "not checked")
    assert of["1", "GPQA", "measured"]["notes"] == "not checked: gated"
    assert ours["column"] == "'=cmd", "no formula for a spreadsheet"
    assert of["10", "English", "measured"]["value"] == "75.00"
    assert all(line["value"] or line["said"] for line in lines)


def test_every_format_shows_the_words() -> None:
    tables = [data_table("1", REGISTRY, [checked(report("gpqa", 0, 0, not_checked="gated"))])]
    for name in ("markdown", "html", "latex"):
        text = FORMATS[name](tables)  # type: ignore[index]
        assert "not checked" in text and "gated" in text and "Benchmark" in text
