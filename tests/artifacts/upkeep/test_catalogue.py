"""Reading a store, tagging, lineage, and the full check: on folders written by hand and by the real store."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from smoltulu.artifacts.keys import manifest_checksum
from smoltulu.artifacts.manifests import Ref, scores_of, sources_of
from smoltulu.artifacts.store import Found, Missing, Store
from smoltulu.artifacts.upkeep.catalogue import Catalogue, is_alive, state_of
from smoltulu.artifacts.upkeep.gc import Rules, plan_gc
from smoltulu.artifacts.upkeep.lineage import Relative, ancestors, descendants
from smoltulu.artifacts.upkeep.tags import remove_tag, set_tag
from smoltulu.artifacts.upkeep.verify import Finding, verify_artifacts, verify_tags
from smoltulu.schemas.artifact import Manifest
from smoltulu.schemas.run import RunRecord
from tests.hand_store import HandStore, pipeline


@pytest.fixture
def store(tmp_path: Path) -> HandStore:
    return HandStore(tmp_path / "store")


def check(store: HandStore, *, report_only: bool = True) -> dict[str, Finding]:
    """Findings that are not ok, by name of the generation or pointer."""
    catalogue = store.catalogue
    findings = verify_artifacts(catalogue, catalogue.refs, report_only=report_only)
    return {finding.name: finding for finding in findings if finding.status != "ok"}


def flattened(relatives: list[Relative]) -> list[Relative]:
    return [found for relative in relatives for found in (relative, *flattened(relative.relatives))]


# --- the catalogue reads what the store writes -------------------------------------------------------------------


def test_artifacts_by_hand_are_artifacts(store: HandStore) -> None:
    made = pipeline(store)
    for ref in made.values():
        found = Store(store.root).find(store.manifests[ref].spec)
        assert isinstance(found, Found) and found.manifest == store.manifests[ref]
    assert set(store.catalogue.refs) == set(made.values()) and store.catalogue.notes == []


@pytest.mark.parametrize(
    ("pointer", "there"),
    list(itertools.product([None, "gen-0001", "gen-0002", "gen-0003", "rubbish"], [(1,), (1, 2), ()])),
)
def test_the_generation_that_counts_is_the_one_that_the_store_takes(
    store: HandStore, pointer: str | None, there: tuple[int, ...]
) -> None:
    for content in ("first", "second"):
        ref = store.make("sft", "sft", content=content)
    folder = store.folder(ref)
    for number in {1, 2} - set(there):
        shutil.rmtree(folder / f"gen-{number:04d}")
    (folder / "current").unlink()
    if pointer is not None:
        (folder / "current").write_text(pointer)
    newest = store.catalogue.folder(ref).newest
    spec = store.manifests[ref].spec
    with Store(store.root).producer(spec, lambda whom: None):
        found = Store(store.root).find(spec)
    assert (found.folder.name if isinstance(found, Found) else None) == newest


def test_the_next_generation_is_the_one_that_work_is_for(store: HandStore) -> None:
    ref = store.make("sft", "sft")
    store.make("sft", "sft", content="second")
    Store(store.root).quarantine(store.folder(ref), "gen-0002", "bad")
    Store(store.root).open_work(store.folder(ref), {})
    wanted = store.catalogue.folder(ref).next_generation
    assert (store.folder(ref) / "work" / "generation").read_text() == wanted == "gen-0003"


def test_names_are_resolved(store: HandStore) -> None:
    made = pipeline(store)
    sft = made["sft"]
    run = store.run("first-run", made)
    store.tag("best", sft)
    catalogue = store.catalogue
    assert catalogue.resolve(sft.key) == catalogue.resolve(sft.key[:10]) == catalogue.resolve("best") == sft
    assert catalogue.resolve(f"sft/{sft.key[:6]}") == sft
    assert catalogue.resolve("first-run") == run
    for what, message in [
        ("abc", "too short"),
        ("0000ffff0000", "no key, tag or run"),
        (f"dpo/{sft.key[:6]}", "no key, tag or run"),
        ("frist-run", "did you mean 'first-run'"),
        ("../../etc/passwd", "no key, tag or run"),
    ]:
        with pytest.raises(ValueError, match=message):
            catalogue.resolve(what)


def test_an_ambiguous_key_lists_the_candidates(store: HandStore) -> None:
    for ending in ("0" * 56, "1" * 56):
        folder = store.root / "sft" / ("abcdef01" + ending)
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text("{}")
    with pytest.raises(ValueError, match=r"2 keys: sft/abcdef0100000000, sft/abcdef0111111111; give more digits"):
        store.catalogue.resolve("abcdef")


def test_no_store_is_said_clearly(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no store at .*nowhere: it does not exist; give --store"):
        Catalogue(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="it is a file"):
        Catalogue(tmp_path / "file")


def test_rubbish_is_noted_once(store: HandStore) -> None:
    made = pipeline(store)
    (store.root / "notes.txt").write_text("mine")
    (store.root / "sft" / "abc").mkdir()
    (store.root / "runs").mkdir()
    (store.root / "runs" / "bad.json").write_text("{")
    (store.root / "tags").mkdir()
    (store.root / "tags" / "bad.json").write_text('{"stage": "sft"}')
    (store.folder(made["sft"]) / "current").write_bytes(b"\xff\xfe")
    catalogue = store.catalogue
    for _ in range(2):
        assert set(catalogue.refs) == set(made.values())
        assert catalogue.runs() == [] and catalogue.tags() == {}
    assert catalogue.folder(made["sft"]).newest == "gen-0001"
    assert [note.partition(":")[0] for note in catalogue.notes] == [
        "notes.txt", "sft/abc", "runs/bad.json", "tags/bad.json",
    ]  # fmt: skip


# --- runs --------------------------------------------------------------------------------------------------------


def test_runs_come_newest_first_and_a_lost_one_is_seen(store: HandStore) -> None:
    sft = store.make("sft", "sft")
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    store.run("done", {"sft": sft}, started_at="2026-10-01T08:00:00+00:00")
    store.run("lost", {"sft": sft}, started_at="2026-10-03T08:00:00+00:00", state="Running", pid=child)
    # Our process began long after that run: the number was given again.
    store.run("reused", {"sft": sft}, started_at="2001-10-03T08:00:00+00:00", state="Running")
    store.run("goes-on", {"sft": sft}, started_at="2099-10-03T08:00:00+00:00", state="Running")
    store.run("far", {"sft": sft}, started_at="2026-10-02T08:00:00+00:00", state="Running", host="elsewhere")
    runs = store.catalogue.runs()
    assert [(run.run_name, state_of(run)) for run in runs] == [
        ("goes-on", "Running"),
        ("lost", "Crashed?"),
        ("far", "Running"),
        ("done", "Completed"),
        ("reused", "Crashed?"),
    ]
    assert [is_alive(run) for run in runs] == [True, False, None, False, False]


# --- tags --------------------------------------------------------------------------------------------------------


def test_tags_are_set_moved_and_removed(store: HandStore) -> None:
    made = pipeline(store)
    assert set_tag(store.catalogue, "best", made["sft"]) is None
    assert store.catalogue.resolve("best") == made["sft"]
    with pytest.raises(ValueError, match=r"names sft/.* already; give --move"):
        set_tag(store.catalogue, "best", made["dpo"])
    before = set_tag(store.catalogue, "best", made["dpo"], move=True)
    assert before is not None and before.key == made["sft"].key
    # gc must see that the whole lineage is wanted from now on.
    for node in ("dpo", "sft", "base-model"):
        assert store.catalogue.folder(made[node]).last_used > store.catalogue.folder(made["publish"]).last_used
    remove_tag(store.catalogue, "best")
    assert store.catalogue.tags() == {}
    with pytest.raises(ValueError, match="no tag 'best'; there: none"):
        remove_tag(store.catalogue, "best")


@pytest.mark.parametrize("name", ["", "a/b", "../x", "-x", ".hidden", "a b", "beef", "0123abcd", "x" * 101])
def test_bad_tag_names_are_refused(store: HandStore, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a tag"):
        set_tag(store.catalogue, name, store.make("sft", "sft"))


def test_only_finished_artifacts_are_tagged(store: HandStore) -> None:
    with pytest.raises(ValueError, match="not finished"):
        set_tag(store.catalogue, "best", store.begin("sft", "sft"))


# --- lineage -----------------------------------------------------------------------------------------------------


def test_lineage_down_to_the_sources_with_scores(store: HandStore) -> None:
    made = pipeline(store)
    catalogue = store.catalogue
    found = ancestors(catalogue, catalogue.manifest(made["publish"]))
    # Through the model, not once more through the publication's own list of ancestors.
    assert [(relative.binding, relative.ref) for relative in found] == [
        ("model", made["dpo"]),
        ("evaluations.evaluation-dpo", made["evaluation-dpo"]),
    ]
    by_ref = {relative.ref: relative for relative in flattened(found) if not relative.repeated}
    assert set(by_ref) == set(made.values()) - {made["publish"], made["evaluation-sft"]}
    assert [score["value"] for score in by_ref[made["dpo"]].scores] == [0.5]
    assert [score["value"] for score in by_ref[made["sft"]].scores] == [0.25]
    assert by_ref[made["dataset-sft"]].sources == [f"allenai/tulu @ {'a' * 40} (train)"]
    assert by_ref[made["base-model"]].sources == [f"org/base @ {'b' * 40}"]
    assert [relative.ref for relative in flattened(found) if relative.repeated] == [made["dataset-sft"], made["dpo"]]
    assert not any(relative.mark for relative in flattened(found))


def test_what_was_made_from_it(store: HandStore) -> None:
    made = pipeline(store)
    catalogue = store.catalogue
    unfinished = store.begin("rlvr", "rlvr", {"model": made["dpo"]})
    found, num_left = descendants(catalogue, made["sft"])
    assert num_left == 0 and [relative.ref.stage for relative in found] == ["dpo", "evaluation"]
    assert [(relative.ref, relative.mark) for relative in found[0].relatives] == [
        (made["evaluation-dpo"], ""),
        (made["publish"], ""),
        (unfinished, "not finished"),
    ]
    assert found[1].scores[0]["value"] == 0.25
    few, num_left = descendants(store.catalogue, made["sft"], limit=2)
    assert len(flattened(few)) == 2 and num_left == 3
    # An evaluation is named by the publication that shows it.
    assert [relative.ref for relative in descendants(catalogue, made["evaluation-dpo"])[0]] == [made["publish"]]


def test_stale_inputs_are_marked(store: HandStore) -> None:
    made = pipeline(store)
    old_digest = store.manifests[made["base-model"]].digest
    store.make("base_model", "base-model", content="again", repository="org/base", revision="b" * 40)

    def marks() -> dict[Ref, str]:
        catalogue = store.catalogue
        return {r.ref: r.mark for r in flattened(ancestors(catalogue, catalogue.manifest(made["sft"])))}

    assert old_digest != store.manifests[made["base-model"]].digest
    assert marks()[made["base-model"]] == "stale: made again since; this is gen-0001"
    assert marks()[made["dataset-sft"]] == ""
    found, _ = descendants(store.catalogue, made["base-model"])
    assert [(relative.ref, relative.mark) for relative in found] == [(made["sft"], "made from an earlier content")]
    shutil.rmtree(store.folder(made["base-model"]) / "gen-0001")
    assert marks()[made["base-model"]] == "stale: made again since, and what was taken is gone"
    shutil.rmtree(store.folder(made["base-model"]))
    assert marks()[made["base-model"]] == "gone"


def test_scores_and_sources_of_odd_manifests_are_none() -> None:
    for manifest in ({}, {"outputs": 3}, {"outputs": {"scores": [1, {"value": "high"}]}, "spec": {"config": []}}):
        assert scores_of(manifest) == [] and sources_of(manifest) == []
    manifest = {"spec": {"config": {"path": "x"}, "externals": {"data.0": "abc"}}}
    assert sources_of(manifest) == ["data.0: abc"]


# --- the full check ----------------------------------------------------------------------------------------------


def test_a_sound_store_is_sound(store: HandStore) -> None:
    pipeline(store)
    assert check(store) == {} and verify_tags(store.catalogue) == []


def test_every_flipped_byte_of_content_is_found(store: HandStore) -> None:
    ref = store.make("sft", "sft", files={"model/weights.bin": "weights" * 50, "logs/diary.txt": "step 1", "empty": ""})
    generation = store.folder(ref) / "gen-0001"
    for name in ("model/weights.bin", "logs/diary.txt"):
        path = generation / name
        content = path.read_bytes()
        for position in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
            finding = check(store)["gen-0001"]
            assert finding.status == "damaged" and finding.faults == (f"{name} has other bytes than were written",)
        path.write_bytes(content)
    assert check(store) == {}


def test_what_else_is_damage(store: HandStore) -> None:
    ref = store.make("sft", "sft", files={"a.txt": "a", "b.txt": "b"})
    generation = store.folder(ref) / "gen-0001"
    manifest = generation / "manifest.json"
    whole = json.loads(manifest.read_text())

    def faults_with(**changes: object) -> str:
        if "checksum" not in changes and "metrics" not in changes:
            changes["checksum"] = manifest_checksum(Manifest.model_validate({**whole, **changes}))
        manifest.write_text(json.dumps({**whole, **changes}))
        text = "; ".join(check(store)["gen-0001"].faults)
        manifest.write_text(json.dumps(whole))
        return text

    assert faults_with(key="0" * 64) == "its manifest is that of another artifact"
    assert faults_with(digest="0" * 64) == "the file list in its manifest does not give its digest"
    other = {**whole["spec"], "config": {"name": "other"}}
    assert faults_with(spec=other) == "the spec in its manifest does not give its key"
    assert faults_with(metrics="none") == "its manifest is unreadable: metrics: Input should be an object"
    for checksum in ("", "0" * 64, False, None):
        assert "its manifest is unreadable" in faults_with(checksum=checksum)
    (generation / "extra.txt").write_text("x")
    assert check(store)["gen-0001"].faults == ("extra.txt is not in the manifest",)
    (generation / "extra.txt").unlink()
    manifest.write_text(manifest.read_text()[:-20])
    assert check(store)["gen-0001"].faults == ("its manifest is unreadable: it is not what was written",)
    manifest.unlink()
    assert check(store)["gen-0001"].faults == ("it has no manifest",)


def test_damage_is_set_aside_and_made_again(store: HandStore) -> None:
    ref = store.make("sft", "sft")
    (store.folder(ref) / "gen-0001" / "data.txt").write_text("other bytes")
    assert check(store)["gen-0001"].aside == ""
    assert (store.folder(ref) / "gen-0001").exists()
    aside = check(store, report_only=False)["gen-0001"].aside
    assert aside.startswith("set aside as damaged-gen-0001-")
    folder = store.folder(ref) / aside.removeprefix("set aside as ")
    assert "data.txt" in (folder / "reason.txt").read_text()
    missing = Store(store.root).find(store.manifests[ref].spec)
    assert isinstance(missing, Missing) and "set aside" in missing.reason
    # The pointer that still names it is as it should be: nothing is left to complain about.
    assert check(store) == {}


def test_what_is_in_use_is_not_set_aside(store: HandStore) -> None:
    ref = store.make("sft", "sft")
    (store.folder(ref) / "gen-0001" / "data.txt").write_text("other bytes")
    with open(store.folder(ref) / "lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert check(store, report_only=False)["gen-0001"].aside.startswith("left: in use by")
    assert (store.folder(ref) / "gen-0001").exists()


def test_another_format_is_left_alone(store: HandStore) -> None:
    ref = store.make("sft", "sft")
    manifest = store.folder(ref) / "gen-0001" / "manifest.json"
    for version in (1, 99):
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema_version": version, "new": 1}))
        assert check(store, report_only=False)["gen-0001"].status == "other version"
    assert manifest.exists()


def test_pointers_to_nothing(store: HandStore) -> None:
    lost, odd = store.make("sft", "lost"), store.make("dpo", "odd")
    store.tag("best", lost)
    shutil.rmtree(store.folder(lost) / "gen-0001")
    (store.folder(odd) / "current").write_text("../../etc")
    findings = {ref.stage: finding for ref in (lost, odd) for finding in _pointers(store, ref)}
    assert findings["sft"].faults == ("names gen-0001, which is gone",)
    assert findings["dpo"].faults == ("names '../../etc', which is no generation",)
    assert [finding.name for finding in verify_tags(store.catalogue)] == ["tags/best"]


def _pointers(store: HandStore, ref: Ref) -> list[Finding]:
    found = verify_artifacts(store.catalogue, [ref], report_only=False)
    return [finding for finding in found if finding.name == "current"]


def test_what_may_not_be_read_is_neither_sound_nor_damaged() -> None:
    with tempfile.TemporaryDirectory() as name:
        store = HandStore(Path(name) / "store")
        closed, folder = store.make("sft", "closed"), store.make("dpo", "folder")
        file = store.folder(closed) / "gen-0001" / "data.txt"
        file.chmod(0)
        store.folder(folder).chmod(0)
        Path(name).chmod(0o755)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65_534)  # root may read everything
            findings = check(store, report_only=False)
            plan = plan_gc(store.catalogue, Rules(keep_days=0, keep_runs=0))
        finally:
            os.seteuid(user)
        store.folder(folder).chmod(0o755)
        assert [(finding.status, finding.aside) for finding in findings.values()] == [("unreadable", "")]
        assert {removal.ref for removal in plan.removals} <= {closed}
        assert file.exists() and store.finished() == {closed, folder}


def test_a_run_record_of_a_newer_version_is_passed_over(store: HandStore) -> None:
    record = store.run("now", {})
    text = json.dumps({**record.model_dump(), "new_field": 1})
    (store.root / "runs" / "newer.json").write_text(text)
    catalogue = store.catalogue
    assert catalogue.runs() == [RunRecord.model_validate(record)]
    assert catalogue.notes == ["runs/newer.json: passed over, new_field: Extra inputs are not permitted"]
