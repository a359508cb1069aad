"""The scores file: what is written is read, what is no scores file is refused."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smoltulu.artifacts.keys import canonical_json
from smoltulu.tasks.selection import scores_file
from smoltulu.tasks.selection.scores_file import (
    PartScore,
    RowScore,
    ScoresWriter,
    open_scores,
    read_scores,
    row_digest,
    scorer_of,
    scores_schema,
    stored_scores,
)
from tests.small_runs import pairs

PART = PartScore(turn=1, step=0, first=3, last=9, num_tokens=5, loss=2.0, masked_loss=2.5, score=0.25)
LINES = [
    RowScore(0, "0:0", "0" * 16, 12, 6, 40, 0.5, 2.0, 3.0, 0.5, "", (PART, replace(PART, turn=3))),
    RowScore(1, "0:4", "1" * 16, 9000, 0, 40_000, 0.0, problem=scores_file.TOO_LONG),
    RowScore(2, "0:9", "2" * 16, 7, 2, 10, 0.0, None, None, -1.0),
]


def _write(file: Path, lines: list[RowScore] = LINES) -> Path:
    with ScoresWriter(file, "attention_influence") as writer:
        for line in lines:
            writer.write(line)
    return file


def test_lines_are_read_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores_file, "GROUP_ROWS", 2)
    file = _write(tmp_path / "scores.parquet")
    assert list(stored_scores(file)) == LINES
    with open_scores(file) as opened:
        assert opened.metadata.num_row_groups == 2
        assert scorer_of(opened) == "attention_influence"
    table = read_scores(file, ("digest", "score"))
    assert table.to_pydict() == {"digest": ["0" * 16, "1" * 16, "2" * 16], "score": [0.5, None, -1.0]}
    assert file.read_bytes() == _write(tmp_path / "again.parquet").read_bytes()


def test_a_file_without_a_line_is_one(tmp_path: Path) -> None:
    file = _write(tmp_path / "scores.parquet", [])
    assert list(stored_scores(file)) == [] and read_scores(file).num_rows == 0


def test_a_digest_is_that_of_the_content() -> None:
    row = {"id": "0:1", "messages": [{"role": "user", "content": "né"}]}
    assert row_digest(row) == row_digest({**row, "id": "0:1#2"}) == row_digest(dict(reversed(row.items())))
    assert row_digest(row) == "6372f3637bba3246"  # the same on every machine
    for one in (row, {"id": "", **pairs(2)[0]}, {**row, "tools": [{"limit": 1.0}]}):
        content = canonical_json({name: value for name, value in one.items() if name != "id"})
        assert row_digest(one) == hashlib.blake2b(content.encode()).hexdigest()[:16]
    others: list[dict[str, Any]] = [
        {"id": "0:1", "messages": [{"role": "user", "content": "ne"}]},
        {"id": "0:1", "messages": [{"role": "user", "content": "né", "train": False}]},
        {**row, "tools": [{"name": "f"}]},
    ]
    assert len({row_digest(one) for one in [row, *others]}) == 4


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (replace(LINES[2], row=5), "line 2 .row 0:9. is not numbered as its place"),
        (replace(LINES[2], num_trained_tokens=8), "line 2 .* more trained tokens than tokens"),
        (replace(LINES[2], num_trained_tokens=-1), "fewer than none"),
        (replace(LINES[2], num_characters=-1), "fewer characters than none"),
        (replace(LINES[2], repetition=float("nan")), r"repetition outside \[0, 1\]"),
        (replace(LINES[2], repetition=1.5), r"repetition outside \[0, 1\]"),
        (replace(LINES[2], digest="abc"), "digest that is not 16 characters"),
    ],
)
def test_lines_that_cannot_be_are_refused(tmp_path: Path, line: RowScore, said: str) -> None:
    file = _write(tmp_path / "scores.parquet", [*LINES[:2], line])
    with pytest.raises(ValueError, match=said):
        read_scores(file, ("digest",))
    with pytest.raises(ValueError, match="score the rows again"):
        list(stored_scores(file))


@pytest.mark.parametrize(
    ("change", "said"),
    [({"problem": "x"}, "line 0 .* a problem and a score"), ({"loss": float("inf")}, "a loss that is no number")],
)
def test_a_changed_file_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """What the writer itself never writes."""
    import pyarrow as pa
    from pyarrow import parquet

    lines = [line | change for line in read_scores(_write(tmp_path / "scores.parquet")).to_pylist()]
    file = tmp_path / "changed.parquet"
    parquet.write_table(pa.Table.from_pylist(lines, scores_schema("attention_influence")), file)
    with pytest.raises(ValueError, match=said):
        list(stored_scores(file))


def test_what_is_no_scores_file_is_refused(tmp_path: Path) -> None:
    from pyarrow import parquet

    whole = _write(tmp_path / "scores.parquet")
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        open_scores(torn)
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        open_scores(tmp_path / "missing.parquet")
    other = tmp_path / "other.parquet"
    parquet.write_table(parquet.read_table(whole).drop_columns(["score"]), other)
    with pytest.raises(ValueError, match="no scores file: its columns"):
        open_scores(other)
    unnamed = tmp_path / "unnamed.parquet"
    parquet.write_table(parquet.read_table(whole).replace_schema_metadata({}), unnamed)
    with pytest.raises(ValueError, match="its scorer"):
        open_scores(unnamed)
