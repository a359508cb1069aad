"""A recipe's stages over a shared store: made once, taken by the other machine, uploads made up for."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from smoltulu.artifacts.shared.door import SharedStore
from smoltulu.artifacts.shared.remote import Remote, RemoteArtifact
from smoltulu.artifacts.store import Found, Store
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.tasks.engine.runner import run_stage
from smoltulu.tasks.engine.stores import open_store
from tests.tasks.engine.test_runner import world_job

LOG = logging.getLogger("test")


@pytest.fixture
def shared(tmp_path: Path) -> Remote:
    remote = Remote((tmp_path / "shared").as_uri(), beat_seconds=0.2, stale_seconds=1.0)
    remote.check()
    return remote


def test_made_on_one_machine_taken_by_the_other(tmp_path: Path, shared: Remote) -> None:
    first = run_stage(world_job(), SharedStore(tmp_path / "a", shared), LOG)
    assert first.outcome == "Completed"
    second = run_stage(world_job(), SharedStore(tmp_path / "b", shared), LOG)
    assert second.outcome == "Cached" and second.digest == first.digest
    assert second.path == first.path.replace("/a/", "/b/")
    names = {path.name for path in Path(first.path).iterdir()}
    assert {path.name for path in Path(second.path).iterdir()} == names
    found = Store(tmp_path / "b").find(world_job().spec)
    assert isinstance(found, Found) and Store(tmp_path / "b").verify(found) == []


def test_an_artifact_that_is_only_here_is_shared_by_the_next_run(tmp_path: Path, shared: Remote) -> None:
    made = run_stage(world_job(), Store(tmp_path / "a"), LOG)
    assert not isinstance(shared.find("world", made.key), RemoteArtifact)
    assert run_stage(world_job(), SharedStore(tmp_path / "a", shared), LOG).outcome == "Cached"
    assert isinstance(shared.find("world", made.key), RemoteArtifact)


def test_damage_here_is_fixed_from_the_shared_store(
    tmp_path: Path, shared: Remote, caplog: pytest.LogCaptureFixture
) -> None:
    store = SharedStore(tmp_path / "a", shared)
    made = run_stage(world_job(), store, LOG)
    (Path(made.path) / "sft.jsonl").write_text("short")
    with caplog.at_level(logging.INFO):
        again = run_stage(world_job(), store, LOG)
    assert again.outcome == "Cached" and again.digest == made.digest and again.path != made.path
    assert "sft.jsonl has 5 bytes" in caplog.text and "set aside as damaged-gen-0001" in caplog.text


def test_damage_there_is_made_again_and_fixed_there(
    tmp_path: Path, shared: Remote, caplog: pytest.LogCaptureFixture
) -> None:
    made = run_stage(world_job(), SharedStore(tmp_path / "a", shared), LOG)
    largest = max((tmp_path / "shared" / "world" / made.key / "files").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[100] ^= 1
    largest.write_bytes(data)
    again = run_stage(world_job(), SharedStore(tmp_path / "b", shared), LOG)
    assert again.outcome == "Completed" and "damaged" in caplog.text
    shutil.rmtree(tmp_path / "b")
    assert run_stage(world_job(), SharedStore(tmp_path / "b", shared), LOG).outcome == "Cached"


def test_an_unreachable_shared_store_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    compute = ComputeSettings(store=str(tmp_path / "local"), remote=f"file://{tmp_path}/file/store")
    with pytest.raises(ValueError, match="shared store"):
        open_store(compute)
    # A plan says so in a note.
    assert isinstance(open_store(compute, checked=False), SharedStore)
    assert type(open_store(ComputeSettings(store=str(tmp_path / "local")))) is Store
    monkeypatch.setenv("SHARED", (tmp_path / "real").as_uri())
    store = open_store(ComputeSettings(store=str(tmp_path / "local"), remote="${SHARED}"))
    assert isinstance(store, SharedStore) and store.remote.url.endswith("/real")
    assert store.root == tmp_path / "local"


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    """Address of a web server on this machine, and the paths that it was asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("checked", [True, False])
def test_a_secret_in_the_address_of_a_shared_store_is_sent_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: tuple[str, list[str]], checked: bool
) -> None:
    address, paths = asked
    monkeypatch.setenv("HF_TOKEN", "token-of-the-test-1")
    monkeypatch.setenv("WHERE", f"{address}/token-of-the-test-1")
    for remote in (f"{address}/${{HF_TOKEN}}", "${WHERE}", f"{address}/token-of-the-test-1"):
        compute = ComputeSettings(store=str(tmp_path), remote=remote, allow_http=True)
        with pytest.raises(ValueError, match="secret") as caught:
            open_store(compute, checked=checked)
        assert "token-of-the-test-1" not in str(caught.value)
    assert paths == []
    # The same address without a secret is asked.
    store = open_store(ComputeSettings(store=str(tmp_path), remote=f"{address}/store"), checked=False)
    assert isinstance(store, SharedStore)
    assert not isinstance(store.remote.find("sft", "ab" * 32), RemoteArtifact) and paths


@pytest.mark.parametrize(
    "url",
    ["http://example.invalid/store", "HTTP://localhost.example.invalid/store", "ftp://host/x", "http://127.1.1/x"],
)
def test_a_shared_store_that_is_not_encrypted_is_asked_for(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match=r"is not encrypted.*compute\.allow_http: true"):
        open_store(ComputeSettings(store=str(tmp_path), remote=url), checked=False)
    store = open_store(ComputeSettings(store=str(tmp_path), remote=url, allow_http=True), checked=False)
    assert isinstance(store, SharedStore)


@pytest.mark.parametrize("url", ["http://localhost:9/x", "http://127.0.0.1/x", "https://host/x"])
def test_this_machine_and_https_need_no_word(tmp_path: Path, url: str) -> None:
    assert isinstance(open_store(ComputeSettings(store=str(tmp_path), remote=url), checked=False), SharedStore)
