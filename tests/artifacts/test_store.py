"""Keys and the store: identity, commit, lock, damage, staleness."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from smoltulu.artifacts.checkpoints import CHECKPOINT_MARKER, mark_complete, newest_checkpoint, prune, torn_checkpoints
from smoltulu.artifacts.keys import artifact_key, folder_records, records_digest
from smoltulu.artifacts.nearest import SpecIndex
from smoltulu.artifacts.store import Found, Missing, Store
from smoltulu.schemas.artifact import InputRecord, Manifest, Spec


def spec(**config: object) -> Spec:
    return Spec(stage="sft", version=1, config=dict(config), inputs={"model": "a" * 64}, externals={})


def commit(store: Store, wanted: Spec, text: str = "weights", inputs: dict[str, InputRecord] | None = None) -> Found:
    with store.producer(wanted, lambda whom: None) as folder:
        return commit_held(store, folder, wanted, text, inputs)


def commit_held(
    store: Store, folder: Path, wanted: Spec, text: str = "weights", inputs: dict[str, InputRecord] | None = None
) -> Found:
    """`commit` by who holds the producer's lock."""
    output = folder / "work" / "output"
    output.mkdir(parents=True)
    (output / "model.txt").write_text(text)
    return store.commit(
        wanted,
        output,
        lambda files, digest: Manifest(
            key=artifact_key(wanted), spec=wanted, digest=digest, inputs=inputs or {}, outputs={}, metrics={},
            files=files, environment={}, node="sft", started_at="", finished_at="", duration_seconds=0,
        ),
    )  # fmt: skip


def test_key_is_the_same_in_another_process_with_another_hash_seed() -> None:
    code = (
        "from smoltulu.schemas.artifact import Spec; from smoltulu.artifacts.keys import artifact_key;"
        "print(artifact_key(Spec(stage='sft', version=1, config={'b': 1e-4, 'a': 2.0}, inputs={}, externals={})))"
    )
    keys = {
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, text=True,
                       capture_output=True, check=True).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    # Pinned: a changed value means that every stored artifact of every user would be lost from sight.
    assert keys == {"46892d30e6f645e2247093b5ebf4426d44279f7305920dcfea6e90a82faae09a\n"}


def test_commit_then_find(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.find(spec(lr=1)) == Missing("never made")
    made = commit(store, spec(lr=1))
    found = store.find(spec(lr=1.0))
    assert isinstance(found, Found) and found == made
    assert found.folder.name == "gen-0001" and not (found.folder.parent / "work").exists()
    assert found.manifest.files["model.txt"].size == 7
    assert found.manifest.digest == records_digest({"model.txt": found.manifest.files["model.txt"]})
    assert isinstance(store.find(spec(lr=2)), Missing)


def test_made_again_is_a_new_generation(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = commit(store, spec())
    second = commit(store, spec(), "other weights")
    assert (first.folder.name, second.folder.name) == ("gen-0001", "gen-0002")
    assert store.find(spec()) == second and first.folder.exists()


def test_stale_when_an_input_was_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    commit(store, spec(), inputs={"model": InputRecord(stage="base_model", key="k", digest="old")})
    assert isinstance(store.find(spec(), {"model": "old"}), Found)
    missing = store.find(spec(), {"model": "new"})
    assert isinstance(missing, Missing) and "stale: its input model was made again" in missing.reason


def test_every_kind_of_damage_is_a_miss_with_its_reason(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def reason() -> str:
        missing = store.find(spec())
        assert isinstance(missing, Missing)
        return missing.reason

    generation = commit(store, spec()).folder
    (generation / "model.txt").write_text("short")
    assert "model.txt has 5 bytes instead of 7" in reason()
    (generation / "model.txt").unlink()
    assert "model.txt is gone" in reason()
    (generation / "model.txt").write_text("weights")
    manifest = generation / "manifest.json"
    whole = manifest.read_text()
    # A flipped byte that leaves it readable: no file digest covers metrics, outputs and times.
    manifest.write_text(whole.replace('"node": "sft"', '"node": "dpo"'))
    assert "unreadable manifest" in reason()
    manifest.write_text(whole[: len(whole) // 2])
    assert "unreadable manifest" in reason()
    manifest.write_text(json.dumps({**json.loads(whole), "schema_version": 99, "new_field": 1}))
    assert "format 99, written by a newer smoltulu" in reason()
    manifest.unlink()
    assert "no manifest" in reason()
    (generation.parent / "current").write_text("../../../etc")
    assert "damaged" in reason()


def test_flipped_byte_is_found_by_verify_and_set_aside(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = commit(store, spec())
    assert store.verify(made) == []
    (made.folder / "model.txt").write_text("weighty")
    found = store.find(spec())
    assert isinstance(found, Found) and store.verify(found) == ["model.txt has other bytes than were written"]
    (made.folder / "extra.txt").write_text("x")
    assert store.verify(found)[1:] == ["extra.txt is not in the manifest"]
    aside = store.quarantine(found.folder.parent, found.folder.name, "model.txt differs")
    assert (aside / "reason.txt").read_text() == "model.txt differs\n"
    assert store.find(spec()) == Missing("gen-0001 was set aside: model.txt differs")
    # The name is not given again, or a reader of the old one could take the new one for it.
    assert commit(store, spec()).folder.name == "gen-0002"


def test_an_older_generation_does_not_slip_into_the_place_of_a_damaged_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    commit(store, spec())
    second = commit(store, spec(), "other weights")
    store.quarantine(second.folder.parent, second.folder.name, "flipped")
    with store.producer(spec(), lambda whom: None):
        assert isinstance(store.find(spec()), Missing)


def test_left_over_work_of_a_committed_generation_is_not_gone_on_from(tmp_path: Path) -> None:
    """Killed between commit and clean-up: a refresh must train again, not copy the last checkpoint."""
    store = Store(tmp_path)
    with store.producer(spec(), lambda whom: None) as folder:
        work = store.open_work(folder, {})
        (work / "checkpoints" / "checkpoint-1").mkdir()
        assert store.open_work(folder, {}) == work and (work / "checkpoints" / "checkpoint-1").exists()
        (folder / "gen-0001").mkdir()
        assert list((store.open_work(folder, {}) / "checkpoints").iterdir()) == []


def test_work_made_from_another_content_is_not_gone_on_from(tmp_path: Path) -> None:
    """A training that was killed at step 15 went on from there with other rows, and the manifest named only those."""
    store, said = Store(tmp_path), []
    rows, other = {"dataset": "a" * 64, "model": "b" * 64}, {"dataset": "c" * 64, "model": "b" * 64}

    def begin(digests: dict[str, str]) -> Path:
        return store.open_work(folder, digests, said.append) / "checkpoints" / "checkpoint-15"

    with store.producer(spec(), lambda whom: None) as folder:
        checkpoint = begin(rows)
        checkpoint.mkdir()
        (checkpoint / "weights").write_text("x")
        mark_complete(checkpoint)
        assert begin(rows).exists() and not said
        assert store.unfinished(spec(), rows) == (15, checkpoint) == store.unfinished(spec(), {"model": "b" * 64})
        assert store.unfinished(spec(), other) is None and store.unfinished(spec(), {"prompts": "d" * 64}) is None
        assert not begin(other).exists()
        assert said == [
            "its unfinished work was made from another content of dataset; it is removed, and the stage begins anew"
        ]
        # Cut off before it said what it was made from, or damaged since.
        for text in ("", "[]", "{"):
            begin(other).mkdir()
            (folder / "work" / "inputs.json").write_text(text)
            assert store.unfinished(spec(), {}) is None
            assert not begin(other).exists() and "does not say what it was made from" in said[-1]


def test_what_a_stage_logs_is_kept_and_checked_but_is_no_content(tmp_path: Path) -> None:
    digests = []
    for text in ("12 tokens/s", "14 tokens/s"):
        folder = tmp_path / text[:2]
        (folder / "logs").mkdir(parents=True)
        (folder / "logs" / "history.jsonl").write_text(text)
        (folder / "model.txt").write_text("weights")
        records = folder_records(folder)
        assert records.keys() == {"logs/history.jsonl", "model.txt"}
        digests.append(records_digest(records))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../b", ".", "a//b"])
def test_a_manifest_names_only_files_inside_its_folder(name: str) -> None:
    record = {"size": 1, "blake3": "0" * 64}
    with pytest.raises(ValueError, match="no plain relative path"):
        Manifest(key="k", spec=spec(), digest="d", inputs={}, outputs={}, metrics={}, files={name: record},
                 environment={}, node="sft", started_at="", finished_at="", duration_seconds=0)  # fmt: skip


def test_a_killed_producer_between_rename_and_pointer_loses_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = commit(store, spec())
    (made.folder.parent / "current").unlink()
    assert isinstance(store.find(spec()), Missing)
    with store.producer(spec(), lambda whom: None):
        assert store.find(spec()) == made


def test_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="is a link"):
        folder_records(tmp_path)


_HOLD = """
import sys, time
from smoltulu.artifacts.store import Store
from smoltulu.schemas.artifact import Spec
spec = Spec(stage="sft", version=1, config={}, inputs={"model": "a" * 64}, externals={})
with Store(sys.argv[1]).producer(spec, lambda whom: None):
    print("held", flush=True)
    time.sleep(60)
"""


def test_second_producer_waits_and_a_killed_holder_frees_the_lock_at_once(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        told: list[str] = []

        def waiting(whom: str) -> None:
            told.append(whom)
            holder.kill()

        with Store(tmp_path).producer(spec(), waiting):
            assert told == [f"process {holder.pid} on {os.uname().nodename}"]
    finally:
        holder.kill()
        holder.wait()


def test_a_writer_that_outlived_its_parent_keeps_the_key(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.producer(spec(), lambda whom: None) as folder:
        pass
    take = f"f = open({str(folder / 'writer')!r}, 'a'); fcntl.flock(f, fcntl.LOCK_SH)"
    code = f"import fcntl, time; {take}; print('held', flush=True); time.sleep(60)"
    orphan = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert orphan.stdout is not None and orphan.stdout.readline() == "held\n"
        told: list[str] = []

        def waiting(whom: str) -> None:
            told.append(whom)
            orphan.kill()

        with store.producer(spec(), waiting):
            assert told == ["a stage process that outlived its parent"]
    finally:
        orphan.kill()
        orphan.wait()


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    for step in (10, 20, 9):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "weights").write_text("x" * step)
        if step != 20:
            mark_complete(checkpoint)
    (tmp_path / "checkpoint-tmp").mkdir()
    assert newest_checkpoint(tmp_path) == (10, tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "weights").write_text("torn")
    assert newest_checkpoint(tmp_path) == (9, tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-9" / CHECKPOINT_MARKER).write_text("{")
    assert newest_checkpoint(tmp_path) is None
    assert [(step, reason) for step, _, reason in torn_checkpoints(tmp_path)] == [
        (20, "it was not written to its end"),
        (10, "weights has 4 bytes instead of 10"),
        (9, "its completion marker is unreadable (ValidationError)"),
    ]


def test_retention_keeps_the_newest_and_the_best_and_leaves_the_torn(tmp_path: Path) -> None:
    scores = {10: -3.0, 20: -1.0, 30: -2.0, 40: None, 50: -1.5}
    for step, score in scores.items():
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "weights").write_text("x")
        mark_complete(checkpoint, score)
    (tmp_path / "checkpoint-60").mkdir()
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in (20, 40, 50, 60)]


def test_nearest_names_the_differing_fields(tmp_path: Path) -> None:
    store = Store(tmp_path)
    commit(store, spec(learning_rate=1e-4, seed=0))
    commit(store, spec(learning_rate=1e-3, seed=1))
    nearest = SpecIndex(store.root).ranked(spec(learning_rate=1e-4, seed=2).model_dump())[0]
    assert nearest.changes == {"config.seed": (0, 2)}
    assert nearest.key == artifact_key(spec(learning_rate=1e-4, seed=0))


def test_waiting_is_told_once_a_while_not_in_a_loop(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    told: list[float] = []
    try:

        def waiting(whom: str) -> None:
            told.append(time.monotonic())
            if len(told) == 1:
                threading.Timer(1.0, holder.kill).start()

        with Store(tmp_path).producer(spec(), waiting):
            assert len(told) == 1
    finally:
        holder.kill()
        holder.wait()
