"""What the contamination scan, its pages and the language table read of rows with more than role and content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltulu.schemas.contamination import ContaminationRules
from smoltulu.tasks.data.rows import texts_of
from smoltulu.tasks.languages.stage import row_text
from smoltulu.tasks.report.hits import write_hit_pages
from tests.rich_rows import ASKED, TOOLS, call, calling
from tests.rows_file import read_rows, write_rows
from tests.small_runs import turn
from tests.tasks.contamination.test_contamination import LEAK, benchmark, lines
from tests.tasks.contamination.test_contamination import run as check
from tests.tasks.contamination.test_contamination_rows import turns_of_file
from tests.tasks.data.test_adapters_rich_rows import rows_of

ROLES = ("system", "developer", "user", "assistant", "tool")


def expected(rows: list[dict[str, Any]], roles: tuple[str, ...]) -> list[tuple[int, int, str]]:
    return [
        (number, index, text)
        for number, row in enumerate(rows)
        for index, (role, text) in enumerate(texts_of(row))
        # What a row says of its tools may be nothing.
        if role in roles and not (index == len(texts_of(row)) - 1 and "tools" in row and not text)
    ]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["sft", "preference", "rlvr"]), st.integers(1, 200), st.integers(1, 4))
def test_every_text_of_every_turn_is_read_under_its_role(
    tmp_path_factory: pytest.TempPathFactory, data: Any, kind: Any, shard_bytes: int, group_rows: int
) -> None:
    rows = data.draw(rows_of(kind))
    roles = tuple(data.draw(st.sets(st.sampled_from(ROLES), min_size=1)))
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.parquet", rows, kind, group_rows)
    assert turns_of_file(path, roles, shard_bytes) == (expected(rows, roles), [row["id"] for row in rows])


def test_calls_reasoning_results_and_tools_are_texts_of_their_roles(tmp_path: Path) -> None:
    row = {"messages": [turn("developer", "Be brief."), *ASKED], "tools": TOOLS}
    path = write_rows(tmp_path / "rows.parquet", [{"messages": ASKED[:1]}, row])
    assert turns_of_file(path, ("assistant",))[0] == [
        (1, 2, "I must look.\nweather\ncity\nBonn\ndays\n3"), (1, 4, "No rain."),
    ]  # fmt: skip
    assert turns_of_file(path, ("tool", "developer"))[0] == [(1, 0, "Be brief."), (1, 3, "dry, 21")]
    ((_, _, tools),) = turns_of_file(path, ("system",))[0]
    assert "The weather of a city." in tools.split("\n") and "its name" in tools.split("\n")
    assert turns_of_file(path)[0] == [(0, 0, "Rain in Bonn?"), (1, 1, "Rain in Bonn?")]


def test_a_leak_in_any_part_of_a_row_is_found_and_goes(tmp_path: Path) -> None:
    """Policy span cuts content; of reasoning, a call or tools it leaves no part: such a row goes whole."""
    asked = turn("user", "Look.")
    rows = [
        {"messages": [asked, calling(call(city=LEAK))]},
        {"messages": [asked, turn("assistant", "So.") | {"reasoning_content": f"First: {LEAK} Then:"}]},
        {"messages": [asked, calling(call(city="Bonn")), turn("tool", f"before {LEAK} after"), turn("assistant", "a")]},
        {"messages": [asked, turn("assistant", "b")], "tools": [{"name": "f", "description": LEAK}]},
        {"messages": [asked, calling(call(city="Bonn"), content=f"now {LEAK} go")]},
        {"messages": [asked, turn("assistant", LEAK) | {"train": False}, asked, turn("assistant", "c")]},
        {"messages": [asked, turn("assistant", "clean") | {"reasoning_content": "too"}]},
    ]
    quiz = benchmark(tmp_path, [{"q": LEAK}], query_fields=("q",), strip_prefix="")
    written = [{"id": f"0:{number}", **row} for number, row in enumerate(rows)]
    outputs, _ = check(tmp_path, quiz, rows=written, roles=ROLES, policy="remove")
    assert outputs.num_removed == 6 and read_rows(tmp_path / "folder" / "rows.parquet") == written[6:]
    pages = write_hit_pages(
        tmp_path / "folder" / "hits.parquet", tmp_path / "index" / "queries.parquet", tmp_path / "dataset.parquet",
        tmp_path / "pages",
    )  # fmt: skip
    page = (tmp_path / "pages" / pages[0].files[0]).read_text("utf-8")
    assert page.count("<mark>") == 6
    outputs, _ = check(tmp_path, quiz, rows=written, roles=ROLES, policy="span", span_margin=0)
    kept = {row["id"]: row for row in read_rows(tmp_path / "folder" / "rows.parquet")}
    log = {line["id"]: line for line in lines(tmp_path / "folder" / "removed.jsonl")}
    assert list(kept) == ["0:2", "0:4", "0:6"] and kept["0:6"] == written[6]
    assert [log[name]["why"] for name in ("0:0", "0:1", "0:3", "0:5")] == [
        "a hit is in reasoning or a call of turn 1", "a hit is in reasoning or a call of turn 1", "a hit is in tools",
        "turn 1 is left without a word",
    ]  # fmt: skip
    assert "apples" not in str(list(kept.values()))
    assert kept["0:4"]["messages"][1]["tool_calls"] == written[4]["messages"][1]["tool_calls"]


def test_roles_of_tools_and_developers_may_be_searched() -> None:
    assert ContaminationRules(roles=("tool", "developer")).roles == ("tool", "developer")
    assert ContaminationRules().roles == ("user",)


def test_the_language_of_a_row_is_told_from_its_reasoning_too() -> None:
    row = {"messages": [turn("user", "Frage"), calling(call(city="Bonn"), content="Gut.", reasoning_content="Also")]}
    assert row_text(row, "assistant") == "Gut.\nAlso\nweather\ncity\nBonn"
    assert row_text(row, "user") == "Frage"
