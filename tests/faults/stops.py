"""Faults that stop processes (SIGSTOP) and let them go on: nothing is lost, and there are never two producers."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter

from smoltulu.artifacts.shared.lease import Ending
from smoltulu.artifacts.store import Found
from tests.faults import shared
from tests.faults.kills import Result, Victim, Watch, finish
from tests.faults.sandbox import Run, Sandbox, limits

#: Longer than a lease is kept without a heartbeat (60 s), and than a heartbeat (15 s).
LONG, SHORT = 75.0, 20.0


def stopped(sandbox: Sandbox, baseline: Sandbox, node: str, victim: str, step: int, seconds: float) -> Result:
    """Stop for a while, at a step, while another run waits for the same artifact: the one that was stopped makes it."""
    sandbox.copy_from(baseline, without=node)
    run = sandbox.start()
    watch = Watch(sandbox, run, node)
    result = Result()
    if not watch.until(lambda: watch.child is not None and sandbox.last_step(node) >= step):
        return Result(is_missed=True)
    hit = Victim(victim).send(signal.SIGSTOP, run, watch.child)
    other = sandbox.start()
    _until_it_waits(other)
    time.sleep(seconds)
    if isinstance(sandbox.found(node), Found):
        result.is_missed = True
    _go_on(hit)
    codes = [run.wait(), other.wait()]
    outcomes = [one.outcomes().get(node) for one in (run, other)]
    if codes != [0, 0] or outcomes != ["completed", "cached"]:
        result.problems.append(f"status {codes}, outcomes {outcomes}: {run.text[-300:]} {other.text[-300:]}")
    result.num_orphans = sandbox.num_orphans()
    return finish(sandbox, baseline, node, result)


def stopped_then_killed(sandbox: Sandbox, baseline: Sandbox, node: str, victim: str, step: int) -> Result:
    """Stop the stage's process or one of its ranks, kill the recipe's: the kernel ends those that are stopped too."""
    sandbox.copy_from(baseline, without=node)
    run = sandbox.start()
    watch = Watch(sandbox, run, node)
    result = Result(limit=sandbox.save_steps(node))
    if watch.until(lambda: watch.child is not None and sandbox.last_step(node) >= step):
        Victim(victim).send(signal.SIGSTOP, run, watch.child)
        result.num_kills = int(Victim("parent").kill(run, watch.child))
    watch.end()
    result.is_missed = not result.num_kills
    result.num_orphans = sandbox.num_orphans()
    return finish(sandbox, baseline, node, result, watch.last_step)


def stopped_with_a_lease(
    sandbox: Sandbox, baseline: Sandbox, node: str, victim: str, step: int, seconds: float
) -> Result:
    """Stop one machine while another, with a store of its own, waits for its lease: one of them publishes."""
    machines = [sandbox.beside("one"), sandbox.beside("other")]
    folder = sandbox.home / "shared"
    shared_key = shared.key_folder(folder, sandbox, node)
    left_out = shared.key_folder(baseline.home / "shared", baseline, node)
    if (baseline.home / "shared").exists():
        shutil.copytree(
            baseline.home / "shared",
            folder,
            ignore=lambda parent, names: [name for name in names if f"{parent}/{name}" == str(left_out)],
        )
    for machine in machines:
        machine.copy_from(baseline, without=node)
    remote = {"compute.remote": str(folder)}
    run = machines[0].start(**remote)
    watch = Watch(machines[0], run, node)
    result = Result()
    if not watch.until(lambda: watch.child is not None and machines[0].last_step(node) >= step):
        return Result(is_missed=True)
    hit = Victim(victim).send(signal.SIGSTOP, run, watch.child)
    other = machines[1].start(**remote)
    _until_it_waits(other)
    until = time.monotonic() + seconds
    while time.monotonic() < until and other.process.poll() is None:
        time.sleep(0.1)
    _go_on(hit)
    codes = [run.wait(), other.wait()]
    if codes != [0, 0]:
        result.problems.append(f"status {codes}: {run.text[-300:]} {other.text[-300:]}")
    endings = Counter(
        Ending.model_validate_json(path.read_bytes()).kind for path in sorted(shared_key.glob("turns/*.end"))
    )
    made = [one.outcomes().get(node) for one in (run, other)]
    result.at = f"{'taken over' if endings['fenced'] else 'not taken over'}, outcomes {', '.join(map(str, made))}"
    if endings["published"] != 1:
        result.problems.append(f"published {endings['published']} times: {result.at}; {dict(endings)}")
    result.num_orphans = sum(machine.num_orphans() for machine in machines)
    for machine in machines:
        result = finish(machine, baseline, "", result, **remote)
    return finish(sandbox.beside("third"), baseline, "", result, **remote)


def _until_it_waits(run: Run) -> None:
    """Until a run waits for another one, or is over."""
    deadline = time.monotonic() + limits.run
    while run.process.poll() is None and "waiting for" not in run.text and time.monotonic() < deadline:
        time.sleep(0.05)


def _go_on(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
