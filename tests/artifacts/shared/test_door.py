"""A store with a shared one behind it: looks here, then there, makes once, shares. A machine is a local store."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from smoltulu.artifacts.keys import artifact_key
from smoltulu.artifacts.shared.door import SharedStore
from smoltulu.artifacts.shared.objects import RemoteError
from smoltulu.artifacts.shared.remote import Remote, RemoteArtifact
from smoltulu.artifacts.store import Found
from smoltulu.schemas.artifact import InputRecord
from tests.artifacts.test_store import commit, commit_held, spec

LOG = logging.getLogger("test")
SPEC = spec(lr=1)
INPUTS = {"model": "c" * 64}
RECORDS = {"model": InputRecord(stage="base_model", key="a" * 64, digest="c" * 64)}


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    found = Remote(str(tmp_path / "shared"), beat_seconds=0.2, stale_seconds=1.0)
    found.check()
    return found


def make(store: SharedStore, text: str = "weights", refresh: bool = False) -> tuple[Found, bool]:
    """The artifact of `SPEC`, and whether it was made here; as the runner does it."""
    with store.producer(SPEC, lambda whom: None) as folder:
        commit_here = partial(commit_held, store, folder, SPEC, text, RECORDS)
        return store.make_once(SPEC, INPUTS, "sft", LOG, refresh, commit_here)


def test_made_once_and_obtained_elsewhere(tmp_path: Path, remote: Remote, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    here, there = SharedStore(tmp_path / "a", remote), SharedStore(tmp_path / "b", remote)
    assert here.obtain(SPEC, INPUTS, "sft", LOG) is None and here.published(SPEC, INPUTS) is None
    made, is_new = make(here)
    assert is_new and "sft: is in the shared store" in caplog.text
    assert there.published(SPEC, INPUTS) == made.manifest and not there.folder(SPEC).exists()
    found = there.obtain(SPEC, INPUTS, "sft", LOG)
    assert found is not None and found.manifest == made.manifest and found.folder == there.folder(SPEC) / "gen-0001"
    assert there.find(SPEC, INPUTS) == found and there.verify(found) == []
    # Found here: the shared store is not asked.
    shutil.rmtree(tmp_path / "shared")
    assert there.obtain(SPEC, INPUTS, "sft", LOG) == found
    assert make(SharedStore(tmp_path / "c", remote))[1]


def test_what_was_made_from_another_content_is_made_again_and_refresh_too(
    tmp_path: Path, remote: Remote, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first, _ = make(SharedStore(tmp_path / "a", remote), "first")
    other = SharedStore(tmp_path / "b", remote)
    assert other.published(SPEC, {"model": "d" * 64}) is None
    assert other.obtain(SPEC, {"model": "d" * 64}, "sft", LOG) is None
    assert "made from inputs with another content" in caplog.text
    again, is_new = make(other, "second", refresh=True)
    assert is_new and again.manifest.digest != first.manifest.digest
    assert other.published(SPEC, INPUTS) == again.manifest


def test_who_waits_says_for_whom_and_takes_what_was_published(
    tmp_path: Path, remote: Remote, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    here, there = SharedStore(tmp_path / "a", remote), SharedStore(tmp_path / "b", remote)
    results: list[tuple[Found, bool]] = []
    thread = threading.Thread(target=lambda: results.append(make(there, "mine")))
    with here.producer(SPEC, lambda whom: None) as folder:

        def commit_late() -> Found:
            thread.start()
            deadline = time.monotonic() + 60
            while "sft: waiting for process" not in caplog.text:
                assert time.monotonic() < deadline, caplog.text
                time.sleep(0.02)
            return commit_held(here, folder, SPEC, "theirs", RECORDS)

        made, _ = here.make_once(SPEC, INPUTS, "sft", LOG, False, commit_late)
    thread.join()
    [(found, is_new)] = results
    assert not is_new and found.manifest == made.manifest and "which makes it" in caplog.text


def test_a_shared_store_that_fails_costs_no_result(
    tmp_path: Path, remote: Remote, caplog: pytest.LogCaptureFixture
) -> None:
    store = SharedStore(tmp_path / "a", remote)
    shutil.rmtree(tmp_path / "shared")
    (tmp_path / "shared").write_text("a file")
    with pytest.raises(RemoteError):
        store.published(SPEC, INPUTS)
    made, is_new = make(store)
    assert is_new and caplog.text.count("goes on without the shared store") == 2  # the look and the lease
    store.share(made, "sft", LOG)
    assert "not shared, tried again by the next run" in caplog.text
    (tmp_path / "shared").unlink()
    remote.check()
    store.share(made, "sft", LOG)
    assert isinstance(remote.find("sft", artifact_key(SPEC)), RemoteArtifact)


def test_one_that_can_only_be_read_is_taken_from(
    tmp_path: Path, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(SharedStore(tmp_path / "a", remote))
    monkeypatch.setattr(remote, "writable", False)
    assert not make(SharedStore(tmp_path / "b", remote))[1]
    shutil.rmtree(tmp_path / "shared" / "sft")
    made, is_new = make(SharedStore(tmp_path / "c", remote))
    assert is_new and not (tmp_path / "shared" / "sft").exists()
    SharedStore(tmp_path / "c", remote).share(made, "sft", LOG)
    assert not (tmp_path / "shared" / "sft").exists()


def test_nothing_is_published_twice_for_a_hit(tmp_path: Path, remote: Remote) -> None:
    store = SharedStore(tmp_path / "a", remote)
    made = commit(store, SPEC, inputs=RECORDS)
    for _ in range(2):
        store.share(made, "sft", LOG)
    turns = sorted(path.name for path in (tmp_path / "shared" / "sft" / made.manifest.key / "turns").glob("*.end"))
    assert turns == ["00000001.end"]
