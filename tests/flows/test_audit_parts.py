"""What an audit is made of: the registry, the form of rows, the table of the paper, the pages of hits."""

from __future__ import annotations

import html
import io
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoltulu.flows.cli.audit import show
from smoltulu.flows.cli.output import console
from smoltulu.schemas.audit import AuditResult, AuditSettings
from smoltulu.schemas.contamination import BenchmarkReport, ContaminationOutputs
from smoltulu.schemas.data import DatasetOutputs, SourceReport
from smoltulu.tasks.data.benchmarks import benchmarks_folder, choose_benchmarks, load_registry, local_file
from smoltulu.tasks.data.detect import detect_format, format_as_given
from smoltulu.tasks.report.contamination_table import NOT_CHECKED, malformed_note, table_rows
from smoltulu.tasks.report.hits import INSTANCES_PER_PAGE, ROWS_PER_INSTANCE, around_match, write_hit_pages
from tests.rows_file import write_rows

#: The paper's 17, in its order.
PAPER = [
    "mmlu", "humaneval", "gsm8k", "drop", "math", "ifeval", "popqa", "alpaca_eval", "bbh", "truthfulqa", "wildguard",
    "wildjailbreak", "mmlu_pro", "gpqa", "agieval_en", "bigcodebench", "deepmind_math",
]  # fmt: skip


def turns(*contents: str) -> list[dict[str, str]]:
    return [
        {"role": ("user", "assistant")[position % 2], "content": content} for position, content in enumerate(contents)
    ]


# The registry


def test_the_registry_holds_the_paper_and_what_the_models_are_evaluated_on() -> None:
    registry = load_registry()
    assert [benchmark.name for benchmark in registry.benchmarks if benchmark.paper] == PAPER
    evaluated = {benchmark.name for benchmark in registry.benchmarks if benchmark.evaluated}
    assert evaluated == {
        "arc_easy", "arc_challenge", "hellaswag", "piqa", "mmlu_pro", "gsm8k", "ifeval", "bbh"
    }  # fmt: skip
    assert evaluated - set(PAPER) == {"arc_easy", "arc_challenge", "hellaswag", "piqa"}


def test_published_shares_are_a_whole_number_of_instances() -> None:
    """Every cell of the tables is k of N, printed with two decimals of a percent: a typing error would not be."""
    for benchmark in load_registry().benchmarks:
        for table, percent in benchmark.published.items():
            if benchmark.num_instances is None:
                assert percent == 0
                continue
            count = round(percent / 100 * benchmark.num_instances)
            near = [f"{100 * (count + step) / benchmark.num_instances:.2f}" for step in (-1, 0, 1)]
            assert f"{percent:.2f}" in near, (benchmark.name, table)


def test_fields_and_places_are_those_of_the_paper_preset() -> None:
    from smoltulu.flows.recipe import load_recipe

    settings = load_recipe("smoltulu-1130").contamination
    assert settings is not None
    ours = {benchmark.name: benchmark.on_hub() for benchmark in load_registry().benchmarks}
    assert ours == {benchmark.name: benchmark for benchmark in settings.benchmarks}


def test_the_figure_of_the_paper_is_that_of_the_same_set_and_benchmark() -> None:
    registry = load_registry()
    assert registry.published_share("popqa", "allenai/tulu-3-sft-mixture") == pytest.approx(0.0721)
    assert registry.published_share("popqa", "allenai/llama-3.1-tulu-3-8b-preference-mixture") == pytest.approx(0.0272)
    assert registry.published_share("gsm8k", "allenai/RLVR-GSM-MATH-IF-Mixed-Constraints") == 0
    assert registry.published_share("popqa", "somebody/else") is None
    assert registry.published_share("popqa", None) is None
    assert registry.published_share("piqa", "allenai/tulu-3-sft-mixture") is None


def test_files_at_hand_are_taken_in_place_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "gsm8k_test.jsonl.gz").touch()
    (tmp_path / "arc_easy_test.parquet").touch()
    (tmp_path / "gsm8k_test.txt").touch()  # no data file
    chosen = {benchmark.name: benchmark for benchmark in choose_benchmarks(["evaluated"], tmp_path)}
    assert chosen["gsm8k"].source.path == str(tmp_path / "gsm8k_test.jsonl.gz")
    assert chosen["arc_easy"].query_fields == ("query",) and chosen["arc_easy"].strip_prefix == "Question: "
    assert chosen["arc_challenge"].source.repository == "allenai/ai2_arc"
    assert chosen["arc_challenge"].query_fields == ("question",) and chosen["arc_challenge"].strip_prefix == ""


def test_two_files_of_one_benchmark_are_refused(tmp_path: Path) -> None:
    (tmp_path / "gsm8k_test.jsonl").touch()
    (tmp_path / "gsm8k_test.csv").touch()
    gsm8k = load_registry().find("gsm8k")
    assert gsm8k is not None
    with pytest.raises(ValueError, match=r"gsm8k_test\.csv, gsm8k_test\.jsonl; name one with gsm8k=FILE"):
        local_file(gsm8k, tmp_path)


def test_a_named_file_wins_and_own_benchmarks_come_last(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.touch()
    chosen = choose_benchmarks([f"own={file}:title,body", "gsm8k", f"mmlu={file}", "mmlu"])
    assert [benchmark.name for benchmark in chosen] == ["mmlu", "gsm8k", "own"]
    assert chosen[0].source.path == str(file) and chosen[0].query_fields == ("question",)
    assert chosen[2].query_fields == ("title", "body")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("gsm8", r"did you mean 'gsm8k'\?.*allowed are all, paper, evaluated, mmlu"),
        ("own=no-such-file.jsonl", "does not exist"),
        (f"own={__file__}", "say which columns"),
    ],
)
def test_benchmarks_that_make_no_sense(wanted: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_benchmarks([wanted])


def test_a_folder_that_was_named_has_to_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SMOLTULU_BENCHMARKS", raising=False)
    monkeypatch.setenv("SMOLTULU_REAL_DATA", str(tmp_path))
    assert benchmarks_folder() is None
    (tmp_path / "eval").mkdir()
    assert benchmarks_folder() == tmp_path / "eval"
    monkeypatch.setenv("SMOLTULU_BENCHMARKS", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere' does not exist"):
        benchmarks_folder()


# The form of rows


@pytest.mark.parametrize(
    ("row", "form", "fields"),
    [
        ({"messages": turns("Q", "A"), "source": "x"}, "messages", {}),
        ({"Conversations": turns("Q", "A")}, "messages", {"messages": "Conversations"}),
        ({"prompt": "Q", "completion": "A"}, "prompt_completion", {}),
        ({"prompt": turns("Q"), "response": "A"}, "prompt_completion", {"completion": "response"}),
        ({"instruction": "Q", "input": "", "output": "A"}, "instruction", {}),
        ({"instruction": "Q", "response": "A"}, "instruction", {"output": "response"}),
        ({"question": "Q", "answer": "A"}, "question_answer", {}),
        ({"problem": "Q", "solution": "A"}, "question_answer", {"question": "problem", "answer": "solution"}),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "preference", {}),
        ({"chosen": turns("Q", "A"), "rejected": turns("Q", "B")}, "preference", {}),
        ({"input": "Q", "output_1": "A", "output_2": "B", "label": 1}, "preference_by_label", {}),
        (
            {"messages": turns("Q"), "ground_truth": "7", "dataset": "gsm8k"},
            "prompt_completion",
            {"prompt": "messages", "completion": "ground_truth"},
        ),
        ({"text": "Q"}, "prompt_completion", {"prompt": "text", "completion": "text"}),
        ({"question": "Q", "answer": 7}, "prompt_completion", {"prompt": "question", "completion": "question"}),
    ],
)
def test_the_form_of_rows_is_told_from_their_columns(row: dict[str, Any], form: str, fields: dict[str, str]) -> None:
    found = detect_format([row])
    assert (found.format, dict(found.fields)) == (form, fields)
    assert all(column in found.said for column in fields.values())


def test_of_two_answer_columns_the_fuller_one_is_taken() -> None:
    rows = [{"instruction": "Q", "output": "", "answer": "7"}, {"instruction": "Q", "output": "A", "answer": "7"}]
    assert detect_format(rows).fields == {"output": "answer"}
    assert detect_format(rows[1:]).fields == {}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no row"),
        ([[1]], "no row that is an object"),
        ([{"a": 1, "b": "x"}], r"the columns 'a', 'b' fit no known form. Expected are: messages .*prompt=COLUMN"),
        ([{"chosen": "A", "rejected": "B", "topic": "t"}], "no column holds their prompt"),
    ],
)
def test_rows_that_cannot_be_read_say_what_is_expected(rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detect_format(rows)


def test_a_named_format_is_taken_as_it_is() -> None:
    assert format_as_given("preference", {"prompt": "q"}).kind == "preference"
    with pytest.raises(ValueError, match="'text' has no user turns"):
        format_as_given("text", {})


_values = st.one_of(st.none(), st.text(max_size=5), st.integers(), st.lists(st.integers(), max_size=2))
_names = st.sampled_from(["prompt", "messages", "chosen", "rejected", "input", "output", "text", "label", "x"])


@given(st.lists(st.dictionaries(_names, _values, max_size=5), max_size=4))
def test_any_rows_have_a_form_or_a_clear_error(rows: list[dict[str, Any]]) -> None:
    try:
        found = detect_format(rows)
    except ValueError as error:
        assert str(error)
    else:
        assert found.said and set(found.fields.values()) <= {name for row in rows for name in row}


# The table of the paper


def report(name: str, found: int, total: int, **more: Any) -> BenchmarkReport:
    return BenchmarkReport(name=name, num_instances=total, num_contaminated=found, **{"num_skipped": 0, **more})


def result(*reports: BenchmarkReport, **changes: Any) -> AuditResult:
    values: dict[str, Any] = {
        "label": "tulu-3-sft-mixture",
        "repository": "allenai/tulu-3-sft-mixture",
        "read_as": "column messages",
        "settings": AuditSettings(roles=("user",)),
        "dataset": DatasetOutputs(kind="sft", num_rows=1),
        "contamination": ContaminationOutputs(
            kind="sft", num_rows_read=1, num_rows=1, num_removed=0, num_rows_contaminated=0, benchmarks=reports
        ),
        "folders": {},
        "keys": {},
        "outcomes": {},
    }
    return AuditResult(**{**values, **changes})


def test_the_table_stands_beside_the_paper_s_and_never_says_zero_for_what_was_not_checked() -> None:
    reports = [
        report("own", 1, 3),
        report("gpqa", 0, 0, not_checked="gated"),
        report("mmlu", 188, 14042, num_short_hits=180, num_unmatchable=2),
        report("piqa", 0, 1838),
    ]
    rows = table_rows(result(*reports, unreachable=(report("drop", 0, 0, not_checked="no Hub"),)), load_registry())
    assert [(row.title, row.share, row.paper) for row in rows] == [
        ("MMLU", "1.34 %", "1.34 %"),
        ("DROP", NOT_CHECKED, "0.20 %"),
        ("GPQA", NOT_CHECKED, "0 %"),
        ("PIQA", "0 %", ""),
        ("own", "33.33 %", ""),
    ]
    assert (
        "180 of the found have under 8 terms" in rows[0].remarks and "2 with a field without terms" in rows[0].remarks
    )
    assert rows[1].remarks == "no Hub" and rows[2].remarks == "gated"


def test_a_name_that_looks_like_markup_is_shown_as_it_is() -> None:
    out = io.StringIO()
    named = result(report("[/]", 1, 3), label="[red]mine", no_languages="[/]", folders={"contamination": "x"})
    show(named, console(file=out))
    assert "│ [/] " in out.getvalue() and "Contamination of [red]mine" in out.getvalue()
    assert "not judged: [/]" in out.getvalue()


@pytest.mark.parametrize(
    "changes",
    [
        {"repository": "somebody/else"},
        {"repository": None},
        {"settings": AuditSettings(mode="ngram", roles=("user",))},
        {"settings": AuditSettings(roles=("user", "assistant"))},
        {"settings": AuditSettings(roles=("user",), limit=1000)},
        {"settings": AuditSettings(roles=("user",), columns=("messages",))},
        {"settings": AuditSettings()},
    ],
)
def test_no_figure_of_the_paper_where_something_else_was_measured(changes: dict[str, Any]) -> None:
    (row,) = table_rows(result(report("mmlu", 0, 14042), **changes), load_registry())
    assert row.paper == ""


def test_weak_points_of_the_ngram_rule_and_of_another_benchmark_file() -> None:
    given = report("mmlu", 0, 1000, num_unmatchable=724, num_skipped=3)
    (row,) = table_rows(result(given, settings=AuditSettings(mode="ngram")), load_registry())
    assert "724 too short for this rule" in row.remarks
    assert "3 left out: a field is null" in row.remarks
    assert "the paper's N is 14,042" in row.remarks


def test_rows_that_were_not_searched_are_said() -> None:
    source = SourceReport(label="x", num_rows=10, num_malformed=3, reasons={"field 'output' is empty": 3}, examples=())
    dataset = DatasetOutputs(kind="sft", num_rows=7, sources=(source,))
    note = malformed_note(result(report("mmlu", 0, 1), dataset=dataset))
    assert note == "3 of 10 rows are malformed and were not searched (field 'output' is empty: 3)"
    assert malformed_note(result(report("mmlu", 0, 1))) == ""


# The pages of hits


def write_hits(folder: Path, num_instances: int, rows_per_instance: int, content: str) -> tuple[Path, Path, Path]:
    """hits.parquet, queries.parquet and rows.parquet in which every instance is in so many rows."""
    import pyarrow
    import pyarrow.parquet

    hits = [
        {
            "row": row, "row_id": f"0:{row}", "turn": 0, "instance": instance, "benchmark": "b<i>g",
            "benchmark_row": instance, "score": 1.0, "num_terms": 3, "text": content,
        }
        for row in range(rows_per_instance)
        for instance in range(num_instances)
    ]  # fmt: skip
    queries = [{"instance": instance, "fields": [content, f"field {instance}"]} for instance in range(num_instances)]
    paths = folder / "hits.parquet", folder / "queries.parquet", folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(hits), paths[0])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(queries), paths[1])
    rows = [{"messages": turns(f"row {row}, before {content} after", "A")} for row in range(rows_per_instance)]
    write_rows(paths[2], rows, group_rows=3)
    return paths


@pytest.mark.parametrize("pages_per_pass", [1, 20])
def test_hits_are_paged_escaped_and_load_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages_per_pass: int
) -> None:
    monkeypatch.setattr("smoltulu.tasks.report.hits._PAGES_PER_PASS", pages_per_pass)
    evil = "<script>alert('x')</script> & <img src=http://example.org/x.png>"
    hits, queries, rows = write_hits(tmp_path, INSTANCES_PER_PAGE + 1, ROWS_PER_INSTANCE + 5, evil)
    (pages,) = write_hit_pages(hits, queries, rows, tmp_path / "pages")
    assert pages.num_instances == INSTANCES_PER_PAGE + 1 and len(pages.files) == 2
    first, second = ((tmp_path / "pages" / name).read_text() for name in pages.files)
    assert first.count("<section>") == INSTANCES_PER_PAGE and second.count("<section>") == 1
    assert second.count("<details>") == ROWS_PER_INSTANCE and "and 5 more rows" in second
    assert f'href="{pages.files[1]}"' in first and f'href="{pages.files[0]}"' in second
    assert "<script" not in first and "<img" not in first and "b<i>g" not in first
    assert f"<mark>{evil}</mark>" in html.unescape(first)
    for row in range(ROWS_PER_INSTANCE):
        assert html.unescape(second).count(f"row {row}, before <mark>{evil}</mark> after") == 1
    assert not re.search(r"<[^>]*(src|href)=[\"']?(https?:)?//", first)
    assert "default-src 'none'" in first


@given(st.text(max_size=40), st.text(max_size=20))
def test_a_short_turn_is_shown_whole_around_its_match(turn: str, match: str) -> None:
    before, found, after = around_match(turn, match)
    assert before + found + after == turn and found in (match.removesuffix("…"), "")
    assert bool(found) == (match.removesuffix("…") != "" and match.removesuffix("…") in turn)


def test_a_long_turn_is_cut_around_its_match() -> None:
    before, match, after = around_match("x" * 5000 + " the match " + "y" * 5000, "the match")
    assert match == "the match" and before.startswith("…") and after.endswith("…")
    assert len(before + match + after) < 1400
