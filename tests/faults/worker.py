"""Faults with Prefect: the worker that started a flow run is ended with SIGKILL. One server for all of them."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil

from smoltulu.flows.machine import machine, prefect_api
from tests.faults.kills import Result, finish
from tests.faults.sandbox import Sandbox, limits


def killed_worker(sandbox: Sandbox, baseline: Sandbox, home: Path, node: str, step: int) -> Result:
    """Kill the worker when a training has done `step` steps: neither the training nor its flow run goes on for long."""
    sandbox.copy_from(baseline, without=node)
    port = None if machine.running(home, "server") else prefect_api.free_port()
    url = machine.up(home, port, say=lambda text: None).url
    overrides = {**sandbox.overrides, "compute.store": str(sandbox.root)}
    machine.call_prefect(home, url, "deployment", "run", "smoltulu/tiny", "-p", f"overrides={json.dumps(overrides)}")
    deadline = time.monotonic() + limits.run
    while sandbox.last_step(node) < step or not sandbox.processes():
        assert time.monotonic() < deadline, "the flow run did not reach its training"
        time.sleep(0.01)
    worker = machine.running(home, "worker")
    assert worker is not None
    flow = psutil.Process(json.loads((sandbox.folder(node) / "work" / "job.json").read_text())["parent_pid"])
    done = sandbox.last_step(node)
    os.kill(worker.pid, signal.SIGKILL)
    result = Result(num_kills=1, limit=sandbox.save_steps(node), num_orphans=sandbox.num_orphans())
    done = max(done, sandbox.last_step(node))
    _, alive = psutil.wait_procs([flow], timeout=limits.flow)
    result.num_orphans += len(alive)
    return finish(sandbox, baseline, node, result, done)
