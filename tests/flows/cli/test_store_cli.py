"""The commands runs, show, verify, gc, tag and untag, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from benchmarks.store_fixture import make_store
from smoltulu.artifacts.store import Found, Store
from smoltulu.artifacts.upkeep.catalogue import Catalogue
from smoltulu.flows.cli.main import app
from smoltulu.flows.machine import machine
from smoltulu.schemas.artifact import ExtendedTraining, Spec
from tests.hand_store import HandStore, pipeline

HEAVY = {"torch", "transformers", "trl", "datasets", "lm_eval", "prefect", "numpy", "pyarrow"}


@pytest.fixture
def store(tmp_path: Path) -> HandStore:
    return HandStore(tmp_path / "store")


def call(store: HandStore | Path, *arguments: str, code: int = 0) -> Result:
    """A command on a store; its exit code is checked, and that nobody sees a traceback."""
    root = store if isinstance(store, Path) else store.root
    result = CliRunner().invoke(app, [*arguments, "--store", str(root)], env={"COLUMNS": "250"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def words(text: str) -> str:
    """Text with runs of blanks and table borders folded."""
    return " ".join(text.replace("│", " ").split())


# --- runs --------------------------------------------------------------------------------------------------------


def test_runs(store: HandStore) -> None:
    made = pipeline(store)
    store.run("first", made, outcomes={node: "Cached" if node == "sft" else "Completed" for node in made})
    store.run("second", {"sft": made["sft"]}, state="Failed", started_at="2026-10-02T08:00:00+00:00",
              finished_at="2026-10-02T09:01:00+00:00", outcomes={"sft": "Failed"})  # fmt: skip
    output = call(store, "runs").output
    assert output.index("second") < output.index("first")
    assert "Failed" in output and "1 h 01 min" in words(output) and "1 failed" in output
    assert "6 made · 1 cached" in words(output) and "dpo: gsm8k exact_match 0.500 ± 0.010" in words(output)
    only = call(store, "runs", "--limit", "1").output
    assert "first" not in only and "1 earlier runs; --limit shows more" in only
    values = json.loads(call(store, "runs", "--json").stdout)
    assert [value["run"] for value in values] == ["second", "first"]
    sizes = [record.size for ref in made.values() for record in store.manifests[ref].files.values()]
    assert values[1]["num_bytes"] == sum(sizes) and values[1]["seconds"] == 1800


def test_runs_of_an_empty_store(store: HandStore) -> None:
    assert call(store, "runs").output == f"no runs yet in {store.root}\n"
    assert json.loads(call(store, "runs", "--json").stdout) == []


def test_notes_do_not_corrupt_the_json(store: HandStore) -> None:
    (store.root / "runs").mkdir()
    (store.root / "runs" / "bad.json").write_text("{")
    result = call(store, "runs", "--json")
    assert json.loads(result.stdout) == [] and "note: runs/bad.json: passed over" in result.stderr


# --- show --------------------------------------------------------------------------------------------------------


def test_show_an_artifact(store: HandStore) -> None:
    made = pipeline(store)
    sft = made["sft"]
    store.tag("best", sft)
    output = words(call(store, "show", "best").output)
    assert f"key {sft.key}" in output and "tags best" in output and "took 1 h 00 min" in output
    assert "gsm8k exact_match 0.250 ± 0.010" in output and "loss 1.5" in output and "torch 2.13.0" in output
    assert f"allenai/tulu @ {'a' * 40} (train)" in output and f"org/base @ {'b' * 40}" in output
    before, after = output.split("made from it")
    assert f"model: base-model {made['base-model'].key[:12]}" in before
    assert f"model: dpo {made['dpo'].key[:12]}" in after and "gsm8k exact_match 0.500 ± 0.010" in after
    details = json.loads(call(store, "show", sft.key[:12], "--json").stdout)
    assert details["files"] == store.manifests[sft].model_dump(mode="json")["files"]
    assert [relative["stage"] for relative in details["ancestors"]] == ["base_model", "dataset"]
    assert [relative["stage"] for relative in details["descendants"]] == ["dpo", "evaluation"]


def test_show_says_what_a_training_went_on_from(store: HandStore) -> None:
    short = store.make("sft", "short")
    longer = store.make("sft", "longer", extends=ExtendedTraining(stage="sft", key=short.key, step=900, num_steps=1000))
    assert f"extends sft/{short.key[:12]}, from its step 900 of 1,000" in words(call(store, "show", longer.key).output)
    assert "extends" not in call(store, "show", short.key).output


def test_show_marks_what_is_stale(store: HandStore) -> None:
    made = pipeline(store)
    store.make("base_model", "base-model", content="again", repository="org/base", revision="b" * 40)
    assert "stale: made again since; this is gen-0001" in call(store, "show", made["sft"].key).output
    shown = call(store, "show", made["base-model"].key).output
    assert "made from an earlier content" in shown and "earlier, still there: gen-0001" in shown


def test_show_an_unfinished_and_a_damaged_artifact(store: HandStore) -> None:
    base = store.make("base_model", "base")
    sft = store.begin("sft", "sft", {"model": base}, learning_rate=1e-6)
    store.checkpoint(sft, step=10)
    output = words(call(store, "show", sft.key).output)
    assert "not finished" in output and "at step 10 of 40" in output and "learning_rate 1e-06" in output
    assert f"made from └── model: base {base.key[:12]}" in output
    Store(store.root).quarantine(store.folder(base), "gen-0001", "data.txt is [gone]")
    output = words(call(store, "show", base.key).output)
    assert "data.txt is [gone]" in output and "not finished" in output


def test_show_a_run(store: HandStore) -> None:
    made = pipeline(store)
    store.run("first", {**made, "rlvr": store.begin("rlvr", "rlvr", {"model": made["dpo"]})}, report_path="/x/r.html")
    output = words(call(store, "show", "first").output)
    assert "recipe by-hand" in output and "/x/r.html" in output and "not in the store" in output
    assert f"evaluation-sft Completed {made['evaluation-sft'].key[:12]}" in output
    details = json.loads(call(store, "show", "first", "--json").stdout)
    assert [stage["node"] for stage in details["stages"]] == [*made, "rlvr"]
    assert details["stages"][2]["made_in_seconds"] == 3600.0 and details["stages"][-1]["num_bytes"] is None


def test_show_survives_manifests_of_any_content(store: HandStore) -> None:
    upstream = store.make("base_model", "base")
    ref = store.make("sft", "sft", {"model": upstream})
    store.make("dpo", "dpo", {"model": ref})
    manifest = store.folder(ref) / "gen-0001" / "manifest.json"
    whole = json.loads(manifest.read_text())
    for name in whole:
        for value in (None, "text", {"a": {"b": []}}):
            manifest.write_text(json.dumps({**whole, name: value}))
            call(store, "show", ref.key)
            call(store, "show", upstream.key, "--json")
            call(store, "gc")
    manifest.write_text("[" * 100_000)
    assert "problem: its manifest is no JSON" in call(store, "show", ref.key).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "abc"], "too short"),
        (["show", "ffffffffffff"], "no key, tag or run"),
        (["verify", "nothing"], "no key, tag or run"),
        (["tag", "best", "ffffffffffff"], "no key, tag or run"),
        (["tag", "be st", "first"], "is a run"),
        (["untag", "best"], "no tag 'best'"),
    ],
)
def test_bad_input_gets_one_message(store: HandStore, arguments: list[str], message: str) -> None:
    store.run("first", {})
    result = call(store, *arguments, code=1)
    assert message in result.stderr and result.stdout == ""


@pytest.mark.parametrize("command", [["runs"], ["show", "abcd"], ["verify"], ["gc"], ["tag", "a", "b"], ["untag", "a"]])
def test_no_store(tmp_path: Path, command: list[str]) -> None:
    result = call(tmp_path / "nowhere", *command, code=1)
    assert "does not exist; give --store FOLDER or set SMOLTULU_STORE" in result.stderr
    assert not (tmp_path / "nowhere").exists()


# --- verify ------------------------------------------------------------------------------------------------------


def test_verify(store: HandStore) -> None:
    made = pipeline(store)
    assert words(call(store, "verify").output).startswith("7 ok; ")
    (store.folder(made["sft"]) / "gen-0001" / "data.txt").write_text("other")
    assert "7 ok" not in call(store, "verify", "--report-only", code=1).output
    assert made["sft"] in store.finished()
    # Only what is asked for is read.
    store.tag("fine", made["dpo"])
    assert "1 ok" in call(store, "verify", "fine").output
    output = words(call(store, "verify", made["sft"].key[:8], code=1).output)
    assert "data.txt has 5 bytes instead of 9 (set aside as damaged-gen-0001-" in output
    assert made["sft"] not in store.finished() and "6 ok" in call(store, "verify").output


def test_what_the_disk_does_not_let_be_read_is_said_and_left(store: HandStore) -> None:
    made = store.make("sft", "sft", files={"weights/data.bin": ""})
    file = store.folder(made) / "gen-0001" / "weights" / "data.bin"
    file.unlink()
    file.symlink_to("/proc/self/mem")  # a plain file of no bytes, the first of which gives EIO
    output = words(call(store, "verify", code=1).output)
    assert "gen-0001: weights/data.bin could not be read (Input/output error) 1 unreadable" in output
    assert made in store.finished()


def test_verify_a_run(store: HandStore) -> None:
    made = pipeline(store)
    store.run("first", {"sft": made["sft"], "dpo": made["dpo"]})
    assert "2 ok" in call(store, "verify", "first").output


# --- gc ----------------------------------------------------------------------------------------------------------


def test_gc_shows_first_and_removes_when_told(store: HandStore) -> None:
    made = pipeline(store)
    loose = store.make("rlvr", "loose", {"model": made["dpo"]})
    output = words(call(store, "gc", "--keep-runs", "0").output)
    assert f"rlvr/{loose.key[:12]} artifact nothing kept needs it; last used 100 days ago" in output
    assert "stays: 6 · published" in output and "nothing was changed, --yes removes it" in output
    assert store.finished() == {*made.values(), loose}
    plan = json.loads(call(store, "gc", "--keep-runs", "0", "--json").stdout)
    assert f"rlvr/{loose.key}" in {removal["ref"] for removal in plan["removals"]} and plan["num_bytes_freed"] == 0
    assert "freed" in call(store, "gc", "--keep-runs", "0", "--yes").output
    assert store.finished() == set(made.values()) - {made["evaluation-sft"]}
    assert "nothing to remove" in call(store, "gc", "--keep-runs", "0", "--yes").output
    call(store, "gc", "--keep-runs", "0", "--no-keep-published", "--keep-days", "0", "--yes")
    assert store.finished() == set()


def test_tag_protects_until_untag(store: HandStore) -> None:
    made = pipeline(store)
    everything = ("gc", "--yes", "--keep-runs", "0", "--no-keep-published", "--keep-days", "0")
    assert call(store, "tag", "best", made["sft"].key[:8]).output == f"best is sft/{made['sft'].key[:12]}\n"
    assert "give --move" in call(store, "tag", "best", made["dpo"].key[:8], code=1).stderr
    call(store, *everything)
    assert store.finished() == {made["sft"], made["base-model"], made["dataset-sft"]}
    call(store, "untag", "best")
    call(store, *everything)
    assert store.finished() == set()


# --- cost --------------------------------------------------------------------------------------------------------


def test_nothing_heavy_is_imported(store: HandStore) -> None:
    made = pipeline(store)
    store.run("first", made)
    for arguments in (["runs"], ["show", made["sft"].key[:8]], ["show", "first"], ["verify"], ["gc"]):
        command = [
            sys.executable,
            "-X",
            "importtime",
            "-m",
            "smoltulu.flows.cli.main",
            *arguments,
            "--store",
            str(store.root),
        ]
        done = subprocess.run(command, cwd=machine.PROJECT, capture_output=True, text=True, timeout=60, check=True)
        lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
        assert not HEAVY & {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}, arguments


def test_the_store_of_the_environment_is_the_default(store: HandStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOLTULU_STORE", str(store.root))
    assert CliRunner().invoke(app, ["runs"]).output == f"no runs yet in {store.root}\n"


_opened: list[str] | None = None


def _record(event: str, arguments: tuple[object, ...]) -> None:
    if _opened is not None and event == "open":
        _opened.append(str(arguments[0]))


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, list[Spec]]:
    """A store, and one of four times its size."""
    roots = {size: tmp_path_factory.mktemp("store") / str(size) for size in (100, 400)}
    return {root: make_store(root, size) for size, root in roots.items()}


def test_the_fixture_is_a_real_store(fixtures: dict[Path, list[Spec]]) -> None:
    root, specs = next(iter(fixtures.items()))
    assert len(specs) == len(Catalogue(root).refs) == 100
    assert all(isinstance(Store(root).find(spec), Found) for spec in specs)
    assert "100 ok" in call(root, "verify").output
    assert Catalogue(root).runs()[0].run_name in call(root, "runs").output and Catalogue(root).notes == []


def test_what_is_read_does_not_grow_with_the_store(fixtures: dict[Path, list[Spec]]) -> None:
    """Counted, not timed: `runs` and `find` read as much in a small store as in one of four times its size."""
    global _opened
    sys.addaudithook(_record)
    finds = set()
    for root, specs in fixtures.items():
        _opened = []
        call(root, "runs", "--limit", "3")
        assert sum(path.endswith("manifest.json") for path in _opened) <= 3 * 13
        _opened = []
        Store(root).find(specs[50])
        finds.add(len(_opened))
        _opened = []
        # A key is found by names alone; specs are read once for what was made from it, manifests only of relatives.
        call(root, "show", Catalogue(root).refs[0].key[:12])
        assert sum(path.endswith("spec.json") for path in _opened) == len(specs)
        assert sum(path.endswith("manifest.json") for path in _opened) < 100
        _opened = None
    assert len(finds) == 1
