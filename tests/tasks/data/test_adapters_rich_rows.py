"""The rows file with more than role and content: it gives back what was written, and plain files are as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from smoltulu.tasks.data import rows as rows_file
from smoltulu.tasks.data import rows_writer
from smoltulu.tasks.data.rows import (
    COLUMNS,
    TURNS,
    rows_at,
    rows_digest,
    same_rows,
    stored_rows,
    texts_of,
    turn_text,
    turns_of,
)
from smoltulu.tasks.data.rows_writer import RowsWriter
from tests.rich_rows import ASKED, TOOLS, call, calling
from tests.rows_file import read_rows, write_rows
from tests.small_runs import turn

_text = st.one_of(st.text(max_size=8), st.sampled_from(["\u2028", '"\\', "\U0001f600", " \n", "é" * 30]))
_some = _text.filter(bool)
_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), _text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_text, inner, max_size=3)),
    max_leaves=5,
)
_call = st.builds(
    lambda name, arguments, own: (
        ({"id": own} if own else {}) | {"type": "function", "function": {"name": name, "arguments": arguments}}
    ),
    _text, st.dictionaries(_text, _json, max_size=3), _text,
)  # fmt: skip
_turn = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]), "content": _text},
    optional={
        "reasoning_content": _some,
        "tool_calls": st.lists(_call, min_size=1, max_size=2),
        "name": _some,
        "tool_call_id": _some,
        "train": st.just(False),
    },
)
_tools = st.lists(st.dictionaries(_text, _json, max_size=2), min_size=1, max_size=2)


def rows_of(kind: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    columns = {name: st.lists(_turn, max_size=3) if name in TURNS else _text for name in COLUMNS[kind]}  # type: ignore[index]
    plain = {
        name: st.lists(st.builds(turn, _text, _text), max_size=2) if name in TURNS else _text
        for name in COLUMNS[kind]  # type: ignore[index]
    }
    rich = st.fixed_dictionaries(columns, optional={"tools": _tools})
    return st.lists(st.one_of(st.fixed_dictionaries(plain), rich), max_size=8)


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from(sorted(COLUMNS)), st.integers(1, 4), st.integers(1, 60))
def test_rows_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, data: Any, kind: Any, group_rows: int, group_characters: int
) -> None:
    rows = data.draw(rows_of(kind))
    file = tmp_path_factory.mktemp("rows") / "rows.parquet"
    with mock.patch.object(rows_writer, "GROUP_CHARACTERS", group_characters):
        write_rows(file, rows, kind, group_rows)
        again = write_rows(file.with_name("again"), rows, kind, group_rows)
    read = read_rows(file)
    assert read == rows
    # Names of arguments keep their order: a template writes them in it.
    assert json.dumps([row.get("tools") for row in read]) == json.dumps([row.get("tools") for row in rows])
    assert again.read_bytes() == file.read_bytes()
    assert sorted(path.name for path in file.parent.iterdir()) == ["again", "rows.parquet"]
    first, count = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    assert list(stored_rows(file, first, count)) == rows[first : first + count]
    wanted = data.draw(st.lists(st.integers(0, len(rows) - 1))) if rows else []
    assert rows_at(file, wanted) == {number: rows[number] for number in wanted}
    assert rows_digest(read) == rows_digest(rows[::-1])
    assert same_rows(again, file)


def test_a_file_of_plain_rows_has_the_columns_that_it_always_had(tmp_path: Path) -> None:
    rows = [{"messages": [turn("user", "Hi"), turn("tool", "a role is a word")]}] * 3
    with parquet.ParquetFile(write_rows(tmp_path / "rows.parquet", rows)) as opened:
        text = pa.field("content", pa.string(), nullable=False)
        message = pa.struct([text.with_name("role"), text])
        turns = pa.list_(pa.field("element", message, nullable=False))
        expected = [text.with_name("id"), pa.field("messages", turns, nullable=False)]
        assert opened.schema_arrow == pa.schema(expected)


def test_rows_before_the_first_rich_one_are_written_once_more(tmp_path: Path) -> None:
    plain = {"messages": [turn("user", "Hi"), turn("assistant", "Hello")]}
    rich = {"messages": ASKED, "tools": TOOLS}
    file = write_rows(tmp_path / "rows.parquet", [plain] * 5 + [rich, plain], group_rows=2)
    assert [row["messages"] for row in read_rows(file)] == [plain["messages"]] * 5 + [ASKED, plain["messages"]]
    with parquet.ParquetFile(file) as opened:
        assert rows_file.group_starts(opened) == [0, 2, 4, 6, 7]


@pytest.mark.parametrize("wrong", [
    {"weight": 0}, {"train": True}, {"tool_calls": []}, {"reasoning_content": ""}, {"name": ""},
    {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
    {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}, "more": 1}}]},
])  # fmt: skip
def test_what_would_be_read_otherwise_is_not_written(tmp_path: Path, wrong: dict[str, Any]) -> None:
    writer = RowsWriter(tmp_path / "rows.parquet", "sft")
    writer.write({"id": "0:0", "messages": [turn("assistant", "x") | wrong]})
    with pytest.raises(AssertionError):
        writer._end_group()


def test_every_text_of_a_row_is_in_its_texts() -> None:
    said = calling(call(city="Bonn", days=[1, {"at": "noon"}]), content="I look.", reasoning_content="Hm.", name="a")
    assert turn_text(said) == "I look.\nHm.\nweather\ncity\nBonn\ndays\n1\nat\nnoon"
    assert turn_text(turn("user", "plain")) == "plain"
    row = {"messages": [turn("user", "Rain?"), said], "tools": [{"name": "f", "description": "does it"}]}
    assert texts_of(row) == [
        ("user", "Rain?"), ("assistant", turn_text(said)), ("system", "name\nf\ndescription\ndoes it"),
    ]  # fmt: skip
    assert len(texts_of({"messages": [said]})) == 1 == len(turns_of({"messages": [said]}))
