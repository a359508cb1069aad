"""Warm processes: a stage that is forked after the imports gives what it gives alone, and ends as one of its own."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from smoltulu.artifacts.checkpoints import newest_checkpoint
from smoltulu.artifacts.store import Store
from smoltulu.tasks.engine import launch, warm
from smoltulu.tasks.engine.launch import StageFailed, stop_children
from smoltulu.tasks.engine.runner import run_stage
from smoltulu.tasks.job import Job
from tests.tasks.engine.test_runner import _SFT, dataset_job, sft_job, world_job, write_sft_world

LOG = logging.getLogger("test")


@pytest.fixture(scope="module")
def sft_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sft_world(tmp_path_factory.mktemp("sft"))


def warm_job(job: Job, **config: object) -> Job:
    compute = job.compute.model_copy(update={"launcher": "warm"})
    return dataclasses.replace(job, compute=compute, config=job.config.model_copy(update=config))


def test_a_training_gives_the_bytes_that_it_gives_alone_in_any_order(sft_world: Path, tmp_path: Path) -> None:
    """Also beside another one, and after one that left the generators and the threads in another state."""
    job = dataclasses.replace(sft_job(sft_world), config=sft_job(sft_world).config.model_copy(update={"max_steps": 20}))
    alone = run_stage(job, Store(tmp_path / "alone"), LOG)
    other = warm_job(job, seed=99, learning_rate=0.01)
    run_stage(other, Store(tmp_path / "other"), LOG)
    beside = threading.Thread(target=run_stage, args=(other, Store(tmp_path / "beside"), LOG))
    beside.start()
    made = run_stage(warm_job(job), Store(tmp_path / "warm"), LOG)
    beside.join()
    assert made.digest == alone.digest and made.outputs == alone.outputs
    assert len(warm._servers) == 1


def test_what_the_user_must_fix_is_told(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n' * 3)
    with pytest.raises(ValueError, match=r"(?s)^dataset-sft: .*3 of 3 rows are malformed"):
        run_stage(warm_job(dataset_job(rows)), Store(tmp_path / "store"), LOG)


def _running(store: Path) -> launch.StageProcess:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        folders = list(store.glob("sft/*/work/checkpoints"))
        if folders and newest_checkpoint(folders[0]) and launch._running:
            return next(iter(launch._running))
        time.sleep(0.05)
    raise AssertionError("no checkpoint appeared")


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (lambda process: os.kill(process.pid, signal.SIGKILL), "was killed by signal 9"),
        (lambda process: stop_children(), "was stopped. Run again"),
        (lambda process: os.kill(process._server.pid, signal.SIGKILL), "was killed by signal 9"),
    ],
    ids=["killed", "stopped", "its server killed"],
)
def test_an_end_without_a_result_is_told_and_the_next_attempt_goes_on(
    sft_world: Path, tmp_path: Path, end: object, told: str
) -> None:
    failures: list[BaseException] = []
    job = warm_job(sft_job(sft_world), max_steps=120)

    def attempt() -> None:
        try:
            run_stage(job, Store(tmp_path), LOG)
        except StageFailed as error:
            failures.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    process = _running(tmp_path)
    assert isinstance(process, warm.WarmProcess) and process.pid is not None
    stage = psutil.Process(process.pid)
    end(process)  # type: ignore[operator]
    thread.join(60)
    assert len(failures) == 1 and told in str(failures[0])
    _, alive = psutil.wait_procs([stage], timeout=10)
    assert not alive, "the stage outlived its end"
    again = run_stage(job, Store(tmp_path), LOG)
    assert again.outcome == "Resumed"


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (lambda process, ranks: ranks[1].kill(), "rank 1 was killed by signal 9"),
        (lambda process, ranks: stop_children(), "was stopped. Run again"),
        (lambda process, ranks: os.kill(process.pid, signal.SIGKILL), "was killed by signal 9"),
    ],
    ids=["a rank killed", "stopped", "killed"],
)
def test_two_ranks_end_together(sft_world: Path, tmp_path: Path, end: object, told: str) -> None:
    job = warm_job(sft_job(sft_world), max_steps=10_000)
    two = job.compute.model_copy(update={"num_processes": 2, "per_device_train_batch_size": 2})
    failures: list[BaseException] = []

    def attempt() -> None:
        try:
            run_stage(dataclasses.replace(job, compute=two), Store(tmp_path), LOG)
        except StageFailed as error:
            failures.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    process = _running(tmp_path)
    assert process.pid is not None
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    end(process, ranks)  # type: ignore[operator]
    thread.join(60)
    assert len(failures) == 1 and told in str(failures[0])
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive, "a rank outlived the stage"


def test_a_rank_that_hangs_ends_soon_after_another_failed() -> None:
    """It ignores SIGTERM, as one that waits in a collective does."""
    script = """
import os, signal, sys, time
from smoltulu.tasks.engine import ranks
ranks._GRACE_S = 1
status = ranks.fork_ranks(2)
if status is None and os.environ["RANK"] == "1":
    os._exit(3)
if status is None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(300)
sys.exit(status)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 3


def test_a_killed_flow_takes_server_and_stage_along(sft_world: Path, tmp_path: Path) -> None:
    script = _SFT.replace("sft_job(Path(sys.argv[1]))", "warm_job(sft_job(Path(sys.argv[1])))")
    script = script.replace("import sft_job", "import sft_job\nfrom tests.tasks.engine.test_warm import warm_job")
    flow = subprocess.Popen([sys.executable, "-c", script, str(sft_world), str(tmp_path)], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("sft/*/work/checkpoints/checkpoint-*")):
        assert time.monotonic() < deadline and flow.poll() is None
        time.sleep(0.05)
    family = psutil.Process(flow.pid).children(recursive=True)
    assert len(family) == 2
    flow.kill()
    flow.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive, "a process outlived its flow"


def test_a_gpu_is_a_stages_own_and_threads_are_its_servers() -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "1", "SMOLTULU_MESSAGES": "/x", "OMP_NUM_THREADS": "1"}
    assert warm.shared(environment) == warm.shared({**environment, "CUDA_VISIBLE_DEVICES": "0"})
    assert warm.shared(environment) != warm.shared({**environment, "OMP_NUM_THREADS": "7"})


def test_a_signal_to_all_processes_ends_no_server_before_its_stage(sft_world: Path, tmp_path: Path) -> None:
    """Ctrl-C and the end of a machine reach the server too, and the kernel kills its stages with it."""
    made = []
    job = warm_job(sft_job(sft_world), max_steps=120)
    thread = threading.Thread(target=lambda: made.append(run_stage(job, Store(tmp_path), LOG)))
    thread.start()
    process = _running(tmp_path)
    assert isinstance(process, warm.WarmProcess)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process._server.pid, number)
    thread.join(120)
    assert [one.outcome for one in made] == ["Completed"]


def test_a_stage_ignores_ctrl_c_where_its_flow_does(
    sft_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a stage of its own process inherits it: a flow that a script began in the background goes on."""
    monkeypatch.setenv("SMOLTULU_BEGUN", "in the background")  # a server of its own
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        made = []
        job = warm_job(sft_job(sft_world), max_steps=60)
        thread = threading.Thread(target=lambda: made.append(run_stage(job, Store(tmp_path), LOG)))
        thread.start()
        process = _running(tmp_path)
        os.kill(process.pid, signal.SIGINT)
        thread.join(120)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [one.outcome for one in made] == ["Completed"]


def _with_trl(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "modules" / "trl").mkdir(parents=True)
    (folder / "modules" / "trl" / "__init__.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{folder / 'modules'}:{os.environ.get('PYTHONPATH', '')}")


def test_a_library_that_cannot_be_imported_ends_only_stages_that_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_trl(tmp_path, "raise ImportError('half installed')", monkeypatch)
    assert run_stage(warm_job(world_job()), Store(tmp_path / "store"), LOG).outcome == "Completed"


def test_a_server_that_crashes_tells_its_status_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_trl(tmp_path, "import os; os._exit(7)", monkeypatch)
    with pytest.raises(StageFailed, match="ended with status 7"):
        run_stage(warm_job(world_job()), Store(tmp_path / "store"), LOG)
    assert not [one for one in psutil.Process().children() if one.status() == psutil.STATUS_ZOMBIE]


def test_a_server_that_cannot_be_started_says_so_and_blocks_nobody() -> None:
    told: list[str] = []

    def ask() -> None:
        try:
            warm.server_for({"NAME": "with\0nul"})
        except ValueError as error:
            told.append(str(error))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(20)
    assert told == ["embedded null byte"]
