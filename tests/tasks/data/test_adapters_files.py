"""Files as people have them: every kind gives the same rows, and one that is none says what it is."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from smoltulu.schemas.common import scientific
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.data import DataSet, DatasetInputs, DatasetStageConfig, DataSource
from smoltulu.tasks.data import json_rows
from smoltulu.tasks.data.files import BrokenRow, read_file
from smoltulu.tasks.data.folders import splits_of
from smoltulu.tasks.data.sources import read_rows, source_digest
from smoltulu.tasks.data.stage import build_dataset
from smoltulu.tasks.stage import StageContext
from tests import ROOT

ROWS = [{"question": "one, \u00e9?", "answer": '"2024-05-01"'}, {"question": "two\nlines", "answer": "007"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
LIST = json.dumps(ROWS, indent=1).encode()
CSV = b'question,answer\n"one, \xc3\xa9?","""2024-05-01"""\n"two\nlines",007\n'
TSV = b'question\tanswer\none, \xc3\xa9?\t"""2024-05-01"""\n"two\nlines"\t007\n'


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".zst": zstd, ".xz": lzma.compress, ".bz2": bz2.compress
}  # fmt: skip


def read(path: Path | str, **rest: Any) -> list[Any]:
    return list(read_rows(DataSource(path=str(path), format="text", **rest)))


# Kinds of files


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("a.json", LIST),
        ("a.jsonl", LIST),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", "\n".join(json.dumps(row, indent=2) for row in ROWS).encode()),
        ("a.csv", CSV),
        ("a.tsv", TSV),
        ("A.JSONL", LINES.replace(b"\n", b"\r\n")),
        ("a.jsonl", LINES.replace(b"\n", b"\r")),
        ("a.json", b"\xef\xbb\xbf \n" + LIST),
    ],
)
def test_a_text_file_is_read_by_what_it_holds(tmp_path: Path, name: str, data: bytes, packed: str) -> None:
    (tmp_path / (name + packed)).write_bytes(PACKED[packed](data))
    assert read(tmp_path / (name + packed)) == ROWS
    assert read(tmp_path / (name + packed), limit=1) == ROWS[:1]


@pytest.mark.parametrize("packed", [".gz", ".zst", ".xz", ".bz2"])
def test_a_packed_file_under_a_plain_name_is_unpacked(tmp_path: Path, packed: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(PACKED[packed](LINES))
    assert read(tmp_path / "a.jsonl") == ROWS


def test_several_packed_parts_one_after_the_other(tmp_path: Path) -> None:
    for packed, pack in PACKED.items():
        lines = LINES.splitlines(keepends=True)
        (tmp_path / f"a.jsonl{packed}").write_bytes(pack(lines[0]) + pack(lines[1]))
        assert read(tmp_path / f"a.jsonl{packed}") == ROWS


@pytest.mark.parametrize(("packed", "name"), [(".gz", "gzip"), (".zst", "zstd"), (".xz", "xz"), (".bz2", "bzip2")])
def test_what_stands_behind_a_packed_part_is_never_dropped(tmp_path: Path, packed: str, name: str) -> None:
    whole = PACKED[packed](LINES)
    for rest in (b"a download that was joined wrongly", whole[1:], whole[:-4], whole[:3]):
        (tmp_path / f"a.jsonl{packed}").write_bytes(whole + rest)
        with pytest.raises(ValueError, match=f"not a whole {name} file"):
            read(tmp_path / f"a.jsonl{packed}")


@pytest.mark.parametrize("num_nuls", [4, 8, 1 << 17])
def test_padding_of_xz_is_no_data(tmp_path: Path, num_nuls: int) -> None:
    lines = LINES.splitlines(keepends=True)
    (tmp_path / "a.jsonl.xz").write_bytes(
        lzma.compress(lines[0]) + bytes(num_nuls) + lzma.compress(lines[1]) + bytes(4)
    )
    assert read(tmp_path / "a.jsonl.xz") == ROWS


def arrow_file(path: Path, new: Callable[..., Any]) -> Path:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return path


def test_arrow_files_and_streams(tmp_path: Path) -> None:
    assert read(arrow_file(tmp_path / "file.arrow", pa.ipc.new_file)) == ROWS
    assert read(arrow_file(tmp_path / "stream.arrow", pa.ipc.new_stream)) == ROWS
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "wrong.jsonl")
    assert read(tmp_path / "wrong.jsonl") == ROWS


def test_one_object_is_a_row_only_where_it_holds_a_plain_value(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{\n "question": "Q",\n "answer": ["A"]\n}\n')
    assert read(tmp_path / "a.json") == [{"question": "Q", "answer": ["A"]}]
    (tmp_path / "a.json").write_text('{"rows": [{"question": "Q"}]}')
    with pytest.raises(ValueError, match=r"holds a dict with the keys \['rows'\]; write the rows as a list"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer.*git lfs pull"),
        ("a.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
        ("a.jsonl", b"<!DOCTYPE html><html>", "an HTML page"),
        ("a.csv", b"PK\x03\x04rest", "a zip archive; unpack it"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "UTF-16; convert it"),
        ("a.tsv", "abc\tb\n".encode("utf-16-be"), "UTF-16; convert it"),
        ("a.jsonl.zst", LINES, "not a whole zstd file"),
        ("a.jsonl.zst", zstd(LINES * 9)[:-9], "not a whole zstd file"),
        ("a.jsonl.xz", lzma.compress(LINES * 9)[:-9], "not a whole xz file"),
        ("a.jsonl.bz2", bz2.compress(LINES * 9)[:-9], "not a whole bzip2 file"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:40] + b"x" * 40, "not a whole gzip file"),
        ("a.jsonl", gzip.compress(LINES * 9, mtime=0)[:-9], "not a whole gzip file"),
        ("a.jsonl.gz", b"", "not a whole gzip file .empty"),
        ("a.jsonl.gz", gzip.compress(zstd(LINES), mtime=0), "is packed twice .zstd inside"),
        ("a.json.gz", gzip.compress(b"x" * 257 + b"ustar" + b"x" * 99, mtime=0), "an archive of files"),
        ("a.arrow", b"ARROW1\0\0 and no more", "not a whole arrow file"),
        ("a.arrow", b"", "not a whole arrow file"),
        ("a.csv", b"a,b,a\n1,2,3\n", "names 'a' more than once"),
        ("a.json", b'[{"a": 1},', "list is cut off"),
        ("a.json", b'[{"a": 1}', "list is cut off"),
        ("a.json", b'[{"a": 1}] x', "Extra data behind the list"),
        ("a.json", b'[{"a": "', "Unterminated string"),
        ("a.jsonl", b'{"a": 1}\n\0\0\0\0\n', "line 2: not JSON .NUL bytes.*on_bad_line: count"),
    ],
)
def test_what_is_no_whole_file_of_rows_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value) and len(str(caught.value)) < 600


def test_a_parquet_file_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    inner = pa.StructArray.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["role", "role"])
    turns = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), inner)
    parquet.write_table(pa.table({"messages": turns}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet: the header names 'role' more than once"):
        read(tmp_path / "b.parquet")
    parquet.write_table(pa.table([["x"], ["y"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="names 'text' more than once"):
        read(tmp_path / "a.parquet")


# Lines that hold no row

BAD = [
    b'{"question": "Q", "answer": "A"}',
    b'{"question": "Q", "answer": "cut o',
    b"\0\0\0\0\0\0",
    b'{"question": "\xff", "answer": "A"}',
    b'{"question": "Q", "answer": "A", "answer": "B"}',
    b'{"question": "Q", "answer": "A"}',
]


def stage(tmp_path: Path, source: DataSource, share: float = 1.0) -> Any:
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    config = DatasetStageConfig(kind="sft", data=DataSet(sources=(source,), max_malformed_share=share))
    context = StageContext(
        tmp_path / "out", tmp_path / "work", ComputeSettings(device="cpu", num_threads=1), lambda *args, **kwargs: None
    )
    return build_dataset(config, DatasetInputs(), context)[0]


def test_bad_lines_are_counted_where_the_recipe_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(BAD))
    stopping = DataSource(path=str(tmp_path / "a.jsonl"), format="question_answer")
    counting = stopping.model_copy(update={"on_bad_line": "count"})
    assert "on_bad_line" not in scientific(stopping) and scientific(counting)["on_bad_line"] == "count"
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2, column \d+: not JSON .*on_bad_line: count"):
        read(tmp_path / "a.jsonl")
    (report,) = stage(tmp_path, counting).sources
    assert (report.num_rows, report.num_malformed) == (6, 4)
    assert report.reasons == {
        "line is not JSON, or torn": 1,
        "line holds NUL bytes, as a crash leaves them": 1,
        "line is not UTF-8": 1,
        "an object names the key 'answer' twice, so one value would be lost": 1,
    }
    assert 'row 1: line is not JSON, or torn: \'{"question": "Q", "answer": "cut o\'' in report.examples


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_key_that_stands_twice_makes_one_row_malformed(tmp_path: Path, name: str) -> None:
    rows = ['{"a": 1}', '{"m": [{"role": "x", "role": "y"}]}', '{"a": 2}']
    (tmp_path / name).write_text("\n".join(rows) if name == "a.jsonl" else f"[{', '.join(rows)}]")
    first, broken, last = read(tmp_path / name)
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert isinstance(broken, BrokenRow) and "'role' twice" in broken.reason


def test_cells_without_a_column_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2\n1,2,3\n")
    assert [type(row) for row in read(tmp_path / "a.csv", on_bad_line="count")] == [dict, BrokenRow]


@pytest.mark.parametrize(
    ("data", "kinds", "message"),
    [
        (b'a,b\n1,2\n3,"torn', [dict, BrokenRow], "line 3: not CSV"),
        (b'a,b\n"1"x,2\n3,4\n', [BrokenRow, dict], "line 2: not CSV"),
        (b"a,b,c\n1,2,3\n4,5", [dict, BrokenRow], "line 3: line is torn"),
        (b"a,b\n1,2\n\0\0\0\0", [dict, BrokenRow], "line 3: line holds NUL bytes"),
        (b"a,b\n1,\xff\n3,4\n", [BrokenRow, dict], "not UTF-8"),
        # a quote that never ends: each line that it took along counts
        (b'a,b\n1,2\n3,"x\n4,5\n6,7\n', [dict, BrokenRow, BrokenRow, BrokenRow], "not CSV"),
        # last cells that are left out in other rows too, and where the line has an end
        (b"a,b,c\n1,2\n4,5", [dict, dict], ""),
        (b"a,b\n1,2\n3\n", [dict, dict], ""),
    ],
)
def test_lines_of_csv_that_hold_no_row(tmp_path: Path, data: bytes, kinds: list[type], message: str) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    assert [type(row) for row in read(tmp_path / "a.csv", on_bad_line="count")] == kinds
    if message:
        with pytest.raises(ValueError, match=f"{message}.*on_bad_line: count"):
            read(tmp_path / "a.csv")
    else:
        assert len(read(tmp_path / "a.csv")) == len(kinds)


def test_long_lines_and_bombs_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line, and an element of a list, that never ends: 64 MB of it in 64 kB."""
    import tracemalloc

    bomb = tmp_path / "a.jsonl.gz"
    with gzip.open(bomb, "wb") as stream:
        stream.write(b'{"a": 1}\n{"a": "')
        for _ in range(64):
            stream.write(b"x" * 1_000_000)
        stream.write(b'"}\n{"a": 2}\n')
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 1 << 20)
    tracemalloc.start()
    with pytest.raises(ValueError, match="line 2: line is longer than 1 MiB"):
        read(bomb)
    rows = read(bomb, on_bad_line="count")
    assert rows == [{"a": 1}, BrokenRow("line is longer than 1 MiB", ""), {"a": 2}]
    (tmp_path / "b.json").write_bytes(b'[{"a": 1}, {"a": "' + b"x" * 8_000_000)
    with pytest.raises(ValueError, match="a value is longer than 1 MiB"):
        read(tmp_path / "b.json")
    assert tracemalloc.get_traced_memory()[1] < 24_000_000
    tracemalloc.stop()


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(_json, max_size=5), st.sampled_from([None, 0, 2]), st.booleans(), st.integers(1, 9))
def test_a_list_is_read_as_json_reads_it(values: list[Any], indent: int | None, escapes: bool, chunk: int) -> None:
    """However it is written, and wherever the chunks are cut."""
    import io

    text = json.dumps(values, indent=indent, ensure_ascii=escapes).encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_CHUNK_BYTES", chunk)
        assert list(json_rows.read_json_list("x", io.BufferedReader(io.BytesIO(text)))) == values  # type: ignore[arg-type]


@given(st.binary(max_size=60), st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.arrow", "a.parquet"]))
def test_any_bytes_give_rows_or_a_clear_error(tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    for on_bad_line in ("stop", "count"):
        try:
            list(read_file(path, on_bad_line))  # type: ignore[arg-type]
        except ValueError as error:
            assert name in str(error)


# Folders


def shard(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tree(root: Path, *names: str) -> Path:
    """A file of one row, which is its own name, at each place."""
    for name in names:
        shard(root / name, [{"text": name}])
    return root


def texts(path: Path, **rest: Any) -> list[str]:
    return [row["text"] for row in read(path, **rest)]


TREES = [
    ["train.jsonl", "test.jsonl"],
    ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"],
    ["data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"],
    ["data/train-00000-of-00001.jsonl", "more.jsonl"],
    ["train/a.jsonl", "train/b/c.jsonl", "dev/a.jsonl"],
    ["my-train-set/a.jsonl", "validation_2/b.jsonl", "c.jsonl"],
    ["gsm8k_test.jsonl", "gsm8k_train.jsonl", "rows.jsonl"],
    ["a.jsonl", "b/c.jsonl"],
    ["latest.jsonl", "trainer.jsonl", "contest-1.jsonl"],
    ["eval.jsonl", "evaluation 1.jsonl", "training.jsonl", "testing_x.jsonl", "valid.jsonl", "val-1.jsonl"],
    ["train_test.jsonl", "x.jsonl"],
    ["Train.jsonl", "TEST.jsonl"],
]


@pytest.mark.parametrize("names", TREES, ids=lambda names: names[0])
def test_splits_are_those_that_datasets_finds(tmp_path: Path, names: list[str]) -> None:
    from datasets.data_files import DataFilesDict, get_data_patterns

    patterns = get_data_patterns(str(tree(tmp_path, *names)))
    theirs = {
        str(split): tuple(sorted(str(Path(file).relative_to(tmp_path)) for file in files))
        for split, files in DataFilesDict.from_patterns(patterns, str(tmp_path)).items()
    }
    assert splits_of(sorted(names)) == theirs


def test_a_folder_of_several_splits_needs_one(tmp_path: Path) -> None:
    names = ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl")
    tree(tmp_path, *names)
    with pytest.raises(ValueError, match=r"several splits: train \(2 files\), test \(1 file\); say which with `split`"):
        read(tmp_path)
    assert texts(tmp_path, split="train") == list(names[:2])
    assert texts(tmp_path, split="test") == [names[2]]
    assert texts(tmp_path, split="train+test") == list(names)
    assert texts(tmp_path, split="all") == [names[2], *names[:2]]
    assert texts(tmp_path, split="train[1:]") == [names[1]]
    with pytest.raises(ValueError, match=r"no split 'validation'; there is: train \(2 files\), test"):
        read(tmp_path, split="validation")
    with pytest.raises(ValueError, match="split 'train\\[x\\]' is none"):
        read(tmp_path, split="train[x]")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["Train/a.jsonl", "Test/a.jsonl"], r"train \(1 file\), test"),
        (["TRAIN-1.jsonl", "TEST-1.jsonl"], r"train \(1 file\), test"),
        (["rows/a.jsonl", "Held-out/a.jsonl"], r"train \(1 file\), held_out"),
        (["rows.jsonl", "held_out.jsonl"], r"train \(1 file\), held_out"),
        (["train.jsonl", "test.jsonl", "math-holdout-1.jsonl"], "train .*, test .*held_out"),
    ],
)
def test_a_folder_of_several_splits_needs_one_however_they_are_written(
    tmp_path: Path, names: list[str], said: str
) -> None:
    with pytest.raises(ValueError, match=f"several splits: {said}"):
        read(tree(tmp_path, *names))
    assert texts(tmp_path, split="train") == names[:1]


def test_a_split_of_a_path_is_never_ignored(tmp_path: Path) -> None:
    tree(tmp_path, "rows.jsonl", "more.jsonl", "gsm8k_test.jsonl")
    assert texts(tmp_path / "rows.jsonl", split="train") == ["rows.jsonl"]
    assert texts(tmp_path / "gsm8k_test.jsonl") == texts(tmp_path / "gsm8k_test.jsonl", split="test")
    for name, split, there in (("rows.jsonl", "test", "train"), ("gsm8k_test.jsonl", "train", "test")):
        with pytest.raises(ValueError, match=rf"no split '{split}'; there is: {there}"):
            read(tmp_path / name, split=split)
    with pytest.raises(ValueError, match=r"test \(1 file\), and 2 of no split, e\.g\. 'more\.jsonl'"):
        read(tmp_path)
    with pytest.raises(ValueError, match="no configurations; remove subset: x"):
        read(tmp_path / "rows.jsonl", subset="x")
    (tmp_path / "gsm8k_test.jsonl").unlink()
    with pytest.raises(ValueError, match="no card"):
        read(tmp_path, subset="x")


def test_a_source_without_a_split_keeps_its_key() -> None:
    keyed = scientific(DataSource(path="x.jsonl", format="messages"))
    assert keyed["split"] == "train"
    assert keyed == scientific(DataSource(path="x.jsonl", format="messages", split="train"))


def test_nested_shards_beside_marks_and_checksums(tmp_path: Path) -> None:
    names = ["a.jsonl", "b/a.jsonl", "b/c/d.jsonl", "c.jsonl"]
    tree(tmp_path, *names)
    beside = [
        "_SUCCESS",
        "_metadata",
        ".part.crc",
        "a.jsonl.sha256",
        "SHA256SUMS",
        "md5sums.txt",
        "LICENSE",
        "notes.md",
    ]
    for name in [*beside, "b/_SUCCESS", "__pycache__/x.pyc", "dataset_infos.json"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert texts(tmp_path) == names
    first = source_digest(DataSource(path=str(tmp_path), format="text"))
    (tmp_path / "b" / "a.jsonl").rename(tmp_path / "b" / "e.jsonl")
    assert source_digest(DataSource(path=str(tmp_path), format="text")) != first
    (tmp_path / "b" / "c" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"unsupported file 'b/c/notes\.txt'"):
        read(tmp_path)


def test_data_is_never_taken_for_notes_or_marks(tmp_path: Path) -> None:
    names = ["_part.jsonl", "_x/a.jsonl", "checksum.jsonl", "citation.csv", "notice.ndjson"]
    tree(tmp_path, *names, "_temporary/0/a.jsonl", "_info.json", "checksums.json")
    (tmp_path / "citation.csv").write_text("text\ncitation.csv\n")
    assert texts(tmp_path) == names


def test_a_nested_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    tree(tmp_path, "a/b.jsonl", "a/c.jsonl")
    source = DataSource(path=str(tmp_path), format="text")
    rows = read_rows(source, digest=source_digest(source))
    next(rows)
    shard(tmp_path / "a" / "d.jsonl", [{"text": "new"}])
    with pytest.raises(ValueError, match="changed while the run went on"):
        list(rows)


def test_links(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree(tmp_path, "blobs/1.jsonl", "data/a.jsonl")
    (tmp_path / "data" / "b.jsonl").symlink_to(tmp_path / "blobs" / "1.jsonl")
    assert texts(tmp_path / "data") == ["data/a.jsonl", "blobs/1.jsonl"]
    assert "1 of its files are links to places outside of the folder" in caplog.text
    (tmp_path / "data" / "c").symlink_to(tmp_path / "data")
    with pytest.raises(ValueError, match="'c' is a link to another folder"):
        read(tmp_path / "data")
    (tmp_path / "data" / "c").unlink()
    (tmp_path / "data" / "d.jsonl").symlink_to(tmp_path / "none")
    with pytest.raises(ValueError, match=r"'d\.jsonl' is a link to a file that does not exist"):
        read(tmp_path / "data")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    with pytest.raises(ValueError, match=r"loop\.jsonl"):
        read(tmp_path / "loop.jsonl")


def test_odd_folders(tmp_path: Path) -> None:
    tree(tmp_path, "new\nline.jsonl", "x/_delta_log/0.json")
    with pytest.raises(ValueError, match="a table of Delta Lake or Iceberg"):
        read(tmp_path)
    (tmp_path / "x" / "_delta_log" / "0.json").unlink()
    (tmp_path / "x" / "_delta_log").rmdir()
    assert texts(tmp_path) == ["new\nline.jsonl"]
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        read(tmp_path)
    deep = tmp_path / "deep"
    tree(deep, "/".join("abcdefghijklmn") + "/x.jsonl")
    with pytest.raises(ValueError, match="more than 12 deep"):
        read(deep)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    tree(tmp_path, "a.jsonl").joinpath("a.jsonl").chmod(0)
    with pytest.raises(ValueError, match=r"a\.jsonl.*Permission denied"):
        read(tmp_path)


# Cards and saved data sets

CARD = """---
license: mit
configs:
- config_name: first
  data_files:
  - split: train
    path: one/*.jsonl
  - split: test
    path: [two/a.jsonl]
- config_name: second
  data_files: "two/*.jsonl"
---
# A data set
"""


def test_the_card_of_a_folder_is_honoured(tmp_path: Path) -> None:
    tree(tmp_path, "one/a.jsonl", "one/b.jsonl", "two/a.jsonl", "two/b.jsonl", "of_no_configuration.jsonl")
    (tmp_path / "README.md").write_text(CARD)
    with pytest.raises(ValueError, match="several configurations; say which with `subset`: first, second"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"several splits: train \(2 files\), test \(1 file\)"):
        read(tmp_path, subset="first")
    assert texts(tmp_path, subset="first", split="train") == ["one/a.jsonl", "one/b.jsonl"]
    assert texts(tmp_path, subset="first", split="test") == ["two/a.jsonl"]
    assert texts(tmp_path, subset="second") == ["two/a.jsonl", "two/b.jsonl"]
    with pytest.raises(ValueError, match="no configuration 'third'; subset may be first, second"):
        read(tmp_path, subset="third")
    (tmp_path / "README.md").write_text(CARD.replace("config_name: second", "config_name: default"))
    assert texts(tmp_path) == ["two/a.jsonl", "two/b.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("one/*.jsonl", "../*.jsonl"), "outside of the folder"),
        (("one/*.jsonl", "/etc/*.jsonl"), "outside of the folder"),
        (("one/*.jsonl", "https://host/x.jsonl"), "outside of the folder"),
        (("one/*.jsonl", "none/*.jsonl"), "no file is called so"),
        (("- split: train\n    path: one/*.jsonl", "- split: [train"), "README.md cannot be read"),
        (("config_name: first", "config_name: first\n  sep: ;"), "sets sep, which is not read here"),
        (("config_name: first", "config_name: first\n  data_dir: ../x"), "outside of the folder"),
    ],
)
def test_a_card_that_leads_elsewhere_is_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    tree(tmp_path / "set", "one/a.jsonl", "two/a.jsonl")
    tree(tmp_path, "x.jsonl", "x/x.jsonl")
    assert change[0] in CARD
    (tmp_path / "set" / "README.md").write_text(CARD.replace(*change))
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "set", subset="first", split="train")


def test_a_data_set_that_save_to_disk_wrote(tmp_path: Path) -> None:
    import datasets

    rows = [{"text": str(n), "messages": [{"role": "user", "content": "Q"}]} for n in range(5)]
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert read(tmp_path / "one") == rows
    whole.select([4, 0]).save_to_disk(str(tmp_path / "picked"))
    assert texts(tmp_path / "picked") == ["4", "0"]
    both = datasets.DatasetDict({"train_sft": whole, "test_sft": whole.select([1])})
    both.save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ValueError, match=r"train_sft \(1 file\), test_sft \(1 file\); say which"):
        read(tmp_path / "both")
    assert texts(tmp_path / "both", split="test_sft") == ["1"]
    assert texts(tmp_path / "both", split="train_sft[:2]") == ["0", "1"]
    # Results that `datasets` keeps in such a folder are no rows, in a folder of several either.
    (tmp_path / "one" / "cache-0123.arrow").write_bytes(
        (tmp_path / "picked" / "data-00000-of-00001.arrow").read_bytes()
    )
    (tmp_path / "all").mkdir()
    (tmp_path / "one").rename(tmp_path / "all" / "one")
    assert read(tmp_path / "all") == rows
    (tmp_path / "all" / "one").rename(tmp_path / "one")
    state = json.loads((tmp_path / "one" / "state.json").read_text())
    state["_data_files"][0]["filename"] = "../both/train_sft/data-00000-of-00001.arrow"
    (tmp_path / "one" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="outside of the folder"):
        read(tmp_path / "one")


def test_plan_reads_no_datasets_for_a_plain_folder(tmp_path: Path) -> None:
    tree(tmp_path, "train-1.jsonl", "train-2.jsonl")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    code = (
        "import sys; from smoltulu.schemas.data import DataSource;"
        "from smoltulu.tasks.data.sources import source_digest;"
        f"source_digest(DataSource(path={str(tmp_path)!r}, format='text'));"
        "print([n for n in ('torch', 'datasets', 'pyarrow', 'huggingface_hub') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr
