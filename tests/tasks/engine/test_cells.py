"""An evaluation by cells: found by the model's content, made in one process, kept through failures and kills."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from smoltulu.artifacts.manifests import Ref
from smoltulu.artifacts.store import Found, Missing, Store
from smoltulu.artifacts.upkeep.catalogue import Catalogue
from smoltulu.artifacts.upkeep.gc import Rules, plan_gc
from smoltulu.artifacts.upkeep.lineage import ancestors
from smoltulu.artifacts.upkeep.verify import verify_artifacts
from smoltulu.schemas.artifact import ArtifactReference, FileRecord, InputRecord, Manifest, Spec
from smoltulu.schemas.common import StrictModel, scientific
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.evaluation import EvaluationInputs, EvaluationOutputs, EvaluationStageConfig
from smoltulu.tasks.engine.cells import cells_there
from smoltulu.tasks.engine.child import RESULT_FILE, run_cells
from smoltulu.tasks.engine.runner import run_stage
from smoltulu.tasks.evaluation.definitions import definition_digest
from smoltulu.tasks.evaluation.kept import ANSWERS_FILE
from smoltulu.tasks.evaluation.samples import read_samples
from smoltulu.tasks.evaluation.stage import cells_of, content_digest
from smoltulu.tasks.job import Job
from smoltulu.tasks.stage import Stage, StageContext, StageStopped
from smoltulu.tasks.stages import STAGES
from tests.tiny_model import TULU_TEMPLATE, build_tiny_model

LOG = logging.getLogger("test")
COMPUTE = ComputeSettings(
    device="cpu", num_threads=1, min_free_disk_gb=0, per_device_eval_batch_size=2, launcher="warm"
)


def model_of(store: Store, name: str, seed: int = 0, log: str = "") -> tuple[str, InputRecord]:
    """A finished model under a key of its own: its folder, and how an input of it is recorded."""
    spec = Spec(stage="base_model", version=1, config={"name": name}, inputs={}, externals={})
    with store.producer(spec, lambda whom: None) as folder:
        output = store.open_work(folder, {}) / "output"
        build_tiny_model(output / "model", seed=seed)
        (output / "history.jsonl").write_text(log)
        found = store.commit(spec, output, lambda files, digest: _manifest(spec, folder.name, files, digest))
    return str(found.folder / "model"), InputRecord(stage="base_model", key=folder.name, digest=found.manifest.digest)


def _manifest(spec: Spec, key: str, files: dict[str, FileRecord], digest: str) -> Manifest:
    now = "2026-01-01T00:00:00+00:00"
    return Manifest(
        key=key, spec=spec, digest=digest, inputs={}, outputs={"folder": "model", "num_parameters": 1}, metrics={},
        files=files, environment={}, node=str(spec.config["name"]), started_at=now, finished_at=now,
        duration_seconds=0.0,
    )  # fmt: skip


def rows_of(folder: Path, count: int = 40) -> Path:
    file = folder / "rows.jsonl"
    rows = [{"question": f"What is {n} plus {n}?" + " so" * (n % 7), "answer": f"#### {2 * n}"} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def task(file: Path, **changes: Any) -> dict[str, Any]:
    source = {"path": str(file), "format": "text"}
    whole = {"name": "tiny_arithmetic", "metric": "exact_match,strict-match", "files": {"test": source}}
    return whole | changes


def choices(folder: Path) -> dict[str, Any]:
    file = folder / "arc.jsonl"
    rows = [{"query": f"Which is {n}?", "choices": ["a cat", "three dogs"], "gold": n % 2} for n in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "local_arc_easy", "metric": "acc_norm,none", "files": {"test": {"path": str(file), "format": "text"}}
    }  # fmt: skip


def job_of(
    model: tuple[str, InputRecord], tasks: list[dict[str, Any]], node: str = "evaluation-sft", **changes: Any
) -> Job:
    stage, (folder, record) = STAGES["evaluation"], model
    settings = {"tasks": tasks, "max_length": 256, "precision": "float32"}
    config = EvaluationStageConfig.model_validate({"subject": "sft", "kind": "language_model", "settings": settings})
    externals = {f"{one['name']}.definition": definition_digest(one["name"]) for one in tasks}
    spec = Spec(stage="evaluation", version=stage.version, config=scientific(config), inputs={"model": record.key},
                externals={name: text for name, text in externals.items() if text})  # fmt: skip
    inputs = EvaluationInputs(model=folder, chat_template=TULU_TEMPLATE)
    made = Job(node, stage, config, COMPUTE, spec, inputs, {"model": record})
    return dataclasses.replace(made, **changes)


def scores(reference: ArtifactReference) -> dict[str, float]:
    return {one.task: one.value for one in EvaluationOutputs.model_validate(reference.outputs).scores}


def samples(reference: ArtifactReference) -> list[dict[str, Any]]:
    return list(read_samples(Path(reference.path) / reference.outputs["samples_file"]))


def made(store: Store) -> dict[str, int]:
    """Stage -> number of finished artifacts."""
    return {one.name: len(list(one.glob("*/gen-*"))) for one in store.root.iterdir() if list(one.glob("*/gen-*"))}


def status(there: Mapping[str, Found | Missing]) -> dict[str, bool]:
    return {name: isinstance(one, Found) for name, one in there.items()}


def test_a_task_that_is_added_runs_alone_and_equal_weights_share_cells(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, file = Store(tmp_path / "store"), rows_of(tmp_path, 4)
    sft, same, other = model_of(store, "sft"), model_of(store, "same"), model_of(store, "other", seed=1)
    assert content_digest(Path(sft[0])) == content_digest(Path(same[0])) != content_digest(Path(other[0]))
    first = run_stage(job_of(sft, [task(file)]), store, LOG)
    assert made(store)["evaluation_cell"] == 1 and first.outcome == "Completed"

    both = job_of(sft, [task(file), choices(tmp_path)])
    assert status(cells_there(both, store)) == {"tiny_arithmetic": True, "local_arc_easy": False}
    with caplog.at_level(logging.INFO):
        added = run_stage(both, store, LOG)
    assert "tiny_arithmetic there; to measure: local_arc_easy" in caplog.text
    assert made(store)["evaluation_cell"] == 2 and list(scores(added)) == ["tiny_arithmetic", "local_arc_easy"]
    assert [row for row in samples(added) if row["entry"] == 0] == samples(first)
    assert {row["task"] for row in samples(added) if row["entry"] == 1} == {"local_arc_easy"}

    # The same weights under another key, in another order: nothing runs, and torch is not imported.
    shared = run_stage(job_of(same, [choices(tmp_path), task(file)], "evaluation-dpo"), store, LOG)
    assert made(store)["evaluation_cell"] == 2 and scores(shared) == scores(added)
    assert status(cells_there(job_of(other, [task(file)]), store)) == {"tiny_arithmetic": False}
    # What decides a result decides the cell.
    for changed in ({"limit": 2}, {"metric": "bits_per_byte,none"}):
        assert status(cells_there(job_of(sft, [task(file, **changed)]), store)) == {"tiny_arithmetic": False}


def test_the_same_weights_made_again_with_another_log_are_not_measured_again(tmp_path: Path) -> None:
    """A training that is repeated logs other seconds: its artifact has another digest, its weights have not."""
    store, file = Store(tmp_path / "store"), rows_of(tmp_path, 4)
    first = model_of(store, "sft", log="12 s")
    run_stage(job_of(first, [task(file)]), store, LOG)
    again = model_of(store, "sft", log="13 s")
    assert again[1].digest != first[1].digest
    assert status(cells_there(job_of(again, [task(file)]), store)) == {"tiny_arithmetic": True}
    run_stage(job_of(again, [task(file)]), store, LOG)
    assert made(store)["evaluation_cell"] == 1


def test_cells_are_artifacts_like_any_other(tmp_path: Path) -> None:
    store, file = Store(tmp_path / "store"), rows_of(tmp_path, 4)
    sft = model_of(store, "sft")
    made_now = run_stage(job_of(sft, [task(file)]), store, LOG)
    catalogue = Catalogue(store.root)
    [cell] = [ref for ref in catalogue.refs if ref.stage == "evaluation_cell"]
    manifest = catalogue.manifest(Ref("evaluation", made_now.key))
    assert manifest["inputs"]["cells.tiny_arithmetic"]["key"] == cell.key
    assert catalogue.manifest(cell)["inputs"]["model"]["key"] == sft[1].key
    assert [relative.ref for relative in ancestors(catalogue, manifest)] == [Ref("base_model", sft[1].key), cell]
    assert {one.status for one in verify_artifacts(catalogue, [cell], report_only=True)} == {"ok"}
    assert catalogue.scores(cell)[0]["task"] == "tiny_arithmetic"
    # The scores of a model are those of its evaluation, once.
    assert len(catalogue.scores(Ref("base_model", sft[1].key))) == 1
    # gc: the cell goes with its evaluation, and stays with it.
    old = time.time() - 100 * 86_400
    for ref in catalogue.refs:
        os.utime(catalogue.path(ref) / "current", (old, old))
    assert {removal.ref for removal in plan_gc(Catalogue(store.root), Rules()).removals} == set(catalogue.refs)
    os.utime(catalogue.path(Ref("evaluation", made_now.key)) / "current")
    assert cell in plan_gc(Catalogue(store.root), Rules()).kept


def test_a_cell_that_fails_does_not_lose_the_finished_ones(tmp_path: Path) -> None:
    store, file = Store(tmp_path / "store"), rows_of(tmp_path, 4)
    sft = model_of(store, "sft")
    bad = task(file, metric="no_such,none", limit=3)
    with pytest.raises(ValueError, match=r"evaluation-sft: tiny_arithmetic: .*no metric 'no_such,none'"):
        run_stage(job_of(sft, [bad, choices(tmp_path)]), store, LOG)
    assert made(store) == {"base_model": 1, "evaluation_cell": 1}
    assert status(cells_there(job_of(sft, [choices(tmp_path)]), store)) == {"local_arc_easy": True}


def test_a_cell_that_crashes_does_not_keep_the_others_from_their_turn(tmp_path: Path) -> None:
    """Whatever the first does, as where its dataset cannot be had. A stop ends all at once, and so does want of memory
    while a smaller batch may mend it.
    """
    turns: list[str] = []

    def function(config: Settings, inputs: Settings, context: StageContext) -> tuple[Settings, dict[str, float]]:
        turns.append(name := context.work.name)
        if name in errors:
            raise errors[name]
        return Settings(), {}

    stage = Stage("cell", 1, config=Settings, inputs=Settings, outputs=Settings, function=function)
    cells: list[dict[str, Any]] = []
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
        one = {"name": name, "work": str(tmp_path / name), "folder": str(tmp_path / name)}
        cells.append({**one, "config": {}, "inputs": {}, "externals": {}})
    job = {"compute": COMPUTE.model_dump(mode="json"), "cells": cells}
    errors: dict[str, Exception] = {"first": ConnectionError("no hub"), "second": ValueError("mend it")}
    with pytest.raises(ConnectionError, match="no hub"):
        run_cells(stage, job, lambda step, num_steps, **metrics: None)
    assert turns == ["first", "second", "third"] and (tmp_path / "third" / RESULT_FILE).exists()
    for error in (MemoryError(), StageStopped("asked to")):
        turns.clear()
        errors["first"] = error
        with pytest.raises(type(error)):
            run_cells(stage, job, lambda step, num_steps, **metrics: None)
        assert turns == ["first"]
    turns.clear()
    errors["first"] = MemoryError()
    job["compute"]["per_device_eval_batch_size"] = 1
    with pytest.raises(MemoryError):
        run_cells(stage, job, lambda step, num_steps, **metrics: None)
    assert turns == ["first", "second"]  # the third is there


class Settings(StrictModel):
    """Nothing to set."""


def test_a_damaged_cell_is_said_and_made_again(tmp_path: Path) -> None:
    store, file = Store(tmp_path / "store"), rows_of(tmp_path, 4)
    sft = model_of(store, "sft")
    first = run_stage(job_of(sft, [task(file)]), store, LOG)
    [parquet] = (store.root / "evaluation_cell").glob("*/gen-*/samples.parquet")
    data = bytearray(parquet.read_bytes())
    data[300] ^= 1
    parquet.write_bytes(data)
    both = job_of(sft, [task(file), choices(tmp_path)])
    with pytest.raises(RuntimeError, match="was damaged on disk"):
        run_stage(both, store, LOG)
    again = run_stage(both, store, LOG)
    assert [row for row in samples(again) if row["entry"] == 0] == samples(first)


_RUN = """
import dataclasses, logging, sys
from pathlib import Path
from smoltulu.artifacts.store import Store
from smoltulu.tasks.engine.runner import run_stage
from tests.tasks.engine.test_cells import job_of, model_of, task
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
store = Store(sys.argv[1])
job = job_of(model_of(store, "sft"), [task(Path(sys.argv[2]))])
job = dataclasses.replace(job, compute=job.compute.model_copy(update={"launcher": "process"}))  # one start alone
print("outcome", run_stage(job, store, logging.getLogger()).outcome, flush=True)
"""


def test_killed_in_the_middle_of_a_task_it_goes_on_and_gives_the_same_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SIGKILL, for real. A shard has 4 items here: two batches of two."""
    file, killed = rows_of(tmp_path, 120), Store(tmp_path / "killed")
    process = subprocess.Popen([sys.executable, "-c", _RUN, str(killed.root), str(file)])
    deadline = time.monotonic() + 300
    answers: list[Path] = []
    while time.monotonic() < deadline and process.poll() is None:
        answers = list(killed.root.glob(f"evaluation_cell/*/work/{ANSWERS_FILE}"))
        if answers and len(answers[0].read_bytes().splitlines()) > 2:
            break
        time.sleep(0.02)
    child = psutil.Process(process.pid).children(recursive=True)
    for one in (process, *child):
        os.kill(one.pid, signal.SIGKILL)
    process.wait()
    shards = [
        json.loads(line) for line in answers[0].read_bytes().splitlines(keepends=True)[1:] if line.endswith(b"\n")
    ]
    assert 2 <= len(shards) < 15, "killed too late to tell"
    with answers[0].open("ab") as stream:
        stream.write(b'{"cut sho')  # as a kill leaves it
    job = job_of(_stored_model(killed), [task(file)])
    with caplog.at_level(logging.INFO):
        resumed = run_stage(job, killed, LOG)
    assert f"goes on, {sum(map(len, shards))} answers are there" in caplog.text
    whole = Store(tmp_path / "whole")
    once = run_stage(job_of(model_of(whole, "sft"), [task(file)]), whole, LOG)
    assert samples(resumed) == samples(once)
    assert resumed.digest == once.digest  # bit for bit


def _stored_model(store: Store) -> tuple[str, InputRecord]:
    spec = Spec(stage="base_model", version=1, config={"name": "sft"}, inputs={}, externals={})
    found = store.find(spec)
    assert isinstance(found, Found)
    record = InputRecord(stage="base_model", key=found.manifest.key, digest=found.manifest.digest)
    return str(found.folder / "model"), record


def test_a_new_definition_changes_no_other_key(tmp_path: Path) -> None:
    definitions = tmp_path / "lm_eval"
    definitions.mkdir()
    (definitions / "a.yaml").write_text("task: a\ninclude: shared.yaml\nprocess_results: !function code.score\n")
    (definitions / "shared.yaml").write_text("output_type: generate_until\n")
    (definitions / "code.py").write_text("def score(): ...\n")
    (definitions / "b.yaml").write_text("group: b\ntask: [a, {task: c, include: other.yaml}]\n")
    (definitions / "other.yaml").write_text("num_fewshot: 1\n")
    before = {name: definition_digest(name, definitions) for name in "ab"}
    assert None not in before.values() and definition_digest("gsm8k", definitions) is None
    (definitions / "new.yaml").write_text("task: new\n")
    assert {name: definition_digest(name, definitions) for name in "ab"} == before
    for file, changed in (("other.yaml", "b"), ("shared.yaml", "ab"), ("code.py", "ab"), ("a.yaml", "ab")):
        (definitions / file).write_text((definitions / file).read_text() + "# more\n")
        now = {name: definition_digest(name, definitions) for name in "ab"}
        assert [name for name in "ab" if now[name] != before[name]] == list(changed)
        before = now


def test_cells_need_no_torch(tmp_path: Path) -> None:
    store, file = Store(tmp_path / "store"), rows_of(tmp_path, 4)
    run_stage(job_of(model_of(store, "sft"), [task(file)]), store, LOG)
    code = f"""
import logging, sys
from pathlib import Path
from smoltulu.artifacts.store import Store
from smoltulu.tasks.engine.runner import run_stage
from smoltulu.artifacts.store import Found
def find():
    from smoltulu.schemas.artifact import Spec, InputRecord
    store = Store({str(store.root)!r})
    spec = Spec(stage="base_model", version=1, config={{"name": "sft"}}, inputs={{}}, externals={{}})
    found = store.find(spec)
    return store, (str(found.folder / "model"), InputRecord(stage="base_model", key=found.manifest.key,
                   digest=found.manifest.digest))
store, model = find()
sys.modules["torch"] = sys.modules["transformers"] = sys.modules["datasets"] = None
sys.modules["tests.tiny_model"] = type(sys)("tests.tiny_model")
sys.modules["tests.tiny_model"].TULU_TEMPLATE = {TULU_TEMPLATE!r}
sys.modules["tests.tiny_model"].build_tiny_model = None
from tests.tasks.engine.test_cells import job_of, task
job = job_of(model, [task(Path({str(file)!r}))], "evaluation-again")
job = __import__("dataclasses").replace(job, spec=job.spec.model_copy(update={{"inputs": {{"model": "0" * 64}}}}))
print(run_stage(job, store, logging.getLogger()).outcome)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "Completed", done.stderr


def test_jobs_of_cells_name_what_they_read(tmp_path: Path) -> None:
    store, file = Store(tmp_path / "store"), rows_of(tmp_path, 4)
    sft = model_of(store, "sft")
    cells = cells_of(job_of(sft, [task(file), task(file, limit=2)]))
    assert list(cells) == ["tiny_arithmetic", "tiny_arithmetic-2"]
    first, second = (cell.spec for cell in cells.values())
    assert set(first.externals) == {"model", "chat_template", "tiny_arithmetic.definition"}
    assert first.inputs == {} and first.config["dtype"] == "float32" and "precision" not in first.config
    assert first != second and cells["tiny_arithmetic"].node == "evaluation-sft/tiny_arithmetic"
