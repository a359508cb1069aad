"""The audit searches all text of a row: whatever the columns are called, a leak in one of them is found and named."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from smoltulu.flows.cli.main import app
from smoltulu.schemas.audit import AuditSettings
from smoltulu.schemas.data import DataSource
from smoltulu.tasks.data.formats import SourceCounts, adapt, check_source
from smoltulu.tasks.data.formats.all_text import column_of
from tests.flows.test_audit import write_jsonl

QUESTIONS = [
    "A baker sells nine loaves on Monday and twice as many on Tuesday. How many loaves does she sell in the two days?",
    "Seven friends share sixty-three marbles so that each gets the same number. How many marbles does each friend get?",
]
PASSAGE = "The mill by the river was built in the spring of the year in which the old bridge fell into the water."


def source(**rest: Any) -> DataSource:
    return DataSource(path="x.jsonl", format="all_text", **rest)


def read(row: dict[str, Any], **rest: Any) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in adapt(row, source(**rest))["messages"]]


# Rows


def test_turns_stay_apart_and_everything_else_is_one_turn_more() -> None:
    row = {
        "id": 7,
        "context": "a passage",
        "messages": [
            {"role": "system", "content": "S"},
            {"from": "human", "value": "Q"},
            {"role": "model", "parts": [{"text": "A"}, {"text": "B"}], "reasoning_content": "R"},
            {"role": "tool_call", "content": None, "tool_calls": [{"function": {"arguments": '{"city": "Rome"}'}}]},
        ],
        "choices": ["one", {"label": "two"}],
        "none": None,
        "blank": " \n",
        "answers": {"What is it?": "This"},
    }
    assert read(row) == [
        ("system", "S"),
        ("user", "Q"),
        ("assistant", "A\n\nB\n\nR"),
        ("assistant", "Rome"),
        ("text", "a passage\n\none\n\ntwo\n\nWhat is it?\n\nThis"),
    ]


def test_turns_in_a_text_that_is_json_are_turns() -> None:
    chat = json.dumps([{"role": "user", "content": 'Q\n"x"'}, {"role": "assistant", "content": "A"}])
    assert read({"conversation": chat, "n": "[1, 2]", "s": "[not json]"}) == [
        ("user", 'Q\n"x"'),
        ("assistant", "A"),
        ("text", "[1, 2]\n\n[not json]"),
    ]


def test_who_speaks_is_no_text_but_a_sentence_behind_from_is() -> None:
    letter = {"from": "Who wrote this letter?", "content": "Nobody."}
    assert read({"letter": letter}) == [("text", "Who wrote this letter?\n\nNobody.")]
    assert read({"turns": [{"role": "user", "from": "Which town?", "content": "Q"}]}) == [("user", "Which town?\n\nQ")]
    assert read({"turns": [{"role": "narrator", "content": "Q"}]}) == [("text", "Q")]


def test_a_text_that_is_json_with_a_key_twice_stays_as_it_is() -> None:
    text = '{"question": "one", "question": "two"}'
    assert read({"a": text}) == [("text", text)]


def test_what_utf_8_cannot_hold_and_what_is_no_text() -> None:
    assert read({"a": "x\ud83dy", "b": b"bytes", "c": b"\xff\xd8"}) == [("text", "x\ufffdy\n\nbytes")]
    assert read({"a": 1, "b": [2.5], "c": {"d": True}}) == []


def test_a_place_in_a_turn_has_a_column() -> None:
    row = {
        "id": "0:0",
        **adapt({"a": "12345", "b": ["678", "9"], "messages": [{"role": "user", "content": "Q"}]}, source()),
    }
    assert [column_of(row, 1, place) for place in (0, 4, 7, 10, 12, -1)] == ["a", "a", "b", "b", "b", "a"]
    assert column_of(row, 0, 0) == "messages"
    assert column_of({"messages": []}, 0, 0) is None


def test_columns_narrow_it_and_the_others_are_counted() -> None:
    counts = SourceCounts(source(columns=("a", "messages")))
    rows = [{"a": "x", "b": "y", "n": 1, "messages": [{"role": "user", "content": "Q"}]}, {"a": "", "b": ["z"]}, 3]
    made = [row["messages"] for _, row in counts.normalised(rows)]
    assert made == [[{"role": "user", "content": "Q"}, {"role": "text", "content": "x"}], []]
    report = counts.report()
    assert (report.texts, report.unread, report.num_malformed) == ({"a": 1, "messages": 1}, {"b": 2}, 1)
    with pytest.raises(ValueError, match="columns is said of format all_text"):
        check_source(DataSource(path="x", format="messages", columns=("a",)), "sft")


_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
_value = st.recursive(
    st.none() | st.integers() | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "a"]), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["a", "b", "messages"]), _value, max_size=3))
def test_no_text_of_a_row_is_lost(row: dict[str, Any]) -> None:
    """Every text that is not blank is in some turn, but for who speaks; of a text that is JSON, its inner texts are."""
    whole = "\n".join(text for _, text in read(row))
    waiting: list[Any] = [row]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            assert not one.strip() or one in whole or one[0] in "[{"
        elif isinstance(one, dict):
            is_turn = isinstance(one.get("role"), str) and "content" in one
            waiting += [value for key, value in one.items() if not (is_turn and key == "role")]
        elif isinstance(one, list):
            waiting += one


# Settings


@pytest.mark.parametrize(
    ("given", "all_text", "as_paper"),
    [
        ({}, True, False),
        ({"roles": ["user"]}, False, True),
        ({"roles": ["user"], "modes": ["ngram"]}, False, False),
        ({"roles": ["user"], "columns": ["a"]}, True, False),
        ({"roles": ["user"], "limit": 9}, False, False),
        ({"columns": ["a"]}, True, False),
        ({"format": "instruction"}, False, False),
        ({"format": "all_text"}, True, False),
    ],
)
def test_what_is_searched(given: dict[str, Any], all_text: bool, as_paper: bool) -> None:
    settings = AuditSettings.model_validate(given)
    assert (settings.reads_all_text, settings.as_paper) == (all_text, as_paper)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": "ShareGPT"}, "write format: messages, fields: {messages: conversations}"),
        ({"columns": ["a"], "format": "instruction"}, "those of all text"),
        ({"modes": ["full", "full"]}, "modes: each may be named once"),
        ({"modes": []}, "modes: name one or more of full, ngram, normalised"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AuditSettings.model_validate(given)
    assert AuditSettings.model_validate({"mode": "ngram"}).modes == ("ngram",)


# The command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two benchmarks, one with two fields, all of both leaked into a file that no form reads as the user's turns."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "eval").mkdir()
    write_jsonl(folder / "eval" / "gsm8k_test.jsonl", [{"question": text} for text in QUESTIONS])
    asked = {"passage": PASSAGE, "question": "When was the mill built?"}
    write_jsonl(folder / "eval" / "drop_validation.jsonl", [asked])
    rows = [
        {"instruction": "Summarise.", "context": f"**{QUESTIONS[0]}**", "response": "Bread.", "category": "x"},
        {"instruction": "When was the mill built?", "context": PASSAGE, "response": QUESTIONS[1], "category": "x"},
    ]
    write_jsonl(folder / "dolly.jsonl", rows)
    with (folder / "dolly.jsonl").open("ab") as stream:
        stream.write(b'\0\0\0\n{"instruction": "tor')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOLTULU_BENCHMARKS", str(folder / "eval"))
        patch.chdir(folder)
        yield folder


def audit(place: Path, *arguments: str) -> tuple[int, str, str]:
    os.chdir(place)
    more = ("--detector", "none", "--store", str(place / "artifacts" / "store"), "--threads", "1")
    benchmarks = ("-b", "gsm8k", "-b", f"drop={place}/eval/drop_validation.jsonl")
    done = CliRunner().invoke(app, ["audit", *arguments, *benchmarks, *more], env={"COLUMNS": "200"})
    return done.exit_code, done.stdout, done.stderr


def test_a_leak_in_any_column_is_found_and_its_column_is_named(place: Path) -> None:
    code, out, err = audit(place, "dolly.jsonl")
    assert code == 0, err
    assert "read as columns instruction, context, response, category, all their text" in out
    # The paper's rule does not see through bold text; the other does. Passage and question stand in two columns.
    assert re.search(r"GSM8K +│ +2 │ +1 │ +50\.00 % │ +2 │ +100\.00 %", out)
    assert re.search(r"DROP +│ +1 │ +1 │ +100\.00 % │ +1 │ +100\.00 %", out)
    assert "instruction (2), context (2), response (2), category (2)" in out and "left out" not in out
    # Lines that hold no row are counted, and shown.
    assert "2 of 4 rows are malformed and were not searched" in out
    assert "row 2: line holds NUL bytes" in out and "row 3: line is not JSON, or torn" in out
    report = Path(next(line for line in out.splitlines() if line.startswith("report")).split(maxsplit=1)[1])
    pages = "".join(page.read_text() for page in report.parent.glob("*gsm8k*.html"))
    assert "column response, turn 0" in pages and "column context, turn 0" in pages
    assert "normalised-" in report.read_text()


def test_columns_and_roles_narrow_it_and_say_what_they_leave_out(place: Path) -> None:
    code, out, err = audit(place, "dolly.jsonl", "--column", "context", "--mode", "full")
    assert code == 0, err
    assert re.search(r"GSM8K +│ +2 │ +0 │ +0 %", out) and re.search(r"DROP +│ +1 │ +0 │ +0 %", out)
    assert "context (2)" in out and re.search(r"left out +columns \(rows\): category \(2\), instruction \(2\)", out)
    for more in ((), ("--compare",)):
        code, _, err = audit(place, "dolly.json", *more)
        assert code == 1 and f"looked in {place.resolve()})" in "".join(err.splitlines())
    code, _, err = audit(place, "dolly.jsonl", "--column", "contxt")
    assert code == 1 and "no column 'contxt' (did you mean 'context'?)" in err
    code, _, err = audit(place, "dolly.jsonl", "--role", "user")
    assert code == 1 and "line 3: not JSON" in err
    code, out, err = audit(place, "dolly.jsonl", "--role", "assistant", "--on-bad-line", "count", "--mode", "full")
    assert code == 0, err
    assert re.search(r"GSM8K +│ +2 │ +1 │ +50\.00 %", out) and "what is no turn of assistant" in out


def test_an_audit_without_a_row_that_can_be_read_shows_why(place: Path) -> None:
    (place / "torn.jsonl").write_bytes(b"\0\0\n" + b'{"a": "tor\n' * 7 + b"[1]\n")
    for more in ((), ("--role", "user", "--on-bad-line", "count")):
        code, _, err = audit(place, "torn.jsonl", *more)
        said = " ".join(err.split())
        assert code == 1 and "line is not JSON, or torn: 7" in said and "row is not an object: 1" in said
        assert said.count("row ") >= 5
    (place / "broken.jsonl").write_text('{"instruction": "Q", "output": ""}\n' * 9)
    code, _, err = audit(place, "broken.jsonl", "--role", "user")
    said = " ".join(err.split())
    assert code == 1 and "9 of 9 rows are malformed" in said and said.count("row ") >= 5
    assert "field 'output' is empty: 9" in said
