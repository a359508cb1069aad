"""Reading sources: every kind of file, every way in which one can be broken, and content digests."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from smoltulu.schemas.data import DataSource
from smoltulu.tasks.data.hub import SourceUnavailable
from smoltulu.tasks.data.sources import expand_path, expand_text, read_rows, resolve_revision, source_digest
from tests import ROOT

ROWS = [{"text": "one, \u00e9"}, {"text": 'two "quoted"\nlines'}, {"text": "\u4e09"}]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write(path: Path, rows: list) -> Path:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if name.endswith(".jsonl"):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif name.endswith(".json"):
        text = json.dumps(rows, indent=1)
    else:
        text = "text\n" + "".join('"' + row["text"].replace('"', '""') + '"\n' for row in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def source(path: Path | str, **rest) -> DataSource:
    return DataSource(path=str(path), format="text", **rest)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet", "a.csv", "a.csv.gz"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    assert list(read_rows(source(path))) == ROWS
    assert list(read_rows(source(path, limit=2))) == ROWS[:2]


def test_folder_reads_files_in_name_order_and_skips_notes(tmp_path):
    write(tmp_path / "b.jsonl", ROWS[2:])
    write(tmp_path / "a.csv.gz", ROWS[:2])
    (tmp_path / "README.md").write_text("notes")
    (tmp_path / ".cache").mkdir()
    assert list(read_rows(source(tmp_path))) == ROWS
    assert list(read_rows(source(tmp_path, limit=1))) == ROWS[:1]


def test_generated_file_lies_in_the_world(tmp_path):
    write(tmp_path / "sft.jsonl", ROWS)
    generated = DataSource(generated="sft.jsonl", format="text")
    assert list(read_rows(generated, tmp_path)) == ROWS
    assert source_digest(generated, tmp_path) == source_digest(source(tmp_path / "sft.jsonl"))
    with pytest.raises(ValueError, match="no world stage"):
        read_rows(generated)


def test_rows_that_are_no_objects_are_passed_on(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "a"}\n\n[1]\n3\n', encoding="utf-8")  # byte order mark, blank line
    assert list(read_rows(source(path))) == [{"text": "a"}, [1], 3]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl, line 2, column 7: not JSON"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"line 2: not UTF-8"),
        ("a.jsonl", b"1" * 5000, r"line 1: JSON that cannot be read"),
        ("a.jsonl", b"[" * 100_000, r"line 1, column 2: JSON that cannot be read"),
        ("a.json", b'[{"a": 1},\n {"a" 2}]', r"a\.json, line 2, column 7: not JSON"),
        ("a.json", b'{"data": []}', r"holds a dict with the keys \['data'\]"),
        ("a.json.gz", gzip.compress(b"[" + b'{"a": 1},' * 9000, mtime=0)[:-20], r"not a whole gzip file"),
        ("a.jsonl.gz", b'{"a": 1}\n', r"not a whole gzip file"),
        ("a.csv", b"a,b\n1,2,3\n", r"line 2: more cells than"),
        ("a.csv", b'a,b\n1,"2\n', r"not CSV"),
        ("a.parquet", b"PAR1 and no more", r"not a whole parquet file"),
        ("a.txt", b"text", r"unsupported file 'a\.txt'; allowed are \.jsonl"),
        ("a.parquet.gz", b"", r"unsupported file"),
    ],
)
def test_broken_files_are_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list(read_rows(source(tmp_path / name)))


def test_missing_file_shows_the_path_before_and_after_expansion(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(tmp_path))
    with pytest.raises(ValueError) as error:
        read_rows(source("${PLACE}/none.jsonl"))  # at once, not at the first row
    assert "${PLACE}/none.jsonl" in str(error.value) and str(tmp_path / "none.jsonl") in str(error.value)


def test_folders_without_usable_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the folder is empty"):
        read_rows(source(tmp_path))
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"unsupported file 'b\.txt'"):
        read_rows(source(tmp_path))


def test_expand_path(monkeypatch):
    monkeypatch.setenv("SET", "/data")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)
    assert expand_path("${SET}/a/${UNSET:-b}/${EMPTY:-c}.json") == Path("/data/a/b/c.json")
    assert expand_path("~/a") == Path.home() / "a"
    with pytest.raises(ValueError, match="UNSET is not set"):
        expand_path("${UNSET}/a")
    with pytest.raises(ValueError, match="write variables as"):
        expand_path("${SET/a")


@pytest.mark.parametrize(
    "text",
    [
        "${HF_TOKEN}",
        "http://host/${HF_TOKEN}",
        "/a/${hf_token}/b.jsonl",
        "${HF_TOKEN:-x}/b",
        "${UNSET:-${HF_TOKEN}}",
        "${COPY}/b",
        "${PART_1}${PART_2}",
        "/a/${URL}",
        "${AWS_SECRET_ACCESS_KEY}",
        "${WANDB_API_KEY}",
        "${AZURE_STORAGE_CONNECTION_STRING}",
        "s3://bucket/${LOOKS}",
    ],
)
def test_no_secret_comes_of_an_expansion(text, monkeypatch):
    for name, value in {
        "HF_TOKEN": "token-of-the-test-1",
        "hf_token": "x",
        "COPY": "a/token-of-the-test-1",
        "PART_1": "token-of-",
        "PART_2": "the-test-1",
        "URL": "https://me:pa55word@host/x",
        "LOOKS": "hf_abcdefghijklmnopqrst",
    }.items():
        monkeypatch.setenv(name, value)
    for expand in (expand_text, expand_path):
        with pytest.raises(ValueError, match=r"secret|write variables as") as caught:
            expand(text)
        assert not any(value in str(caught.value) for value in ("token-of-the", "pa55", "hf_abc"))


def test_a_name_that_no_file_system_takes_is_one_short_error(tmp_path):
    with pytest.raises(ValueError, match="has 3,000 bytes, file systems take 255") as caught:
        read_rows(source(tmp_path / ("a" * 3000)))
    assert len(str(caught.value)) < 400


def test_digest_follows_names_and_bytes_only(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        write(folder / "a.jsonl", ROWS)
        write(folder / "b.jsonl", ROWS[:1])
    first = source_digest(source(one))
    assert first.startswith("sha256:") and len(first) == 71
    assert first == source_digest(source(two)) == source_digest(source(two, limit=1))
    write(two / "b.jsonl", ROWS[:2])
    changed = source_digest(source(two))
    (one / "b.jsonl").rename(one / "c.jsonl")
    assert len({first, changed, source_digest(source(one))}) == 3


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub as names a commit; gated, missing and failing repositories answer as the real one does."""

    def do_GET(self):
        _, _, _, owner, name, _, revision = self.path.split("/", 6)
        code = {"gated": "GatedRepo", "none": "RepoNotFound"}.get(name)
        if code is None and revision not in ("main", "v1", "refs%2Fconvert%2Fparquet"):
            code = "RevisionNotFound"
        status = 503 if name == "down" else {None: 200, "GatedRepo": 403}.get(code, 404)
        body = json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": []} if status == 200 else {}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """The doubles are reached even where the environment keeps the tests off the real Hub."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def hub_source(name: str, revision: str = "main") -> DataSource:
    return DataSource(repository=f"owner/{name}", revision=revision, format="text")


def test_revisions_resolve_to_a_commit(hub):
    for revision in ("main", "v1", "refs/convert/parquet"):
        assert resolve_revision(hub_source("data", revision), hub) == COMMIT
    assert source_digest(hub_source("data"), endpoint=hub) == COMMIT


def test_a_full_commit_needs_no_hub():
    assert resolve_revision(hub_source("data", "f" * 40), "http://127.0.0.1:9") == "f" * 40


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("data", "v9", "no revision 'v9'"),
        ("none", "main", "not found: check the spelling"),
        ("gated", "main", "gated: accept its terms"),
        ("down", "main", "status 503"),
    ],
)
def test_what_the_hub_does_not_give_is_explained(hub, name, revision, message):
    with pytest.raises(SourceUnavailable, match=message):
        resolve_revision(hub_source(name, revision), hub)


def test_no_network_and_bad_names_are_explained():
    with pytest.raises(SourceUnavailable, match=r"cannot be reached.*check the network"):
        resolve_revision(hub_source("data"), "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="write owner/name"):
        resolve_revision(DataSource(repository="a/b/c", format="text"), "http://127.0.0.1:9")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A dataset repository's layout on disk, which load_dataset reads as it reads a clone from the Hub."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "repository"
    folder.mkdir()
    write(folder / "one.parquet", ROWS)
    write(folder / "two.parquet", ROWS[1:])
    configs = "".join(
        f"- config_name: {name}\n  data_files: [{{split: test, path: {name}.parquet}}]\n" for name in ("two", "one")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


def test_hub_subsets_and_limits(repository):
    def read(**rest):
        return list(read_rows(DataSource(repository=str(repository), revision="f" * 40, format="text", **rest)))

    assert read(subset="two", split="test") == ROWS[1:]
    assert read(subset="two", split="test", limit=1) == ROWS[1:2]
    assert read(subset="*", split="test", limit=2) == [*ROWS[:2], *ROWS[1:]]  # `limit` of each, in name order
    with pytest.raises(ValueError, match=r"split.*Give a `subset` and a `split`") as error:
        read(subset="two", split="train")
    assert not isinstance(error.value, SourceUnavailable)
    with pytest.raises(ValueError, match="Give a `subset`") as error:
        read(subset="three", split="test")
    assert not isinstance(error.value, SourceUnavailable)


def test_import_stays_light():
    code = (
        "import sys, smoltulu.tasks.data.sources; "
        "print([n for n in ('torch', 'datasets', 'pyarrow', 'huggingface_hub', 'prefect') "
        "if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
