"""The runner: a stage in a process of its own, cached, resumed, and never outliving its parent."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from smoltulu.artifacts.checkpoints import mark_complete, newest_checkpoint
from smoltulu.artifacts.store import Store
from smoltulu.schemas.artifact import Spec
from smoltulu.schemas.common import scientific
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.data import DataSet, DatasetInputs, DatasetStageConfig, DataSource
from smoltulu.schemas.training import GateSettings, SFTSettings, TrainingInputs
from smoltulu.schemas.world import WorldConfig
from smoltulu.tasks.data.sources import source_digest
from smoltulu.tasks.engine import launch
from smoltulu.tasks.engine.environment import drift, environment
from smoltulu.tasks.engine.launch import StageFailed, _said
from smoltulu.tasks.engine.messages import PIPE_VARIABLE
from smoltulu.tasks.engine.runner import Job, _warn_of_drift, run_stage
from smoltulu.tasks.stages import STAGES
from tests.small_runs import training_inputs
from tests.tiny_model import TULU_TEMPLATE, build_tiny_model

LOG = logging.getLogger("test")
COMPUTE = ComputeSettings(device="cpu", num_threads=1, min_free_disk_gb=0)
SMALL_WORLD = WorldConfig(num_pretrain=20, num_sft=100, num_preference=60, num_rlvr=60, num_eval_arithmetic=40,
                          num_eval_instructions=20, num_eval_verified=40, num_preference_eval=20, planted_sft=3,
                          planted_preference=2, planted_rlvr=2)  # fmt: skip


def world_job(refresh: bool = False, compute: ComputeSettings = COMPUTE) -> Job:
    stage = STAGES["world"]
    spec = Spec(stage="world", version=stage.version, config=scientific(SMALL_WORLD), inputs={}, externals={})
    return Job("world", stage, SMALL_WORLD, compute, spec, stage.inputs(), refresh=refresh)


def test_made_then_cached_then_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    first = run_stage(world_job(), store, LOG)
    assert first.outcome == "Completed" and first.outputs["num_rows"]["sft"] == 100
    assert (Path(first.path) / "sft.jsonl").exists()
    manifest = json.loads((Path(first.path) / "manifest.json").read_text())
    assert manifest["environment"]["packages"]["torch"] and manifest["files"]["sft.jsonl"]["size"] > 0
    assert run_stage(world_job(), store, LOG).outcome == "Cached"
    again = run_stage(world_job(refresh=True), store, LOG)
    assert again.outcome == "Completed" and again.path != first.path and again.digest == first.digest


def test_inline_launcher_gives_the_same_bytes(tmp_path: Path) -> None:
    child = run_stage(world_job(), Store(tmp_path / "child"), LOG)
    inline = COMPUTE.model_copy(update={"launcher": "inline"})
    assert run_stage(world_job(compute=inline), Store(tmp_path / "inline"), LOG).digest == child.digest


def dataset_job(file: Path) -> Job:
    stage = STAGES["dataset"]
    config = DatasetStageConfig(kind="sft", data=DataSet(sources=(DataSource(path=str(file), format="messages"),)))
    spec = Spec(
        stage="dataset",
        version=1,
        config=scientific(config),
        inputs={},
        externals={"data.0": source_digest(config.data.sources[0])},
    )
    return Job("dataset-sft", stage, config, COMPUTE, spec, DatasetInputs())


def test_what_the_user_must_fix_is_one_message_and_leaves_no_artifact(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n' * 3)
    store = Store(tmp_path / "store")
    with pytest.raises(ValueError, match=r"(?s)^dataset-sft: .*3 of 3 rows are malformed"):
        run_stage(dataset_job(rows), store, LOG)
    assert list((tmp_path / "store").rglob("manifest.json")) == []


def test_not_enough_disk_is_said_before_anything_runs(tmp_path: Path) -> None:
    compute = COMPUTE.model_copy(update={"min_free_disk_gb": 1e9})
    with pytest.raises(ValueError, match=r"[GT]B free under .*min_free_disk_gb asks for 1e\+09"):
        run_stage(world_job(compute=compute), Store(tmp_path), LOG)


_SFT = """
import logging, sys
from pathlib import Path
from smoltulu.artifacts.store import Store
from tests.tasks.engine.test_runner import sft_job
from smoltulu.tasks.engine.runner import run_stage
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
reference = run_stage(sft_job(Path(sys.argv[1])), Store(sys.argv[2]), logging.getLogger())
print("outcome", reference.outcome, reference.path, flush=True)
"""


def sft_job(folder: Path) -> Job:
    """SFT of 200 steps over the rows in `folder`, a checkpoint every 20."""
    stage = STAGES["sft"]
    settings = SFTSettings(
        learning_rate=1e-3, effective_batch_size=4, max_length=128, precision="float32", max_steps=200,
        gate=GateSettings(num_prompts=0),
    )  # fmt: skip
    inputs = TrainingInputs(
        model=str(folder / "model"), dataset=str(folder / "rows.parquet"), chat_template=TULU_TEMPLATE
    )
    compute = COMPUTE.model_copy(update={"per_device_train_batch_size": 4, "save_steps": 20})
    spec = Spec(stage="sft", version=1, config=scientific(settings), inputs={}, externals={})
    return Job("sft", stage, settings, compute, spec, inputs)


def warm(job: Job) -> Job:
    return dataclasses.replace(job, compute=job.compute.model_copy(update={"launcher": "warm"}))


def write_sft_world(folder: Path) -> Path:
    build_tiny_model(folder / "model")
    rows = [
        {"id": f"0:{i}", "messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": str(i)}]}
        for i in range(200)
    ]
    before = folder / "before"
    before.mkdir()
    inputs = training_inputs("sft", before, folder / "model", rows, sft_job(folder).config, COMPUTE)  # type: ignore[arg-type]
    shutil.copy(inputs.dataset, folder / "rows.parquet")
    return folder


@pytest.fixture(scope="module")
def sft_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sft_world(tmp_path_factory.mktemp("sft"))


def start_sft(folder: Path, store: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", _SFT, str(folder), str(store)], stdout=subprocess.PIPE, text=True)


def wait_for_checkpoint(store: Path, process: subprocess.Popen[str]) -> psutil.Process:
    """The stage's process, once a checkpoint is whole."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        folders = list(store.glob("sft/*/work/checkpoints"))
        if folders and newest_checkpoint(folders[0]):
            children = psutil.Process(process.pid).children()
            assert len(children) == 1
            return children[0]
        time.sleep(0.05)
    raise AssertionError("no checkpoint appeared while the stage ran")


def test_killed_parent_takes_its_child_along_and_the_next_run_resumes_to_the_same_weights(
    sft_world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Started as a process of its own, gone on with and repeated as warm ones."""
    store = tmp_path / "store"
    parent = start_sft(sft_world, store)
    child = wait_for_checkpoint(store, parent)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs([child], timeout=10)
    assert not alive, "the training process outlived its parent"

    job = warm(sft_job(sft_world))
    with caplog.at_level(logging.INFO, "test"):
        resumed = run_stage(job, Store(store), LOG)
        assert resumed.outcome == "Resumed" and "resumes at step" in caplog.text
        unbroken = run_stage(job, Store(tmp_path / "unbroken"), LOG)
    assert unbroken.outcome == "Completed" and "step 200 of 200" in caplog.text
    first, second = (load_file(Path(one.path) / "model" / "model.safetensors") for one in (resumed, unbroken))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_max_hours_ends_a_training_with_a_checkpoint_that_the_next_run_goes_on_from(
    sft_world: Path, tmp_path: Path
) -> None:
    """No checkpoint was due: this one was made because the time was over."""
    run_stage(warm(world_job()), Store(tmp_path / "before"), LOG)  # imports once, outside of the time
    job, store = warm(sft_job(sft_world)), Store(tmp_path)
    compute = job.compute.model_copy(update={"save_steps": 100_000, "max_hours": 8 / 3600})
    config = job.config.model_copy(update={"max_steps": 100_000})
    asked = dataclasses.replace(job, compute=compute, config=config)
    with pytest.raises(StageFailed, match=r"sft: was stopped, as compute.max_hours \(0.00222222\) is over. Run again"):
        run_stage(asked, store, LOG)
    (work,) = tmp_path.glob("sft/*/work")
    newest = newest_checkpoint(work / "checkpoints", full=True)
    assert newest is not None and 0 < newest[0] < 100_000


def test_a_stage_that_ignores_the_end_of_its_time_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_LAST_STEP_SECONDS", 0.2)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"on\n"
        limit = launch._TimeLimit(process, time.monotonic() + 0.2)
        assert process.wait(10) == -signal.SIGKILL and limit.is_over
    with subprocess.Popen(["true"]) as process:
        limit = launch._TimeLimit(process, time.monotonic() + 0.3)
        process.wait()
        limit.end()
        time.sleep(0.5)
        assert not limit.is_over


def test_killed_child_is_a_clear_failure_that_names_the_log(sft_world: Path, tmp_path: Path) -> None:
    parent = start_sft(sft_world, tmp_path)
    child = wait_for_checkpoint(tmp_path, parent)
    os.kill(child.pid, signal.SIGKILL)
    out, _ = parent.communicate(timeout=600)
    assert parent.returncode == 1 and "outcome" not in out
    log = next(tmp_path.glob("sft/*/work/log.txt"))
    assert log.stat().st_size > 0


def test_two_processes_train_to_the_weights_of_one(sft_world: Path, tmp_path: Path) -> None:
    """Over gloo, same effective batch; equal to float32 tolerance. Two forks are two processes of their own."""
    made = []
    for num_processes, launcher in ((1, "warm"), (2, "process"), (2, "warm")):
        job = sft_job(sft_world)
        size = 4 // num_processes
        changes = {"num_processes": num_processes, "per_device_train_batch_size": size, "launcher": launcher}
        compute = job.compute.model_copy(update=changes)
        job = dataclasses.replace(job, config=job.config.model_copy(update={"max_steps": 20}), compute=compute)
        made.append(run_stage(job, Store(tmp_path / f"{num_processes}-{launcher}"), LOG))
        assert made[-1].outputs["num_steps"] == 20
    assert made[1].digest == made[2].digest
    one, two = (load_file(Path(reference.path) / "model" / "model.safetensors") for reference in made[:2])
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)


def test_drift_by_hand() -> None:
    before = {"packages": {"torch": "2.12", "trl": "1.16", "gone": "1"}, "python": "3.11.7", "git_commit": None}
    after = {"packages": {"torch": "2.13", "trl": "1.16", "new": "1"}, "python": "3.12.1", "git_commit": "b" * 40}
    assert drift(before, after) == ["torch 2.12 -> 2.13", "python 3.11.7 -> 3.12.1"]
    assert drift({**before, "git_commit": "a" * 40}, after)[-1] == "code aaaaaaaaaaaa -> bbbbbbbbbbbb"
    assert drift({}, after) == []
    # The same recipe gives other scores on another processor. Older manifests do not name theirs.
    assert drift({"cpu": "A"}, {"cpu": "B"}) == ["cpu A -> B"]
    assert drift({"cpu": "A"}, {"cpu": "A"}) == drift({}, {"cpu": "B"}) == []
    assert environment()["cpu"]


@pytest.mark.parametrize(
    ("began_with", "said"),
    [
        ({"packages": {"torch": "1.0", "gone": "1"}, "python": "3.9.1"}, r"torch 1\.0 -> \S+, python 3\.9\.1 -> \S+$"),
        ("{", "what it was begun with is unreadable"),
        ([], "what it was begun with is unreadable"),
    ],
)
def test_work_that_goes_on_with_other_versions_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, began_with: Any, said: str
) -> None:
    checkpoint = tmp_path / "checkpoints" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text("x")
    mark_complete(checkpoint)
    file = tmp_path / "environment.json"
    file.write_text(began_with if isinstance(began_with, str) else json.dumps(began_with))
    _warn_of_drift(tmp_path, "sft", LOG)
    (message,) = caplog.messages
    assert re.search(f"sft: goes on from a checkpoint made with other versions: {said}", message)
    file.write_text(json.dumps(environment()))
    _warn_of_drift(tmp_path, "sft", LOG)
    assert len(caplog.messages) == 1


def test_what_a_stage_process_says_reaches_no_terminal_as_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows, models and libraries decide what it prints: into the log, into the failure, and into messages."""
    said = "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J \u202eback"
    message = json.dumps({"kind": "log", "level": "WARNING", "text": said})
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, sys\nif 'smoltulu.tasks.engine.child' in ' '.join(sys.orig_argv):\n"
        f"    print({said!r}, flush=True)\n"
        f"    with open(os.environ['{PIPE_VARIABLE}'], 'w') as pipe:\n"
        f"        pipe.write({message!r} + chr(10))\n"
        "    os._exit(7)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")
    with pytest.raises(StageFailed, match="red") as caught:
        run_stage(world_job(), Store(tmp_path / "store"), LOG)
    log = next(tmp_path.glob("store/world/*/work/log.txt")).read_text()
    for text in (log, str(caught.value), caplog.text):
        assert "red" in text and all(letter in "\n\t" or letter.isprintable() for letter in text)
    (tmp_path / "error.json").write_text(json.dumps({"message": said}))
    said = _said(tmp_path / "error.json")
    assert said is not None and said["message"] == "red �]0;title� �2J �back"
