"""What kills of commands need: the moment, an unbroken run to measure it by, and what must hold after it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from smoltulu.artifacts.store import Found, Missing
from tests.faults.kills import Result
from tests.faults.sandbox import KILLER, PROJECT, Run, Sandbox

#: Everything may go that nothing names.
GC = ("gc", "--yes", "--keep-days", "0", "--keep-runs", "0", "--no-keep-published")
DAY = 86_400.0


@dataclass(frozen=True)
class Moment:
    """When a command is killed, as a share of what an unbroken one does: of its file-system events, or of its time.

    role   whose event: the command's (parent), or its stages' (child); none: at an instant
    delay  seconds from the event to the kill
    """

    role: str | None
    share: float
    delay: float = 0.0

    @classmethod
    def draw(cls, rng: random.Random, roles: tuple[str | None, ...] = ("parent", "parent", None)) -> Moment:
        return cls(rng.choice(roles), rng.random(), rng.choice((0.0, 0.0, rng.random() * 0.005)))

    def __str__(self) -> str:
        if self.role is None:
            return f"after {self.share:.0%} of its time"
        return f"{self.role}, after {self.share:.0%} of its file events + {self.delay * 1000:.1f} ms"


@dataclass
class Unbroken:
    """What a command did that nothing happened to."""

    code: int
    text: str
    seconds: float
    num_events: Counter[str] = field(default_factory=Counter)


def start(sandbox: Sandbox, command: list[str], fault: dict | None = None, **environment: str) -> Run:
    """Start `python -m ...` with the killer; what it prints goes to a file of its own."""
    sandbox.num_runs += 1
    sandbox.home.mkdir(parents=True, exist_ok=True)
    output = sandbox.home / f"run-{sandbox.num_runs}.txt"
    inherited = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(KILLER), str(PROJECT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "SMOLTULU_STORE": str(sandbox.root),
        "SMOLTULU_FAULT": json.dumps(fault or {}),
    }
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=PROJECT,
            env={**inherited, **sandbox.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    return Run(process, output)


def unbroken(sandbox: Sandbox, command: list[str], under: Path, **environment: str) -> Unbroken:
    """Run to the end; its file-system events below a folder are counted by role."""
    record = sandbox.home / "events.txt"
    began = time.monotonic()
    run = start(sandbox, command, {"record": str(record)}, **environment)
    done = Unbroken(run.wait(), run.text, time.monotonic() - began)
    for line in record.read_text().splitlines() if record.exists() else []:
        role, _, path = line.split("\t")
        done.num_events[role] += path.startswith(f"{under}/")
    return done


def interrupt(
    sandbox: Sandbox, command: list[str], under: Path, moment: Moment, whole: Unbroken, **environment: str
) -> tuple[Result, Run]:
    """Run it once, killed at a moment of what `whole` did."""
    fault: dict = {}
    if moment.role is not None:
        nth = 1 + int(moment.share * whole.num_events[moment.role])
        fault = {"role": moment.role, "under": str(under), "nth": nth, "delay": moment.delay}
        fault |= {"both": moment.role == "child", "tally": str(sandbox.home / "tally")}
    run = start(sandbox, command, fault, **environment)
    if moment.role is None:
        # Without the recording it takes less time.
        deadline = time.monotonic() + 0.8 * moment.share * whole.seconds
        while run.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        run.process.kill()
    is_killed = run.wait() == -9
    return Result(num_kills=int(is_killed), is_missed=not is_killed, num_orphans=sandbox.num_orphans()), run


def cli(sandbox: Sandbox, *arguments: str) -> tuple[int, str]:
    """Exit status and output of a command of ours on the sandbox's store."""
    run = start(sandbox, command_of(sandbox, *arguments))
    return run.wait(), run.text


# What must hold


def command_of(sandbox: Sandbox, *arguments: str) -> list[str]:
    return ["smoltulu.flows.cli.main", *arguments, "--store", str(sandbox.root)]


def copied(sandbox: Sandbox, name: str) -> Sandbox:
    other = sandbox.beside(name)
    shutil.copytree(sandbox.root, other.root, symlinks=True)
    return other


def not_whole(sandbox: Sandbox, nodes: list[str], text: str) -> list[str]:
    """What is lost or damaged of artifacts that must be there."""
    problems = []
    for node in nodes:
        found = sandbox.found(node)
        faults = [found.reason] if isinstance(found, Missing) else sandbox.store.verify(found)
        problems += [f"lost after the kill: {node}: {fault}; {text[-200:]}" for fault in faults]
    return problems


def without_inputs(sandbox: Sandbox) -> list[str]:
    """Artifacts that are there although something that they were made from is not."""
    there = {node for node in sandbox.graph.nodes if isinstance(sandbox.found(node), Found)}
    return [
        f"{node} is there without {binding.node}"
        for node in there
        for binding in sandbox.graph.nodes[node].bindings().values()
        if binding.node not in there
    ]


def made_again(sandbox: Sandbox, baseline: Sandbox, nodes: set[str], result: Result) -> Result:
    """The recipe makes exactly these, with the bytes of the baseline."""
    code, run = sandbox.run()
    remade = {name for name, outcome in run.outcomes().items() if outcome != "cached"}
    if code or remade != nodes:
        result.problems.append(f"made again: {sorted(remade)}, not {sorted(nodes)}; status {code}: {run.text[-300:]}")
    result.problems += sandbox.differences(baseline)
    return result


def names_in(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}


def same_names(result: Result, sandbox: Sandbox, other: Sandbox) -> None:
    mine, theirs = names_in(sandbox.root), names_in(other.root)
    if mine != theirs:
        result.problems.append(f"left: {sorted(mine - theirs)[:5]}; gone: {sorted(theirs - mine)[:5]}")


def no_trash(sandbox: Sandbox, result: Result) -> None:
    """Once it is a day old, gc removes what a kill left; nothing of it stays for ever."""
    for path in sandbox.root.rglob("*"):
        os.utime(path, (time.time() - 2 * DAY,) * 2)
    code, text = cli(sandbox, "gc", "--yes")
    left = [name for name in names_in(sandbox.root) if Path(name).name.startswith((".", "work", "pull"))]
    if code or left:
        result.problems.append(f"left for ever: {sorted(left)[:5]}; {text[-200:]}")
