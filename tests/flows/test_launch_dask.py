"""A recipe's stages on Dask workers: each on one that has the GPUs for it, and more GPUs than any has are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smoltulu.flows.machine.dask_workers import asking_for, check_devices, offered
from smoltulu.schemas.artifact import Manifest
from tests import ROOT
from tests.small_tiny import SMALL_TINY


def where_it_runs() -> str:
    from distributed import get_worker

    return str(get_worker().name)


def test_launch_on_dask_a_stage_goes_to_a_worker_that_says_it_has_its_gpus() -> None:
    distributed = pytest.importorskip("distributed")
    options: dict[str, Any] = {"nthreads": 1}
    spec = {
        "scheduler": {"cls": distributed.Scheduler, "options": {"dashboard_address": None, "port": 0}},
        "workers": {
            "cpus": {"cls": distributed.Worker, "options": options},
            "two": {"cls": distributed.Worker, "options": options | {"resources": {"GPU": 2}}},
            "four": {"cls": distributed.Worker, "options": options | {"resources": {"GPU": 4}}},
        },
    }
    with distributed.SpecCluster(**spec) as cluster, distributed.Client(cluster) as client:
        on_workers = offered(client)
        assert sorted(on_workers) == [2, 4]
        for num_devices, allowed in ((3, {"four"}), (1, {"two", "four"}), (0, {"cpus", "two", "four"})):
            with asking_for(num_devices, on_workers):
                futures = [client.submit(where_it_runs, pure=False) for _ in range(4)]
            assert {future.result(timeout=30) for future in futures} <= allowed


def test_launch_on_dask_refuses_what_would_wait_for_ever() -> None:
    assert check_devices([2.0, 4.0], {"sft": 4, "dpo": 1}) is None
    assert check_devices([], {"sft": 0}) is None and check_devices([1.0], {}) is None
    with pytest.raises(ValueError, match="sft needs 8 GPUs of one machine, and Dask workers have at most 4"):
        check_devices([2.0, 4.0], {"dpo": 1, "sft": 8})
    said = check_devices([], {"sft": 1})
    assert said is not None and "no Dask worker says that it has GPUs" in said and "--resources GPU=N" in said


_FLOW = """
import json, sys
from prefect_dask import DaskTaskRunner
from smoltulu.flows.pipeline import smoltulu
if __name__ == "__main__":
    cluster = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    for overrides, more in zip(map(json.loads, sys.argv[1:]), ({"resources": {"GPU": 1}}, {})):
        runner = DaskTaskRunner(cluster_kwargs=cluster | more)
        print(smoltulu.with_options(task_runner=runner)("tiny", overrides, "sft", return_state=True))
"""
RUN: dict[str, Any] = {
    **{field: value for field, value in SMALL_TINY.items() if not field.startswith(("dpo.", "rlvr."))},
    **dict.fromkeys(("reward_model", "dpo", "rlvr", "pass_rates", "publish", "verifier_audit", "evaluation")),
    **dict.fromkeys(("contamination", "data.verified_eval", "data.preference_eval")),
    # inline: in the workers' own processes, which have imported everything after the first stage.
    "compute": {"device": "auto", "num_threads": 1, "min_free_disk_gb": 0, "launcher": "inline"},
    "sft.max_steps": 2,
}


def run(folder: Path, *overrides: dict[str, Any]) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | {
        "PREFECT_HOME": str(folder / "prefect"), "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300", "SMOLTULU_HOME": str(folder / "home"),
        "SMOLTULU_STORE": str(folder / "store"), "PYTHONPATH": f"{ROOT}/src:{ROOT}", "COLUMNS": "200",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", _FLOW, *map(json.dumps, overrides)],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
        check=True,
    ).stdout  # fmt: skip


@pytest.mark.slow
def test_launch_on_dask_a_recipe_runs_whole_and_its_failures_come_back(tmp_path: Path) -> None:
    pytest.importorskip("prefect_dask")
    gate = {"num_prompts": 2, "max_new_tokens": 8, "min_stopped_share": 1}
    out = run(tmp_path, RUN, RUN | {"sft.gate": gate, "sft.max_steps": 3})
    assert out.count("stages cached; report:") == 2, out[-4000:]
    (file,) = (tmp_path / "store" / "sft").glob("*/gen-0001/manifest.json")
    manifest = Manifest.model_validate_json(file.read_text())
    assert manifest.forecast is not None and manifest.forecast.num_steps == 2 == manifest.outputs["num_steps"]
    pages = [page.read_text() for page in (tmp_path / "reports").glob("*/report.html")]
    assert any("Forecast and fact" in page and "steps 2, were 2" in page for page in pages)
    assert "no Dask worker says" in out
    (failed,) = (line for line in out.splitlines() if line.startswith("Failed("))
    assert "RunFailed: " in failed and "trained a second time" in failed, failed
