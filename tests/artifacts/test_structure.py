"""Whatever shape a file of a store has: found and whole, missing with a reason, or one clear message; nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoltulu.artifacts import keys as keys_module
from smoltulu.artifacts.checkpoints import CHECKPOINT_MARKER, fault, mark_complete, newest_checkpoint, torn_checkpoints
from smoltulu.artifacts.keys import with_checksum
from smoltulu.artifacts.layout import look
from smoltulu.artifacts.manifests import Ref
from smoltulu.artifacts.nearest import SpecIndex, read_generation
from smoltulu.artifacts.shared.lease import Ending, _who
from smoltulu.artifacts.shared.objects import RemoteError, open_objects
from smoltulu.artifacts.shared.remote import Remote, RemoteArtifact
from smoltulu.artifacts.store import Found, Missing, Store
from smoltulu.artifacts.upkeep import verify as verify_module
from smoltulu.artifacts.upkeep.catalogue import Catalogue, state_of
from smoltulu.artifacts.upkeep.gc import Plan, Rules, plan_gc
from smoltulu.artifacts.upkeep.lineage import ancestors, descendants
from smoltulu.artifacts.upkeep.removal import remove
from smoltulu.artifacts.upkeep.tags import remove_tag, set_tag
from smoltulu.artifacts.upkeep.verify import Finding, verify_artifacts, verify_tags
from smoltulu.schemas.artifact import Manifest
from tests import any_json
from tests.artifacts.test_store import commit, spec
from tests.hand_store import HandStore

#: SMOLTULU_EXAMPLES=2000 looks for longer.
_FUZZ = settings(
    deadline=None, max_examples=int(os.environ.get("SMOLTULU_EXAMPLES", 20)), suppress_health_check=list(HealthCheck)
)


def one_line(text: str) -> bool:
    """A message for people: said in a line, and not longer than one reads."""
    return "\n" not in text and 0 < len(text) < 1500


def with_own_checksum(data: bytes) -> bytes:
    """The same manifest with the checksum that fits it, where there is one: who writes falsely can write that too."""
    try:
        return with_checksum(Manifest.model_validate_json(data)).model_dump_json().encode()
    except ValueError:
        return data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> HandStore:
    """A small experiment with a run, a tag and unfinished work."""
    store = HandStore(tmp_path_factory.mktemp("structure") / "store")
    base = store.make("base_model", "base-model", repository="org/base", revision="b" * 40)
    sft = store.make("sft", "sft", {"model": base})
    scored = store.evaluate(sft, 0.25)
    store.run("first-run", {"base-model": base, "sft": sft, "evaluation-sft": scored})
    store.tag("best", sft)
    store.pin("evaluation-sft", scored)
    store.checkpoint(store.begin("rlvr", "rlvr", {"model": sft}))
    return store


def look_everywhere(store: HandStore, root: Path) -> None:
    """Everything that reads a store. Only ValueError, with one clear message, may come of it."""
    real = Store(root)
    index = SpecIndex(root)
    for ref, manifest in store.manifests.items():
        found = real.find(manifest.spec)
        if isinstance(found, Found):
            assert real.verify(found) == [] and found.manifest.key == ref.key
        else:
            assert one_line(found.reason)
        real.unfinished(manifest.spec, {})
        for near in index.ranked({**manifest.spec.model_dump(), "version": 77}):
            read_generation(near.folder)
    catalogue = Catalogue(root)
    for run in catalogue.runs():
        state_of(run)
    for ref in catalogue.refs:
        catalogue.scores(ref)
        ancestors(catalogue, catalogue.known(ref))
        descendants(catalogue, ref)
        newest_checkpoint(root / ref.stage / ref.key / "work" / "checkpoints", full=True)
    plan = planned(catalogue, Rules())
    findings = list(verify_artifacts(catalogue, catalogue.refs, report_only=False))
    assert {finding.ref for finding in findings} >= set(store.manifests)
    verify_tags(catalogue)
    assert all(one_line(text) for text in catalogue.notes)
    if plan is not None:
        remove(plan_gc(Catalogue(root), Rules(keep_days=0, keep_runs=0)), root)


def planned(catalogue: Catalogue, rules: Rules) -> Plan | None:
    """What gc would remove; None where it says that it cannot read what nights need."""
    try:
        return plan_gc(catalogue, rules)
    except ValueError as error:
        assert one_line(str(error)) and re.search(r"(pins|told)\.json cannot be read, and gc would remove", str(error))
        return None


def each_copy(store: HandStore, where: Path) -> HandStore:
    """The same in a folder of its own; `store.manifests` names what was there."""
    shutil.rmtree(where, ignore_errors=True)
    shutil.copytree(store.root, where)
    return store


_FILES = ("manifest", "spec", "current", "run", "tag", "pins", "told", "lock", "marker", "work")


def file_of(root: Path, store: HandStore, kind: str) -> Path:
    sft = next(ref for ref in store.manifests if ref.stage == "sft")
    rlvr = next((root / "rlvr").iterdir())
    return {
        "manifest": root / sft.stage / sft.key / "gen-0001" / "manifest.json",
        "spec": root / sft.stage / sft.key / "spec.json",
        "current": root / sft.stage / sft.key / "current",
        "lock": root / sft.stage / sft.key / "lock",
        "run": root / "runs" / "first-run.json",
        "tag": root / "tags" / "best.json",
        "pins": root / "history" / "by-hand" / "pins.json",
        "told": root / "history" / "by-hand" / "told.json",
        "marker": rlvr / "work" / "checkpoints" / "checkpoint-10" / CHECKPOINT_MARKER,
        "work": rlvr / "work" / "generation",
    }[kind]


@pytest.mark.parametrize("kind", _FILES)
@_FUZZ
@given(data=st.data())
def test_any_content_of_any_file(kind: str, data: st.DataObject, made: HandStore, tmp_path: Path) -> None:
    root = tmp_path / "here"
    each_copy(made, root)
    file = file_of(root, made, kind)
    text = file.read_text()
    valid: Any = json.loads(text) if text.startswith("{") else text
    content = data.draw(any_json.texts(valid))
    if kind == "manifest" and data.draw(st.booleans()):
        content = with_own_checksum(content)
    file.write_bytes(content)
    look_everywhere(made, root)


@pytest.mark.parametrize("kind", _FILES)
@pytest.mark.parametrize("what", ["folder", "full folder", "pipe", "socket", "device", "link to nothing", "huge"])
def test_anything_in_the_place_of_any_file(kind: str, what: str, made: HandStore, tmp_path: Path) -> None:
    root = tmp_path / "here"
    each_copy(made, root)
    file = file_of(root, made, kind)
    file.unlink()
    put(what, file)
    look_everywhere(made, root)


def put(what: str, file: Path) -> None:
    """Something that is no file of ours, in its place."""
    if "folder" in what:
        file.mkdir()
        if what == "full folder":
            (file / "x").touch()
    elif what == "pipe":
        os.mkfifo(file)
    elif what == "socket":
        # By a short name: a socket's path has at most 107 bytes.
        with contextlib.chdir(file.parent):
            socket.socket(socket.AF_UNIX).bind(file.name)
    elif what == "device":
        file.symlink_to("/dev/zero")
    elif what == "link to nothing":
        file.symlink_to("/nonexistent/file")
    else:
        with file.open("wb") as sparse:
            sparse.truncate(1 << 40)


@pytest.mark.parametrize("kind", ["manifest", "spec", "current", "lock", "work", "generation", "key", "stage"])
@pytest.mark.parametrize("what", ["folder", "full folder", "file", "pipe", "link to nothing"])
def test_an_artifact_is_made_all_the_same_or_it_is_said_why_not(kind: str, what: str, tmp_path: Path) -> None:
    """Whatever has the place of one of its files: the next producer makes the artifact, or says what to move away."""
    store, wanted = Store(tmp_path / "store"), spec()
    before = commit(store, wanted)
    folder = store.folder(wanted)
    place = {"generation": before.folder, "manifest": before.folder / "manifest.json", "key": folder}
    place |= {"spec": folder / "spec.json", "work": folder / "work", "stage": folder.parent}
    file = place.get(kind, folder / kind)
    if file.is_dir():
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    if what == "file":
        file.write_text("")
    else:
        put(what, file)
    found = store.find(wanted)
    try:
        with store.producer(wanted, lambda whom: None) as held:
            if isinstance(found, Missing) and found.damaged:
                store.quarantine(held, found.damaged, found.reason)
            output = store.open_work(held, {}) / "output"
            output.mkdir(exist_ok=True)
            (output / "model.txt").write_text("again")
            made_again = store.commit(wanted, output, lambda files, digest: before.manifest.model_copy(
                update={"files": files, "digest": digest}))  # fmt: skip
    except ValueError as error:
        assert kind in ("lock", "key", "stage") and one_line(str(error)) and "move it away" in str(error)
        return
    assert store.find(wanted) == made_again and store.verify(made_again) == []
    assert [finding.status for finding in verify(store) if finding.ref.key == folder.name and finding.faults] == []


def verify(store: Store) -> list[Finding]:
    catalogue = Catalogue(store.root)
    return list(verify_artifacts(catalogue, catalogue.refs, report_only=True))


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    store, precious = Store(tmp_path / "store"), tmp_path / "precious.txt"
    precious.write_text("mine")
    folder = store.folder(spec())
    folder.mkdir(parents=True)
    (folder / "lock").symlink_to(precious)
    with pytest.raises(ValueError, match=r"lock is a link, not a file; nothing holds it: move it away"):
        commit(store, spec())
    assert precious.read_text() == "mine"


def test_the_checksum_is_no_choice(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = commit(store, spec())
    file = made.folder / "manifest.json"
    whole = json.loads(file.read_text())
    for checksum in ("", "0" * 64, False, None, 0, [], {}):
        file.write_text(json.dumps({**whole, "checksum": checksum, "metrics": {"loss": 0.0}}))
        missing = store.find(spec())
        assert isinstance(missing, Missing) and missing.damaged == "gen-0001" and one_line(missing.reason)
    del whole["checksum"]
    file.write_text(json.dumps(whole))
    missing = store.find(spec())
    assert isinstance(missing, Missing) and "it has no checksum" in missing.reason


def test_generations_go_by_number_not_by_text(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = commit(store, spec())
    folder = first.folder.parent
    first.folder.rename(folder / "gen-9999")
    (folder / "current").write_text("gen-9999")
    second = commit(store, spec(), "other weights")
    assert second.folder.name == "gen-10000" and store.find(spec()) == second
    # A kill between the rename and the pointer; then the pointer is lost altogether.
    for pointer in ("gen-9999", None):
        (folder / "current").unlink()
        if pointer:
            (folder / "current").write_text(pointer)
        assert look(folder).newest == "gen-10000"
        with store.producer(spec(), lambda whom: None):
            assert store.find(spec()) == second
    assert {finding.name: finding.status for finding in verify(store)} == {"gen-9999": "ok", "gen-10000": "ok"}
    # Spelled otherwise it is no generation, nor is what int() takes for a number.
    for name in ("gen-00001", "gen-١٢٣٤", "gen-" + "9" * 200):
        (folder / name).mkdir()
        (folder / "current").write_text(name)
        assert store.find(spec()) == Missing("pointer to the current generation is damaged")
    assert look(folder).next_generation == "gen-10001"
    (folder / f"gen-{10**18 - 1}").mkdir()
    with pytest.raises(ValueError, match="which no other can follow; move it away"):
        commit(store, spec())


def test_what_cannot_be_read_now_is_neither_damaged_nor_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails for a moment must cost neither the artifact nor the checkpoints of the next one."""
    store = Store(tmp_path)
    made = commit(store, spec())
    with store.producer(spec(), lambda whom: None) as folder:
        work = store.open_work(folder, {})
        (work / "checkpoints" / "checkpoint-1").mkdir()
        true_open, true_scan = os.open, os.scandir
        failing_names = ["work/generation", "manifest.json"]

        def failing(path: Any, *arguments: Any, **named: Any) -> int:
            if str(path).endswith(tuple(failing_names)):
                raise OSError(5, "Input/output error", str(path))
            return true_open(path, *arguments, **named)

        def failing_scan(path: Any) -> Any:
            raise OSError(5, "Input/output error", str(path))

        monkeypatch.setattr(os, "open", failing)
        missing = store.find(spec())
        assert isinstance(missing, Missing) and missing.damaged is None and "Input/output error" in missing.reason
        assert store.unfinished(spec(), {}) is None
        for name in ("work/generation", "work/inputs.json"):
            failing_names[:] = [name]
            with pytest.raises(OSError, match="Input/output error"):
                store.open_work(folder, {})
        monkeypatch.setattr(os, "open", true_open)
        monkeypatch.setattr(os, "scandir", failing_scan)
        with pytest.raises(OSError, match="Input/output error"):
            store.open_work(folder, {})
        monkeypatch.setattr(os, "scandir", true_scan)
        assert (store.open_work(folder, {}) / "checkpoints" / "checkpoint-1").is_dir()
    # Nor where every byte is read: before a stage begins, and by `verify`.
    (file,) = made.manifest.files
    for name, module in (("read_manifest", verify_module), ("file_digest", keys_module)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error", str(path))))
            (finding,) = verify_artifacts(Catalogue(tmp_path), Catalogue(tmp_path).refs, report_only=False)
        assert finding.status == "unreadable" and "Input/output error" in finding.faults[0], file
    assert store.find(spec()) == made


@pytest.mark.parametrize(
    "record", [{"stage": "../x"}, {"stage": "a/b"}, {"stage": ""}, {"key": "../../x"}, {"key": "K"}]
)
def test_a_tag_and_a_run_that_name_a_place_outside_the_store(
    record: dict[str, str], tmp_path: Path, made: HandStore
) -> None:
    """They lead nowhere: nothing outside is read, touched or set aside."""
    each_copy(made, tmp_path / "stores" / "here")
    root = tmp_path / "stores" / "here"
    for name, change in (("tags/best.json", record), ("runs/first-run.json", record)):
        values = json.loads((root / name).read_text())
        if "keys" in values:
            field = "stages" if "stage" in change else "keys"
            values[field] = {node: next(iter(change.values())) for node in values[field]}
        else:
            values |= change
        (root / name).write_text(json.dumps(values))
    outside = tmp_path / "stores" / "x" / ("0" * 64)
    outside.mkdir(parents=True)
    before = outside.stat().st_mtime_ns
    catalogue = Catalogue(root)
    assert catalogue.tags() == {} and catalogue.runs() == [] and len(catalogue.notes) == 2
    for what in ("best", "first-run"):
        with pytest.raises(ValueError, match="no key, tag or run"):
            catalogue.resolve(what)
    for ref in (Ref("../x", "0" * 64), Ref("sft", "../../x")):
        with pytest.raises(ValueError, match=r"is no name of a stage|is no key"):
            catalogue.path(ref)
    look_everywhere(made, root)
    assert outside.stat().st_mtime_ns == before and list(outside.iterdir()) == []


def test_a_manifest_whose_inputs_lead_outside(tmp_path: Path) -> None:
    store = HandStore(tmp_path / "store")
    sft = store.make("sft", "sft")
    file = store.folder(sft) / "gen-0001" / "manifest.json"
    values = json.loads(file.read_text())
    values["inputs"] = {"model": {"stage": "../..", "key": "x", "digest": "0"}}
    file.write_bytes(with_own_checksum(json.dumps(values).encode()))
    set_tag(store.catalogue, "best", sft)  # touches the lineage
    assert "is no name of a stage" in store.catalogue.generation(sft, "gen-0001").problem
    look_everywhere(store, store.root)


@pytest.mark.parametrize("what", ["folder", "pipe", "device"])
def test_records_that_are_no_files_are_passed_over(what: str, tmp_path: Path, made: HandStore) -> None:
    root = tmp_path / "here"
    each_copy(made, root)
    for name in ("tags/best.json", "runs/first-run.json"):
        (root / name).unlink()
        put(what, root / name)
    catalogue = Catalogue(root)
    assert catalogue.tags() == {} and catalogue.runs() == [] and len(catalogue.notes) == 2
    sft = next(ref for ref in made.manifests if ref.stage == "sft")
    if what == "folder":
        with pytest.raises(ValueError, match="is a folder; move it away"):
            set_tag(catalogue, "best", sft)
        with pytest.raises(ValueError, match="no tag 'best'"):
            remove_tag(catalogue, "best")


def test_stages_of_other_names_are_left_alone(tmp_path: Path) -> None:
    store = HandStore(tmp_path / "store")
    sft = store.make("sft", "sft")
    for name in ("my notes", "-x", "é", "a\nb", "x" * 200):
        (store.root / name / ("0" * 64)).mkdir(parents=True)
    assert store.catalogue.refs == [sft]
    look_everywhere(store, store.root)


def test_verify_goes_on_after_every_bad_one(tmp_path: Path) -> None:
    store = HandStore(tmp_path / "store")
    refs = [store.make("sft", f"sft-{number}") for number in range(6)]

    def manifest_of(number: int) -> Path:
        return store.folder(refs[number]) / "gen-0001" / "manifest.json"

    for number, name in ((0, "a\0b"), (1, "x" * 5000), (2, "data.txt/x")):
        values = json.loads(manifest_of(number).read_text())
        values["files"][name] = values["files"]["data.txt"]
        manifest_of(number).write_text(json.dumps(values))
    os.mkfifo(store.folder(refs[3]) / "gen-0001" / "pipe")
    (store.folder(refs[4]) / "gen-0001" / "data.txt").unlink()
    os.mkfifo(store.folder(refs[4]) / "gen-0001" / "data.txt")
    with open(os.fsencode(store.folder(refs[4]) / "gen-0001") + b"/\xff", "w"):
        pass
    findings = verify(Store(store.root))
    status = {finding.ref: finding.status for finding in findings}
    assert [status[ref] for ref in refs] == ["damaged"] * 5 + ["ok"]
    assert all(one_line(fault) and fault.isprintable() for finding in findings for fault in finding.faults)


# --- A shared store ------------------------------------------------------------------------------------------------


def _published(tmp_path: Path) -> tuple[Remote, Path, str]:
    """A shared store with one artifact: the store, its folder there, its key."""
    store = Store(tmp_path / "store")
    found = commit(store, spec())
    remote = Remote(str(tmp_path / "shared"), beat_seconds=0.1, stale_seconds=0.4)
    remote.check()
    with remote.lease("sft", found.manifest.key, lambda whom: None) as lease:
        assert lease is not None and remote.push(found.folder, lease)
    return remote, tmp_path / "shared" / "sft" / found.manifest.key, found.manifest.key


@pytest.mark.parametrize("kind", ["end", "manifest", "lease"])
@_FUZZ
@given(data=st.data())
def test_any_content_of_any_object(kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path = tmp_path_factory.mktemp("shared")
    remote, folder, key = _published(tmp_path)
    (manifest,) = (folder / "manifests").iterdir()
    end = folder / "turns" / "00000001.end"
    if kind == "manifest":
        content = data.draw(any_json.texts(json.loads(manifest.read_text())))
        if data.draw(st.booleans()):
            content = with_own_checksum(content)
        digest = blake3(content).hexdigest()
        (folder / "manifests" / f"{digest}.json").write_bytes(content)
        end.write_text(Ending(kind="published", by=_who(), manifest=digest, part_bytes=1 << 20).model_dump_json())
    else:
        file = end if kind == "end" else folder / "turns" / "00000002.lease"
        valid = json.loads(end.read_text()) if kind == "end" else _who().model_dump()
        file.write_bytes(data.draw(any_json.texts(valid)))
    look_at_shared(remote, key, tmp_path)


def look_at_shared(remote: Remote, key: str, tmp_path: Path) -> None:
    """Found and whole, missing with a reason, or one clear message; and the key can be shared again, or it is said."""
    try:
        found = remote.find("sft", key)
    except RemoteError as error:
        assert one_line(str(error))
        return
    if isinstance(found, RemoteArtifact):
        shutil.rmtree(tmp_path / "pulled", ignore_errors=True)
        remote.pull(found, tmp_path / "pulled")
        assert Store(tmp_path).verify(Found(found.manifest, tmp_path / "pulled")) == []
    else:
        assert isinstance(found, Missing) and one_line(found.reason)
    told: list[str] = []
    try:
        with remote.lease("sft", key, told.append) as lease:
            if lease is not None:
                lease.check()
    except RemoteError as error:
        assert one_line(str(error))
    assert all(one_line(text) for text in told)


@pytest.mark.parametrize("what", ["folder", "full folder", "pipe", "device", "link to nothing", "huge"])
@pytest.mark.parametrize("name", ["00000001.end", "00000002.end", "00000002.lease", "00000002.beat"])
def test_anything_in_the_place_of_a_turn(what: str, name: str, tmp_path: Path) -> None:
    remote, folder, key = _published(tmp_path)
    (folder / "turns" / name).unlink(missing_ok=True)
    put(what, folder / "turns" / name)
    look_at_shared(remote, key, tmp_path)


@pytest.mark.parametrize("kind", ["end", "lease"])
def test_the_last_turn_that_can_be_counted(kind: str, tmp_path: Path) -> None:
    """It was an endless loop: turn 100000000 was made, not seen, taken away, made."""
    remote, folder, key = _published(tmp_path)
    content = Ending(kind="released", by=_who()) if kind == "end" else _who()
    (folder / "turns" / f"99999999.{kind}").write_text(content.model_dump_json())
    assert isinstance(remote.find("sft", key), RemoteArtifact), "what was published can be used"
    with (
        pytest.raises(RemoteError, match=r"has had turn 99999999, which no other can follow; remove that folder"),
        remote.lease("sft", key, lambda whom: None),
    ):
        pass


@pytest.mark.parametrize("name", ["100000000.end", "٠٠٠٠٠٠٠٣.end", "00000002.END", "-0000002.end"])
def test_names_that_are_no_turns_are_passed_over(name: str, tmp_path: Path) -> None:
    remote, folder, key = _published(tmp_path)
    (folder / "turns" / name).write_text(Ending(kind="released", by=_who()).model_dump_json())
    assert isinstance(remote.find("sft", key), RemoteArtifact)
    with remote.lease("sft", key, lambda whom: None) as lease:
        assert lease is not None and lease.token == 2


def test_a_pointer_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote, folder, key = _published(tmp_path)
    with (folder / "turns" / "00000001.end").open("wb") as file:
        file.truncate(1 << 40)
    reads: list[str] = []
    objects = open_objects(remote.url)
    true_get = type(objects).get
    monkeypatch.setattr(
        type(objects), "get", lambda self, name, patience=60.0: (reads.append(name), true_get(self, name, patience))[1]
    )
    assert remote.find("sft", key) == Missing("its pointer is damaged or was written by a newer smoltulu")
    assert reads == []


def test_a_checkpoint_that_cannot_be_read_now_is_not_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks which are torn removes them."""
    folder = tmp_path / "checkpoint-7"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights").write_text("weights")
    mark_complete(folder)
    true_open = os.open

    def failing(path: Any, *arguments: Any, **named: Any) -> int:
        if str(path).endswith(CHECKPOINT_MARKER):
            raise OSError(5, "Input/output error", str(path))
        return true_open(path, *arguments, **named)

    monkeypatch.setattr(os, "open", failing)
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(OSError, match="Input/output error"):
        torn_checkpoints(tmp_path)
    monkeypatch.setattr(os, "open", true_open)
    assert torn_checkpoints(tmp_path) == [] and newest_checkpoint(tmp_path) == (7, folder)


def test_checkpoint_markers_and_names(tmp_path: Path) -> None:
    for name in ("checkpoint-²", "checkpoint-", "checkpoint--1", "checkpoint-1e3", "checkpoint-٣"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path) is None and torn_checkpoints(tmp_path) == []
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    record = {"size": 1, "blake3": "0" * 64}
    for name in ("a\0b", "../../x", "/etc/passwd", ""):
        (folder / CHECKPOINT_MARKER).write_text(json.dumps({"files": {name: record}}))
        assert fault(folder) is not None and newest_checkpoint(tmp_path) is None
