"""Plain conversations are read by columns: the same file and the same counts as row by row, whatever the rows are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.data import DataSet, DatasetInputs, DatasetOutputs, DatasetStageConfig, DataSource
from smoltulu.tasks.data import json_rows, plain, rows_writer, stage
from smoltulu.tasks.data.json_rows import Lines
from smoltulu.tasks.data.rows import stored_rows
from smoltulu.tasks.stage import StageContext


def chat(*texts: Any, first: str = "user") -> list[dict[str, Any]]:
    roles = ["system", "user", "assistant"][first != "system" :]
    said = [roles[0], *(("user", "assistant")[number % 2] for number in range(len(texts)))] if first == "system" else [
        ("user", "assistant")[number % 2] for number in range(len(texts))
    ]  # fmt: skip
    return [{"role": role, "content": text} for role, text in zip(said, texts, strict=False)]


def made(folder: Path, source: DataSource, num_threads: int = 1) -> tuple[DatasetOutputs, bytes]:
    """What the stage counts, and the bytes of its rows file."""
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True)
    config = DatasetStageConfig(kind="sft", data=DataSet(sources=(source,), max_malformed_share=1.0))
    compute = ComputeSettings(device="cpu", num_threads=num_threads)
    context = StageContext(folder / "out", folder / "work", compute, lambda *args, **kwargs: None)
    outputs, _ = stage.build_dataset(config, DatasetInputs(), context)
    return outputs, (folder / "out" / outputs.file).read_bytes()


def both(folder: Path, lines: list[bytes], block_bytes: int = 4 << 20, **rest: Any) -> tuple[Any, Any]:
    """(by columns, row by row) of the same lines; an error in place of a result."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    source = DataSource(path=str(folder / "a.jsonl"), format="messages", **rest)
    results: list[Any] = []
    for name in ("columns", "rows"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_rows, "_BLOCK_BYTES", block_bytes)
            if name == "rows":
                patch.setattr(stage, "fits", lambda source: False)
            try:
                results.append(made(folder / name, source))
            except ValueError as error:
                results.append(str(error))
    return results[0], results[1]


ODD = [
    {"messages": chat("Q", "A"), "id": "x", "source": ""},
    {"messages": chat("Q", "A"), "id": 7, "source": " "},
    {"messages": chat("S", "Q", "A", first="system"), "date": "2024-05-01"},
    {"messages": chat(" \u2003", "A")},
    {"messages": chat("\x1c", "A")},
    {"messages": chat("\u00e9 \U0001f600", "A\u0000B")},
    {"messages": chat("Q", "A", "Q")},
    {"messages": chat("Q", None)},
    {"messages": []},
    {"messages": None},
    {"messages": "[]"},
    {"messages": json.dumps(chat("Q", "A"))},
    {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": 0}]},
    {"messages": [{"role": "User", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    {"messages": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    {"messages": chat("Q", "A"), "system": "S"},
    {"messages": chat("Q", "A"), "label": False},
    {"messages": chat("Q", "A"), "Images": ["x"]},
    {"messages": chat("Q", "A"), "more": {"a": [1]}},
    {"messages": chat("Q", "A"), "more": []},
    {"messages": chat("Q", "A"), "a\nb": "x"},
    {"conversations": chat("Q", "A")},
    [1],
    3,
]
RAW = [
    b'{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "messages": null}',
    b'{"messages": null, "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}',
    b'{"messages": [{"role": "user", "content": "Q", "content": "R"}, {"role": "assistant", "content": "A"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "A"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud83d\\ude00"}, {"role": "assistant", "content": "A"}]}',
    b'{"m\\u0065ssages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "n": 1e999}',
    b'{"messages": [{"content": "Q", "role": "user"}, {"content": "A", "role": "assistant"}], "n": -0.5}',
    b'{"messages": [{"role": "user", "content": "\xff"}, {"role": "assistant", "content": "A"}]}',
    b'{"messages": [{"role": "user", "content": "a\tb"}, {"role": "assistant", "content": "A"}]}',
    b'{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]} {"messages": []}',
    b"",
    b"  ",
    b"null",
    b"null null",
    b"\0\0\0",
    b'{"messages": [{"role": "user", "cont',
]
LINES = (
    [json.dumps(row).encode() for row in ODD] + [json.dumps(row, ensure_ascii=False).encode() for row in ODD[:7]] + RAW
)
PLAIN = json.dumps(ODD[0]).encode()


@pytest.mark.parametrize("line", LINES, ids=lambda line: repr(line[:60]))
def test_a_line_among_plain_ones(tmp_path: Path, line: bytes) -> None:
    by_columns, by_rows = both(tmp_path, [PLAIN, line, PLAIN, PLAIN], on_bad_line="count")
    assert by_columns == by_rows
    by_columns, by_rows = both(tmp_path / "first", [line, PLAIN])
    assert by_columns == by_rows


_texts = st.text(st.sampled_from('aé\u00a0 \n\t\U0001f600\x1c\u2028"\\'), min_size=0, max_size=4)
_turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "user", "assistant", "assistant", "tool", "x"]), "content": _texts}
)
_chats = st.builds(lambda texts, first: chat(*texts, first=first), st.lists(_texts, min_size=1, max_size=4),
                   st.sampled_from(["user", "system"]))  # fmt: skip
_rows = st.fixed_dictionaries(
    {"messages": st.one_of(_chats, _chats, st.lists(_turns, max_size=3))},
    optional={"id": st.one_of(st.none(), _texts, st.integers(0, 9)), "weight": st.sampled_from([1, 0])},
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(_rows.map(lambda row: json.dumps(row).encode()), st.sampled_from(LINES)), min_size=1,
                max_size=8), st.sampled_from([100, 4 << 20]))  # fmt: skip
def test_any_lines(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], block_bytes: int) -> None:
    by_columns, by_rows = both(tmp_path_factory.mktemp("x"), lines, block_bytes, on_bad_line="count")
    assert by_columns == by_rows


def test_groups_end_where_rows_one_by_one_end_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_writer, "GROUP_ROWS", 7)
    monkeypatch.setattr(rows_writer, "GROUP_CHARACTERS", 60)
    lines = [json.dumps({"messages": chat("\u00e9" * (1 + number % 23), "A")}).encode() for number in range(100)]
    lines[40] = json.dumps({"messages": chat("Q", "A"), "tools": [{"name": "f"}]}).encode()
    lines[60] = json.dumps(ODD[0] | {"label": False}).encode()
    for number, some in enumerate((lines[:40], lines)):
        by_columns, by_rows = both(tmp_path / str(number), some, block_bytes=700)
        assert by_columns == by_rows


def test_plain_blocks_are_read_by_columns(tmp_path: Path) -> None:
    """That the short way is taken at all, with one row in it that takes the long one."""
    source = DataSource(path="x", format="messages")
    data = b"\n".join([PLAIN, json.dumps(ODD[6]).encode(), PLAIN])
    found = plain.plain_rows(Lines("x", data, 0, "stop"), source)
    assert found is not None and [isinstance(run, pa.ListArray) for run in found.runs] == [True, False, True]
    assert found.unread == {"id": 2}
    assert not plain.fits(source.model_copy(update={"ignore": ("weight",)}))
    assert not plain.fits(DataSource(path="x", format="question_answer"))


def test_threads_and_packing_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "_BLOCK_BYTES", 500)
    lines = b"\n".join(json.dumps({"messages": chat(str(number), "A")}).encode() for number in range(50))
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(lines))
    one = made(tmp_path / "one", DataSource(path=str(tmp_path / "a.jsonl"), format="messages"))
    two = made(tmp_path / "two", DataSource(path=str(tmp_path / "a.jsonl"), format="messages"), num_threads=2)
    packed = made(tmp_path / "packed", DataSource(path=str(tmp_path / "b.json.gz"), format="messages"))
    assert one == two and one[1] == packed[1]
    read = list(stored_rows(tmp_path / "one" / "out" / "rows.parquet"))
    assert read[49] == {"id": "0:49", "messages": chat("49", "A")} and len(read) == 50
