"""The samples file: what is written is read, damage is told in a line, and marks are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smoltulu.tasks.evaluation.answers import end_of
from smoltulu.tasks.evaluation.samples import (
    join_samples,
    marked,
    read_samples,
    sample_counts,
    samples_schema,
    write_samples,
)

GENERATED = {
    "task": "gsm8k", "entry": 2, "id": "7", "filter": "strict-match", "doc_hash": "d", "prompt_hash": "p",
    "target_hash": "t", "prompt": "Q: a\u2028b\nA:", "target": "4", "completion": "so\n#### 4", "parsed": "4",
    "stop": "eos", "num_tokens": 9, "metrics": {"exact_match": 1.0, "nats": 0.1 + 0.2}, "is_empty": False,
}  # fmt: skip
CHOICES = {"task": "arc", "id": "0", "logliks": [-1.5, -0.1, float("-inf")], "metrics": {}, "is_left_cut": True}
PAIR = {"task": "preference", "id": "x", "right": True, "chosen": 0.25, "rejected": -1.5, "scores": [1, 0]}


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [GENERATED, CHOICES, PAIR] * 2_000  # more than one row group
    write_samples(tmp_path / "samples.parquet", rows)
    assert list(read_samples(tmp_path / "samples.parquet")) == rows
    write_samples(tmp_path / "again.parquet", rows)
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "samples.parquet").read_bytes()
    write_samples(tmp_path / "none.parquet", [])
    assert list(read_samples(tmp_path / "none.parquet")) == []


def test_only_the_fields_that_are_wanted_are_read(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples.parquet", [GENERATED, PAIR])
    first, second = read_samples(tmp_path / "samples.parquet", ["id", "metrics", "right"])
    assert first == {"id": "7", "metrics": GENERATED["metrics"]} and second == {"id": "x", "right": True}


def test_samples_of_before_are_read(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"task": "arc", "id": 3, "completion": "a\u2028b"}, {"task": "arc", "id": "x"}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert list(read_samples(tmp_path / "samples.jsonl")) == [rows[0] | {"id": "3"}, rows[1]]


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "no_parquet", "other_columns"])
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "samples.parquet"
    write_samples(file, [GENERATED] * 50)
    data = bytearray(file.read_bytes())
    if damage == "other_columns":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.table({"task": ["a"]}), file)
    else:
        data[200] ^= 255
        file.write_bytes({"cut": data[:-20], "empty": b"", "flipped": data, "no_parquet": b"x" * 500}[damage])
    with pytest.raises(ValueError, match=r"^samples\.parquet cannot be read: .*; evaluate this model again$"):
        list(read_samples(file))
    with pytest.raises(FileNotFoundError):
        list(read_samples(tmp_path / "gone.parquet"))


@pytest.mark.parametrize("others", ["[" * 200_000, "{", "[1]", "3", '{"task": "another"}'])
def test_a_row_of_another_hand_is_one_clear_error(tmp_path: Path, others: str) -> None:
    """A shared store may hold what nobody here wrote."""
    import pyarrow as pa
    from pyarrow import parquet

    file = tmp_path / "samples.parquet"
    table = pa.Table.from_pylist([{"task": "arc", "id": "0", "others": others}], schema=samples_schema())
    parquet.write_table(table, file, write_page_checksum=True)
    with pytest.raises(ValueError, match=r"^samples\.parquet cannot be read: .*; evaluate this model again$"):
        list(read_samples(file))


def test_files_are_joined_each_under_its_entry(tmp_path: Path) -> None:
    write_samples(tmp_path / "a.parquet", [GENERATED, CHOICES])
    write_samples(tmp_path / "b.parquet", [PAIR])
    join_samples(tmp_path / "all.parquet", [(tmp_path / "a.parquet", 5), (tmp_path / "b.parquet", None)])
    assert list(read_samples(tmp_path / "all.parquet")) == [GENERATED | {"entry": 5}, CHOICES | {"entry": 5}, PAIR]


@pytest.mark.parametrize(
    ("row", "marks"),
    [
        ({"completion": " \n", "parsed": "[invalid]", "stop": "eos"}, (True, True, False)),
        ({"completion": "four", "parsed": "[invalid]", "stop": "length"}, (False, True, True)),
        ({"completion": "four", "parsed": "", "stop": "\n\n"}, (False, True, False)),
        ({"completion": "four", "parsed": "four", "stop": "eos"}, (False, False, False)),
        ({"completion": "", "parsed": "", "stop": "eos"}, (True, False, False)),  # nothing to find an answer in
    ],
)
def test_marks_by_hand(row: dict[str, Any], marks: tuple[bool, ...]) -> None:
    made = marked(row)
    assert (made["is_empty"], made["is_unparsed"], made["is_truncated"]) == marks


def test_counts_are_of_the_headlines_own_filter() -> None:
    strict = [{"filter": "strict", "is_unparsed": True, "is_left_cut": False}] * 3
    loose = [{"filter": "loose", "is_unparsed": False, "is_left_cut": False}] * 3
    assert sample_counts(strict + loose, "exact_match,strict") == {"num_unparsed": 3, "num_left_cut": 0}
    assert sample_counts(strict + loose, "exact_match,loose") == {"num_unparsed": 0, "num_left_cut": 0}


def test_what_ended_an_answer_by_hand() -> None:
    letters = dict(enumerate("abcd\n"))

    def end(ids: list[int], *stops: str) -> tuple[str, int]:
        # 9 ends an answer, 8 is padding; neither is text.
        return end_of(ids, {9}, [*stops, "</s>"], lambda ids: "".join(letters.get(one, "") for one in ids))

    assert end([0, 1, 9, 8, 8]) == ("eos", 3)
    assert end([9, 8, 8]) == ("eos", 1)
    assert end([0, 1, 2]) == ("length", 3)
    assert end([0, 4, 4, 1, 2], "\n\n") == ("\n\n", 3)
    assert end([0, 1, 2, 9], "c", "b") == ("b", 2)  # the first in the text, not in the list
    assert end([0, 9, 1, 1], "b") == ("eos", 2)  # what comes after the end is no answer
