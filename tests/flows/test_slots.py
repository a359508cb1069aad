"""Stages wait for a slot before they are submitted: Prefect shows as Running only what runs."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterState, TaskRunFilterStateType
from prefect.client.schemas.objects import StateType
from prefect.testing.utilities import prefect_test_harness

from smoltulu.flows import pipeline
from smoltulu.schemas.artifact import ArtifactReference
from smoltulu.tasks.engine.launch import StageFailed
from smoltulu.tasks.job import Job


def unfinished() -> list[str]:
    """Names of the task runs that Prefect shows as Running or Pending."""
    types = TaskRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])
    with get_client(sync_client=True) as server:
        runs = server.read_task_runs(task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=types)))
    return [run.name for run in runs]


@pytest.mark.parametrize("num_slots", [1, 2])
def test_only_what_has_a_slot_is_running_in_prefect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_slots: int
) -> None:
    active: set[str] = set()
    most: list[int] = []
    shown: list[list[str]] = []
    lock = threading.Lock()

    def run_stage(job: Job, *_: Any) -> ArtifactReference:
        with lock:
            active.add(job.node)
            most.append(len(active))
        if job.node in ("dataset-rlvr", "preflight-sft", "evaluation-sft"):
            time.sleep(1.5)  # Prefect learns of states by events,
            deadline = time.monotonic() + 30
            while len(names := unfinished()) > num_slots and time.monotonic() < deadline:
                time.sleep(0.2)  # and of an end later where the machine is busy
            shown.append(names)
            assert job.node in shown[-1]
        with lock:
            active.discard(job.node)
        if job.node == "reward-model":
            raise StageFailed("reward-model: as the test wants")
        outputs = {name: "x" for name in job.stage.outputs.model_fields}
        return ArtifactReference(
            stage=job.stage.name, node=job.node, key="0" * 64, digest="0" * 64, path=str(tmp_path), outcome="Cached",
            outputs=outputs,
        )  # fmt: skip

    monkeypatch.setattr(pipeline, "run_stage", run_stage)
    overrides = {"compute.store": str(tmp_path / "store"), "compute.max_parallel_stages": num_slots, "publish": None}
    with prefect_test_harness(server_startup_timeout=120):
        state = pipeline.smoltulu("tiny", overrides, "dpo", return_state=True)
    assert state.is_failed() and "reward-model: as the test wants" in str(state.message)
    assert max(most) == num_slots
    assert len(shown) == 3 and all(len(names) <= num_slots for names in shown), shown
