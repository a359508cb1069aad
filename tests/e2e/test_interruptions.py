"""Interruptions as a user meets them in Prefect: cancel, retry of a failed run, a worker that dies. A real server."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from smoltulu.artifacts.checkpoints import newest_checkpoint
from smoltulu.flows.machine import machine, prefect_api
from smoltulu.schemas.run import RunRecord
from tests.faults.sandbox import Sandbox
from tests.small_tiny import LENIENT_GATE

#: Up to SFT; one row at a time, so that its training is long enough to be interrupted.
SLOW_SFT: dict[str, Any] = {
    "world.num_pretrain": 50,
    "world.num_sft": 200,
    "world.num_preference": 40,
    "world.num_rlvr": 40,
    "world.num_eval_arithmetic": 20,
    "world.num_eval_instructions": 20,
    "world.num_eval_verified": 40,
    "world.num_preference_eval": 20,
    "world.planted_sft": 2,
    "world.planted_preference": 1,
    "world.planted_rlvr": 1,
    "base_model.scratch.num_steps": 2,
    "base_model.scratch.num_hidden_layers": 1,
    "base_model.scratch.hidden_size": 16,
    "base_model.scratch.intermediate_size": 32,
    "base_model.scratch.num_attention_heads": 2,
    "sft.max_steps": 120,
    "sft.gate": LENIENT_GATE,
    "compute.per_device_train_batch_size": 1,
    "compute.stages.sft.save_steps": 1000,
    "compute.logging_steps": 1,
    "compute.min_free_disk_gb": 0,
    **dict.fromkeys(("evaluation", "publish", "contamination"), None),
}
#: Machinery: the same artifact, made faster.
FAST = {"compute.per_device_train_batch_size": 16}


@dataclass
class Place:
    """A server with a worker, and a store that several trainings go into."""

    home: Path
    url: str
    store: Path
    begun: list[UUID] = field(default_factory=list)

    def sandbox(self, seed: int, **overrides: Any) -> Sandbox:
        """View of the store for a training of its own."""
        return Sandbox(self.store.parent, {**SLOW_SFT, "sft.seed": seed, **overrides})

    def start(self, sandbox: Sandbox) -> UUID:
        """Start a flow run up to SFT."""
        overrides = json.dumps({**sandbox.overrides, "compute.store": str(self.store)})
        self.command("deployment", "run", "smoltulu/tiny", "-p", f"overrides={overrides}", "-p", "until=sft")
        with prefect_api.client(self.url) as client:
            runs = client.read_flow_runs()
        new = {run.id for run in runs if not run.auto_scheduled} - set(self.begun)
        self.begun += new
        return new.pop()

    def command(self, *arguments: str) -> str:
        return machine.call_prefect(self.home, self.url, *arguments)

    def state(self, run: UUID) -> str:
        with prefect_api.client(self.url) as client:
            state = client.read_flow_run(run).state
        assert state is not None
        return str(state.name)

    def record(self, run: UUID) -> RunRecord:
        """Record of a run in the store."""
        files = (self.store / "runs").glob("*.json")
        records = [RunRecord.model_validate_json(file.read_text()) for file in files]
        return next(record for record in records if record.flow_run_id == str(run))

    def stage_states(self, run: UUID) -> dict[str, str]:
        """State names of the newest task run of each stage."""
        with prefect_api.client(self.url) as client:
            tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])))
        newest = sorted(tasks, key=lambda task: task.expected_start_time)
        return {task.name: str(task.state_name) for task in newest}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    home = tmp_path_factory.mktemp("home")
    try:
        running = machine.up(home, prefect_api.free_port())
        yield Place(home, running.url, tmp_path_factory.mktemp("artifacts") / "store")
    finally:
        machine.down(home)


def wait_for(true: Callable[[], bool], what: str, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds:g} s"
        time.sleep(0.05)


def training(sandbox: Sandbox, step: int) -> tuple[psutil.Process, psutil.Process]:
    """Processes of the flow and of its SFT, once that has done `step` steps."""
    wait_for(lambda: sandbox.last_step("sft") >= step and bool(sandbox.processes()), f"step {step} of SFT")
    (child,) = sandbox.processes()
    return psutil.Process(json.loads((sandbox.folder("sft") / "work" / "job.json").read_text())["parent_pid"]), child


def test_cancel_ends_the_training_with_a_checkpoint_within_ten_seconds(place: Place) -> None:
    sandbox = place.sandbox(seed=1)
    run = place.start(sandbox)
    _, child = training(sandbox, step=3)
    place.command("flow-run", "cancel", str(run))
    asked = time.monotonic()
    _, alive = psutil.wait_procs([child], timeout=10)
    assert not alive, f"the training outlived the cancellation by {time.monotonic() - asked:.0f} s"
    newest = newest_checkpoint(sandbox.folder("sft") / "work" / "checkpoints", full=True)
    # No checkpoint was due before step 1000: this one was made for the cancellation, at the last step that was done.
    assert newest is not None and newest[0] == sandbox.last_step("sft") >= 3
    wait_for(lambda: place.state(run) == "Cancelled", "the state Cancelled")
    # Record, report and Prefect's tasks say it too.
    wait_for(lambda: place.record(run).state != "Running", "the end in the record", 30)
    record = place.record(run)
    assert (record.state, record.outcomes["sft"], record.outcomes["world"]) == ("Cancelled", "Cancelled", "Completed")
    summary = json.loads(Path(record.report_path).with_name("summary.json").read_text())
    assert (summary["state"], summary["error"]) == ("Cancelled", "cancelled")
    assert {stage["node"]: stage["outcome"] for stage in summary["stages"]}["sft"] == "Cancelled"
    wait_for(lambda: place.stage_states(run).get("sft") == "Cancelled", "the state of the task", 30)
    assert not {"Running", "Pending"} & set(place.stage_states(run).values())


def test_retry_of_a_failed_run_takes_what_is_finished_and_resumes_what_was_interrupted(place: Place) -> None:
    sandbox = place.sandbox(seed=2, **{"compute.stages.sft.save_steps": 10})
    run = place.start(sandbox)
    _, child = training(sandbox, step=12)
    child.kill()
    wait_for(lambda: place.state(run) == "Failed", "the state Failed")
    assert place.stage_states(run)["sft"] == "Failed"

    place.command("flow-run", "retry", str(run))
    wait_for(lambda: place.state(run) == "Completed", "the state Completed")
    states = place.stage_states(run)
    assert states.pop("sft") == "Resumed"
    assert set(states) >= {"world", "dataset-sft", "base-model"} and set(states.values()) == {"Cached"}
    assert sandbox.manifest("sft").resumed_from_steps[-1] >= 10


def test_sigkill_of_the_worker_leaves_no_training_and_the_next_run_goes_on(place: Place) -> None:
    sandbox = place.sandbox(seed=3, **{"compute.stages.sft.save_steps": 10})
    run = place.start(sandbox)
    flow, child = training(sandbox, step=12)
    worker = machine.running(place.home, "worker")
    assert worker is not None
    os.kill(worker.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs([child], timeout=15)
    assert not alive, "a training process outlived its worker"
    _, alive = psutil.wait_procs([flow], timeout=60)
    assert not alive, "a flow run outlived its worker"
    assert place.state(run) in ("Crashed", "Failed")

    machine.up(place.home)
    again = place.start(place.sandbox(seed=3, **FAST))
    wait_for(lambda: place.state(again) == "Completed", "the state Completed")
    assert place.stage_states(again)["sft"] == "Resumed"
    assert sandbox.manifest("sft").resumed_from_steps[-1] >= 10
    # The killed attempt's task runs do not stay Running.
    wait_for(lambda: not {"Running", "Pending"} & set(place.stage_states(run).values()), "the end of its task runs", 30)


def test_sigkill_of_the_server_leaves_the_training_alone_and_up_goes_on_with_it(place: Place) -> None:
    sandbox = place.sandbox(seed=4, **{"sft.max_steps": 400})
    run = place.start(sandbox)
    flow, child = training(sandbox, step=3)
    server, worker = (machine.running(place.home, name) for name in ("server", "worker"))
    assert server is not None and worker is not None
    os.kill(server.pid, signal.SIGKILL)
    wait_for(lambda: machine.running(place.home, "server") is None, "the end of the server", 10)
    step = sandbox.last_step("sft")
    with pytest.raises(machine.MachineError, match=f"on port {server.port}, not .*`smoltulu down` first"):
        machine.up(place.home, prefect_api.free_port())

    said: list[str] = []
    running = machine.up(place.home, say=said.append)
    assert (running.url, running.started) == (place.url, ("server",)), said
    assert machine.running(place.home, "worker") == worker
    assert flow.is_running() and child.is_running() and sandbox.last_step("sft") >= step
    wait_for(lambda: place.state(run) == "Completed", "the state Completed")
    manifest = sandbox.manifest("sft")
    assert manifest.resumed_from_steps == () and place.record(run).state == "Completed"


def test_a_killed_flow_leaves_no_task_run_running_after_the_next_attempt(place: Place) -> None:
    sandbox = place.sandbox(seed=5)
    run = place.start(sandbox)
    flow, child = training(sandbox, step=3)
    flow.kill()
    psutil.wait_procs([flow, child], timeout=15)
    wait_for(lambda: place.state(run) == "Crashed", "the state Crashed", 60)
    assert place.stage_states(run)["sft"] == "Running"  # a killed process reports nothing
    with prefect_api.client(place.url) as client:
        assert prefect_api.close_task_runs(client) >= 1
    assert place.stage_states(run)["sft"] == "Crashed"
    with prefect_api.client(place.url) as client:
        assert prefect_api.close_task_runs(client) == 0
