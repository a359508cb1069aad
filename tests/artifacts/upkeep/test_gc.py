"""What gc keeps and what it removes: on real folders, against an oracle that knows nothing of its code."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltulu.artifacts.manifests import Ref
from smoltulu.artifacts.store import Found, Store
from smoltulu.artifacts.upkeep.gc import Plan, Rules, plan_gc
from smoltulu.artifacts.upkeep.removal import remove
from smoltulu.artifacts.upkeep.verify import verify_artifacts
from tests.hand_store import HandStore, pipeline

#: Only tags, running runs and locks protect.
STRICT = Rules(keep_days=30, keep_runs=0)


@pytest.fixture
def store(tmp_path: Path) -> HandStore:
    return HandStore(tmp_path / "store")


def collect(store: HandStore, rules: Rules = STRICT) -> Plan:
    plan = plan_gc(store.catalogue, rules)
    outcome = remove(plan, store.root)
    assert outcome.skipped == []
    return plan


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    paths = {path.relative_to(folder).as_posix(): path.lstat() for path in folder.rglob("*")}
    return {name: (found.st_mtime_ns, found.st_size) for name, found in paths.items()}


def disk_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def dead_process() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


# --- reachability ----------------------------------------------------------------------------------------------------


@st.composite
def experiments(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[int]]:
    """Inputs of each artifact (earlier ones), artifacts that are made again at the end, and tagged ones."""
    size = draw(st.integers(1, 8))
    inputs = [sorted(draw(st.sets(st.integers(0, i - 1), max_size=3))) if i else [] for i in range(size)]
    some = st.lists(st.integers(0, size - 1), unique=True, max_size=3)
    return inputs, draw(some), draw(some)


@settings(max_examples=40, deadline=None)
@given(experiments())
def test_exactly_the_closure_of_the_tags_stays(experiment: tuple[list[list[int]], list[int], list[int]]) -> None:
    inputs, made_again, tagged = experiment
    folder = tempfile.mkdtemp()
    try:
        store = HandStore(Path(folder) / "store")
        refs: list[Ref] = []
        for number, upstream in enumerate(inputs):
            refs.append(store.make("sft", f"n{number}", {f"in{i}": refs[i] for i in upstream}))
        for number in made_again:
            store.make("sft", f"n{number}", {f"in{i}": refs[i] for i in inputs[number]}, content="again")
        for number in tagged:
            store.tag(f"tag-{number}", refs[number])

        # Oracle on (artifact, generation): what counts now, and what a kept generation was made from.
        current = {number: 2 if number in made_again else 1 for number in range(len(inputs))}
        generations = {(number, current[number]) for number in tagged}
        while True:
            more = set(generations)
            for number, generation in generations:
                for upstream in inputs[number]:
                    # First generations were all made before anything was made again; later ones took what was there.
                    order = made_again.index(number) if generation == 2 else -1
                    taken_again = generation == 2 and upstream in made_again and made_again.index(upstream) < order
                    more |= {(upstream, 2 if taken_again else 1), (upstream, current[upstream])}
            if more == generations:
                break
            generations = more

        collect(store)
        there = {
            (refs.index(Ref(path.parent.parent.parent.name, path.parent.parent.name)), int(path.parent.name[4:]))
            for path in store.root.glob("*/*/gen-*/manifest.json")
        }
        assert there == generations
        assert store.finished() == {refs[number] for number, _ in generations}
        assert not list(store.root.glob("**/.trash-*"))
        assert plan_gc(store.catalogue, STRICT).removals == []
    finally:
        shutil.rmtree(folder)


def test_publications_and_what_they_were_made_from_stay(store: HandStore) -> None:
    made = pipeline(store)
    loose = store.make("sft", "loose", {"model": made["base-model"]})
    plan = collect(store, Rules(keep_runs=0, keep_stages=frozenset({"publish"})))
    # The evaluation of SFT is no input of the publication.
    assert store.finished() == set(made.values()) - {made["evaluation-sft"]}
    assert {removal.ref for removal in plan.removals} == {loose, made["evaluation-sft"]}
    assert plan.kept[made["base-model"]] == "published"
    collect(store)
    assert store.finished() == set()


def test_what_was_used_lately_stays_with_its_inputs(store: HandStore) -> None:
    made = pipeline(store)
    store.age(made["sft"], 5)
    collect(store)
    assert store.finished() == {made["sft"], made["base-model"], made["dataset-sft"]}
    collect(store, Rules(keep_days=4, keep_runs=0))
    assert store.finished() == set()


def test_the_newest_runs_stay(store: HandStore) -> None:
    old, new = store.make("sft", "old"), store.make("sft", "new")
    store.run("one", {"sft": old}, started_at="2026-09-01T08:00:00+00:00")
    store.run("two", {"sft": new}, started_at="2026-10-01T08:00:00+00:00", state="Failed")
    collect(store, Rules(keep_runs=1))
    assert store.finished() == {new}


def test_a_run_that_goes_on_keeps_everything_that_it_may_be_reading(store: HandStore) -> None:
    base = store.make("base_model", "base")
    store.make("base_model", "base", content="again")
    sft = store.begin("sft", "sft", {"model": base})
    checkpoint = store.checkpoint(sft)
    loose = store.make("sft", "loose")
    record = store.run("now", {"sft": sft}, state="Running", finished_at="", started_at="2099-01-01T00:00:00+00:00")
    before = snapshot(store.folder(base))
    collect(store)
    assert checkpoint.exists() and snapshot(store.folder(base)) == before and loose not in store.finished()
    # The process is gone: nothing protects them any more.
    store.run("now", {"sft": sft}, **{**record.model_dump(include={"state", "started_at"}), "pid": dead_process()})
    collect(store)
    assert not checkpoint.exists() and store.finished() == set()


@pytest.mark.parametrize(("days_ago", "stays"), [(3, True), (60, False)])
def test_a_run_on_another_host_is_believed_for_some_time(store: HandStore, days_ago: float, stays: bool) -> None:
    sft = store.make("sft", "sft")
    store.run("far", {"sft": sft}, state="Running", finished_at="", host="elsewhere")
    moment = time.time() - days_ago * 86_400
    os.utime(store.root / "runs" / "far.json", (moment, moment))
    collect(store)
    assert (sft in store.finished()) is stays


# --- locks and what happens meanwhile --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lock", "writer"])
def test_a_locked_key_stays_with_its_inputs(store: HandStore, name: str) -> None:
    base = store.make("base_model", "base")
    sft = store.begin("sft", "sft", {"model": base})
    checkpoint = store.checkpoint(sft)
    with open(store.folder(sft) / name, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_SH if name == "writer" else fcntl.LOCK_EX)
        plan = collect(store)
        assert plan.kept[base].startswith("locked by")
        assert checkpoint.exists() and base in store.finished()
    collect(store)
    assert not checkpoint.exists() and store.finished() == set()


def test_a_lock_taken_after_planning_is_respected(store: HandStore) -> None:
    sft = store.make("sft", "sft")
    plan = plan_gc(store.catalogue, STRICT)
    with Store(store.root).producer(store.manifests[sft].spec, lambda whom: None):
        outcome = remove(plan, store.root)
    assert [reason.startswith("in use by process") for _, reason in outcome.skipped] == [True]
    assert sft in store.finished() and outcome.num_bytes == 0


def test_what_is_used_after_planning_stays_with_its_inputs(store: HandStore) -> None:
    base = store.make("base_model", "base")
    rows = store.make("dataset", "rows", {"world": store.make("world", "world")})
    sft = store.make("sft", "sft", {"model": base, "dataset": rows})
    store.make("dpo", "dpo", {"model": sft})
    plan = plan_gc(store.catalogue, STRICT)
    found = Store(store.root).find(store.manifests[sft].spec)
    assert isinstance(found, Found)
    Store(store.root).touch(found)
    outcome = remove(plan, store.root)
    assert [reason for _, reason in outcome.skipped] == [
        "used meanwhile",
        *["something that stays was made from it"] * 3,
    ]
    assert {ref.stage for ref in store.finished()} == {"sft", "base_model", "dataset", "world"}


def test_a_key_can_be_made_again_after_gc(store: HandStore) -> None:
    sft = store.make("sft", "sft")
    manifest = store.manifests[sft]
    collect(store)
    real = Store(store.root)
    with real.producer(manifest.spec, lambda whom: None) as folder:
        output = folder / "work" / "output"
        output.mkdir(parents=True)
        (output / "data.txt").write_text("new")
        real.commit(
            manifest.spec, output, lambda files, digest: manifest.model_copy(update={"files": files, "digest": digest})
        )
    assert isinstance(real.find(manifest.spec), Found)


# --- sweeping inside a key that stays --------------------------------------------------------------------------------


def test_generations_that_nothing_was_made_from_go(store: HandStore) -> None:
    base = store.make("base_model", "base", content="first")
    sft = store.make("sft", "sft", {"model": base})
    store.make("base_model", "base", content="second")
    store.make("base_model", "base", content="third")
    store.tag("best", sft)
    plan = collect(store)
    # The first is what SFT was made from, the third is current.
    assert sorted(path.name for path in store.folder(base).glob("gen-*")) == ["gen-0001", "gen-0003"]
    assert [(removal.kind, removal.names) for removal in plan.removals] == [("old generation", ("gen-0002",))]


@pytest.mark.parametrize("is_told", [True, False])
def test_what_a_night_without_a_verdict_compared_with_stays(store: HandStore, is_told: bool) -> None:
    night = store.make("evaluation", "night", content="first")
    store.make("evaluation", "night", content="second")
    store.tag("night", night)
    store.run("before", {"night": night}, started_at="2026-10-01T03:00:00+00:00", compared_with={"night": "gen-0001"})
    if is_told:
        store.run("night", {"night": night}, started_at="2026-10-02T03:00:00+00:00", compared_with={})
    # A run that is no night says nothing of it.
    store.run("later", {"night": night}, started_at="2026-10-03T03:00:00+00:00")
    assert store.catalogue.untold() == ({} if is_told else {night.key: "gen-0001"})
    collect(store)
    left = sorted(path.name for path in store.folder(night).glob("gen-*"))
    assert left == (["gen-0002"] if is_told else ["gen-0001", "gen-0002"])


def test_unfinished_work_goes_only_when_it_is_old(store: HandStore) -> None:
    base = store.make("base_model", "base")
    young = store.begin("sft", "young", {"model": base})
    old = store.begin("sft", "old")
    kept = store.checkpoint(young, days_ago=10)
    gone = store.checkpoint(old, days_ago=40)
    plan = collect(store)
    assert kept.exists() and not gone.exists()
    assert base in store.finished()  # without it the work could not go on
    assert plan.kept[base] == "unfinished work of the last 30 days"
    assert [removal.kind for removal in plan.removals] == ["unfinished work"]


def test_work_of_a_finished_key(store: HandStore) -> None:
    done, refreshed = store.make("sft", "done"), store.make("sft", "refreshed")
    leftover = store.checkpoint(done)
    (store.folder(done) / "work" / "generation").write_text("gen-0001")
    # Asked for again and interrupted lately: the next attempt goes on from there.
    going_on = store.checkpoint(refreshed, days_ago=1)
    store.tag("done", done)
    plan = collect(store)
    assert not leftover.exists() and going_on.exists()
    assert [removal.kind for removal in plan.removals] == ["stale work"]
    assert store.finished() == {done, refreshed}


def test_damaged_generations_go_when_they_are_old(store: HandStore) -> None:
    sft, dpo = store.make("sft", "sft"), store.make("dpo", "dpo")
    for ref in (sft, dpo):
        store.tag(ref.stage, ref)
        Store(store.root).quarantine(store.folder(ref), "gen-0001", "bad")
    store.age(sft, 40)
    plan = collect(store)
    assert not list(store.folder(sft).glob("damaged-*")) and len(list(store.folder(dpo).glob("damaged-*"))) == 1
    assert {removal.kind for removal in plan.removals} == {"damaged"}


def test_a_key_goes_at_once_with_what_was_set_aside_of_it(store: HandStore) -> None:
    """The pointer, which says whether a key was used since the plan, must not go before what was set aside."""
    sft = store.make("sft", "sft", content="first")
    Store(store.root).quarantine(store.folder(sft), "gen-0001", "bad")
    store.make("sft", "sft", content="second")
    store.age(sft, 40)
    collect(store)
    assert {path.name for path in store.folder(sft).iterdir()} <= {"lock", "writer"}


def test_the_trash_of_a_kill_does_not_count_as_what_could_not_be_removed(store: HandStore) -> None:
    sft = store.make("sft", "sft")
    store.tag("best", sft)
    store.checkpoint(sft)
    (store.folder(sft) / "work" / "generation").write_text("gen-0001")
    (store.folder(sft) / ".trash-work-1-1").mkdir()
    outcome = remove(plan_gc(store.catalogue, STRICT), store.root)
    assert outcome.skipped == [] and {one.kind for one in outcome.removed} == {"stale work", "leftover"}


def test_temporary_files_go(store: HandStore) -> None:
    sft = store.make("sft", "sft")
    store.tag("best", sft)
    (store.folder(sft) / ".trash-gen-0001-1-1").mkdir()
    (store.folder(sft) / ".trash-gen-0001-1-1" / "big").write_text("x" * 1000)
    (store.folder(sft) / ".current.4711").write_text("gen-00")
    (store.root / "tags" / ".best.json.4711").write_text("{")
    fresh = store.root / "tags" / ".other.json.4712"
    fresh.write_text("{")
    pull = store.folder(sft) / "pull"
    pull.mkdir()
    (pull / "data.txt").write_text("half")
    store.age(sft, 100)
    os.utime(store.root / "tags" / ".best.json.4711", (0, 0))
    collect(store)
    assert sorted(path.name for path in store.folder(sft).iterdir()) == [
        "current", "gen-0001", "lock", "spec.json", "writer",
    ]  # fmt: skip
    assert sorted(path.name for path in (store.root / "tags").iterdir()) == [fresh.name, "best.json"]


# --- never --------------------------------------------------------------------------------------------------------


def test_planning_changes_nothing_and_counts_the_bytes_that_removal_frees(store: HandStore) -> None:
    made = pipeline(store)
    store.checkpoint(store.begin("sft", "unfinished"))
    store.tag("keep", made["sft"])
    before = snapshot(store.root)
    plan = plan_gc(store.catalogue, STRICT)
    assert snapshot(store.root) == before
    bytes_before = disk_bytes(store.root)
    outcome = remove(plan, store.root)
    assert outcome.num_bytes == plan.num_bytes == bytes_before - disk_bytes(store.root) > 0


def test_nothing_behind_a_link_is_touched(store: HandStore, tmp_path: Path) -> None:
    outside = HandStore(tmp_path / "outside")
    far_stage = outside.make("dpo", "far")
    far_key = outside.make("sft", "key")
    outside.checkpoint(far_key)
    near = store.make("sft", "near")
    (store.root / "dpo").symlink_to(outside.root / "dpo")
    (store.folder(near).parent / far_key.key).symlink_to(outside.folder(far_key))
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious.txt").write_text("precious")
    (store.folder(near) / "gen-0001" / "link").symlink_to(victim)
    (store.folder(near) / "work").symlink_to(victim)
    before = snapshot(outside.root)
    outcome = remove(plan_gc(store.catalogue, STRICT), store.root)
    assert snapshot(outside.root) == before and far_stage in outside.finished()
    assert (victim / "precious.txt").read_text() == "precious"
    assert [reason for _, reason in outcome.skipped] == ["work is a link"]


def test_what_a_newer_version_wrote_stays(store: HandStore) -> None:
    base = store.make("base_model", "base")
    sft = store.make("sft", "sft", {"model": base})
    manifest = store.folder(sft) / "gen-0001" / "manifest.json"
    text = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({"schema_version": 99, "everything": "else", "spec": text["spec"]}))
    store.age(sft, 100)
    plan = collect(store)
    assert store.finished() == {sft, base} and plan.kept[base] == "made by a newer version"


def test_rubbish_is_passed_over(store: HandStore) -> None:
    sft = store.make("sft", "sft")
    store.tag("best", sft)
    (store.root / "notes.txt").write_text("mine")
    (store.root / "sft" / "not-a-key").mkdir()
    (store.folder(sft) / "foreign").write_text("mine")
    for number, text in enumerate(["", "[]", "null", '{"inputs": 3}', "[" * 100_000]):
        (store.root / "tags" / f"bad-{number}.json").write_text(text)
        (store.root / "runs").mkdir(exist_ok=True)
        (store.root / "runs" / f"bad-{number}.json").write_text(text)
        broken = store.make("dpo", f"broken-{number}", {"model": sft})
        (store.folder(broken) / "gen-0001" / "manifest.json").write_text(text)
        store.tag(f"broken-{number}", broken)
    collect(store)
    assert (store.root / "notes.txt").exists() and (store.root / "sft" / "not-a-key").exists()
    assert (store.folder(sft) / "foreign").exists() and sft in store.finished()


# --- killed in the middle -----------------------------------------------------------------------------------------


_killing: dict[str, int] = {}


def _kill_at(event: str, arguments: object) -> None:
    """Audit hook: ends the process, unannounced, before the n-th change of the file system."""
    if _killing and event in ("os.rename", "os.remove", "os.rmdir"):
        _killing["left"] -= 1
        if _killing["left"] < 0:
            os._exit(99)


def _with_kills(root: Path, plan: Plan) -> Iterator[int]:
    """Carry out a plan in children that die one change later each time; ends with one that came through."""
    for number in range(10_000):
        child = os.fork()
        if child == 0:
            _killing["left"] = number
            sys.addaudithook(_kill_at)
            remove(plan, root)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            return
        yield number


def test_a_kill_at_any_change_leaves_a_whole_store(store: HandStore, tmp_path: Path) -> None:
    made = pipeline(store)
    store.make("sft", "sft", {"model": made["base-model"], "dataset": made["dataset-sft"]}, content="again")
    store.tag("base", made["base-model"])
    pristine = tmp_path / "pristine"
    shutil.copytree(store.root, pristine)
    num_kills = 0
    for _ in _with_kills(store.root, plan_gc(store.catalogue, STRICT)):
        num_kills += 1
        catalogue = store.catalogue
        findings = verify_artifacts(catalogue, catalogue.refs, report_only=True)
        assert [finding for finding in findings if finding.status != "ok"] == []
        # What is there has everything that it was made from.
        for ref in store.finished():
            for upstream in catalogue.generation(ref, catalogue.folder(ref).newest or "").inputs:
                assert catalogue.folder(upstream.ref).newest is not None, (ref, upstream)
        collect(store)
        assert store.finished() == {made["base-model"]} and not list(store.root.glob("**/.trash-*"))
        shutil.rmtree(store.root)
        shutil.copytree(pristine, store.root)
    assert num_kills > 30


def test_an_empty_store_has_nothing_to_remove(store: HandStore) -> None:
    assert plan_gc(store.catalogue, Rules()).removals == []
    with pytest.raises(ValueError, match="0 or more"):
        Rules(keep_days=-1)
