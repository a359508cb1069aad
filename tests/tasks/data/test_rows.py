"""The rows file: what is written is read, byte for byte and group for group."""

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

from smoltulu.schemas.data import DataSource
from smoltulu.tasks.data import rows as rows_file
from smoltulu.tasks.data import rows_writer
from smoltulu.tasks.data.formats import MalformedRow, adapt
from smoltulu.tasks.data.rows import COLUMNS, num_rows, rows_at, same_rows, stored_rows, turns_of
from smoltulu.tasks.data.rows_writer import RowsWriter
from tests.rows_file import read_rows, write_rows

_text = st.one_of(st.text(), st.sampled_from(["\u2028", "\x85\r\n", '"\\', "\U0001f600\ud83d", "\0", " ", "é" * 99]))
_turns = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": _text}))
_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), _text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_text, inner, max_size=3)),
    max_leaves=5,
)
#: A row of a user, of any shape; a fourth of them well-formed.
_HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello\u2028"}]
_field = st.one_of(_turns, _text, _json, st.just(_HI), st.just(_HI[:1]))
_any_row = st.fixed_dictionaries(
    {"prompt": _field},
    optional={
        "messages": _field,
        "chosen": _field,
        "rejected": _field,
        "verifier": st.one_of(st.just("exact_match"), _json),
        "ground_truth": _json,
        "metadata": _json,
    },
)
_FORMATS: dict[str, str] = {"sft": "messages", "preference": "preference", "rlvr": "rlvr", "texts": "all_text"}


@settings(max_examples=200)
@given(st.sampled_from(sorted(COLUMNS)), st.lists(_any_row, max_size=6), st.integers(1, 4))
def test_whatever_the_data_set_takes_from_a_users_rows_is_read_as_it_was_taken(
    tmp_path_factory: pytest.TempPathFactory, kind: Any, rows: list[dict[str, Any]], group_rows: int
) -> None:
    source = DataSource(path="x.jsonl", format=_FORMATS[kind])  # type: ignore[arg-type]
    taken = []
    for number, row in enumerate(rows):
        try:
            taken.append({"id": f"0:{number}", **adapt(row, source)})
        except MalformedRow:
            continue
    file = write_rows(tmp_path_factory.mktemp("rows") / "rows.parquet", taken, kind, group_rows)
    assert read_rows(file) == taken and num_rows(file) == len(taken)
    # What the file before this one, JSON lines, would have given.
    assert [json.loads(json.dumps(row, ensure_ascii=False)) for row in taken] == read_rows(file)


_valid = _text.filter(lambda text: "\ud83d" not in text)
_valid_turns = st.lists(st.fixed_dictionaries({"role": _valid, "content": _valid}), max_size=3)


@settings(max_examples=100)
@given(st.data(), st.sampled_from(sorted(COLUMNS)), st.integers(1, 5), st.integers(1, 60))
def test_rows_of_any_text_and_any_part_of_them(
    tmp_path_factory: pytest.TempPathFactory, data: Any, kind: Any, group_rows: int, group_characters: int
) -> None:
    columns = {name: _valid_turns if name in rows_file.TURNS else _valid for name in COLUMNS[kind]}
    rows = data.draw(st.lists(st.fixed_dictionaries(columns), max_size=12))
    file = tmp_path_factory.mktemp("rows") / "rows.parquet"
    with mock.patch.object(rows_writer, "GROUP_CHARACTERS", group_characters):
        write_rows(file, rows, kind, group_rows)
        again = write_rows(file.with_name("again"), rows, kind, group_rows)
    assert again.read_bytes() == file.read_bytes()
    assert read_rows(file) == rows
    first, count = data.draw(st.integers(0, 14)), data.draw(st.integers(0, 14))
    assert list(stored_rows(file, first, count)) == rows[first : first + count]
    wanted = data.draw(st.lists(st.integers(0, len(rows) - 1))) if rows else []
    assert rows_at(file, wanted) == {number: rows[number] for number in wanted}


def test_a_row_group_ends_at_its_rows_or_its_characters(tmp_path: Path) -> None:
    texts = ["a", "b" * 10, "c", "d", "e", "f", "g" * 9]
    rows = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    with mock.patch.object(rows_writer, "GROUP_CHARACTERS", 10):
        file = write_rows(tmp_path / "rows.parquet", rows, group_rows=3)
    with parquet.ParquetFile(file) as opened:
        # Of 11 characters, of three rows, of 10 characters.
        assert rows_file.group_starts(opened) == [0, 2, 5, 7]


def test_turns_are_counted_through() -> None:
    first, second, third = ({"role": "user", "content": text} for text in "abc")
    assert turns_of({"rejected": [third], "prompt": [first], "chosen": [second]}) == [first, second, third]
    assert turns_of({"messages": [second, first], "id": "0:0"}) == [second, first]


@pytest.mark.parametrize(
    "row", [{"id": "a"}, {"id": "a", "messages": [], "text": "x"}, {"id": "a", "messages": [{"content": 3}]}]
)
def test_only_rows_of_its_kind_are_written(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises((AssertionError, TypeError)), RowsWriter(tmp_path / "rows.parquet", "sft") as writer:
        writer.write(row)


def test_what_is_no_rows_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    for table in (
        pa.table({"messages": ["no list"], "id": ["a"]}),
        pa.table({"id": ["a"], "messages": pa.array([[{"role": "user", "content": "may be null"}]])}),
    ):
        parquet.write_table(table, file)
        with pytest.raises(ValueError, match=r"no rows file: its columns \(.*make a data set of it first"):
            num_rows(file)
    with pytest.raises(ValueError, match=r"missing: not a whole Parquet file .*make the data set again"):
        num_rows(tmp_path / "missing")
    write_rows(file, [{"messages": []}] * 10)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        list(stored_rows(file))


def test_rows_as_they_were_written_before_are_compared_one_by_one(tmp_path: Path) -> None:
    rows = [{"id": f"0:{number}", "messages": [{"role": "user", "content": f"\u2028 {number}"}]} for number in range(3)]
    file, before = write_rows(tmp_path / "rows.parquet", rows), tmp_path / "before.parquet"

    def same(*written: Any) -> bool:
        return same_rows(write_rows(before, written, "sft", group_rows=2), file)

    assert same(*rows)
    assert not same(*rows[:2]) and not same(*rows, rows[0]) and not same(*rows[::-1]) and not same()
    assert not same(*rows[:2], rows[2] | {"messages": [rows[2]["messages"][0] | {"train": False}]})
    write_rows(before, rows)
    before.write_bytes(before.read_bytes()[:-9])
    assert not same_rows(before, file) and not same_rows(tmp_path / "none", file)
