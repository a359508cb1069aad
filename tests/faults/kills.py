"""Faults that end processes with SIGKILL: at random instants, at exact file-system events, several times in a row.

When is drawn as a share: of a stage's time, of its events. What that is on this machine, the unbroken run says.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil

from smoltulu.artifacts.checkpoints import CHECKPOINT_MARKER
from tests.faults.sandbox import TRAINERS, Event, Run, Sandbox, limits

_POLL_SECONDS = 0.005
_TOO_SHORT_SECONDS = 0.02
#: How a run says that the process of a stage was killed.
_TOLD = ("was killed by signal 9", "its process ended with status")


@dataclass
class Result:
    """What came of one fault.

    num_kills   processes groups that were ended with SIGKILL; 0 for other faults, or where the run was over before
    lost_steps  optimizer steps that were done twice, at most over the kills of this fault; `limit` one interval
    problems    what is wrong: results, recovery, messages
    at          when exactly it happened, where a share was drawn
    """

    num_kills: int = 0
    lost_steps: int = 0
    limit: int = 0
    num_orphans: int = 0
    problems: list[str] = field(default_factory=list)
    is_missed: bool = False
    skipped: str = ""
    at: str = ""


#: Tries a fault in a sandbox, given the unbroken run.
Attempt = Callable[[Sandbox, Sandbox], Result]


@dataclass(frozen=True)
class Victim:
    """Who is hit in a run: the process of the recipe, the process of its stage, both, or the last rank of its stage."""

    name: str

    def kill(self, run: Run, child: psutil.Process | None) -> bool:
        """Whether somebody was still there to be killed."""
        return bool(self.send(signal.SIGKILL, run, child))

    def send(self, number: signal.Signals, run: Run, child: psutil.Process | None) -> list[int]:
        """Send a signal; the processes that were still there to get it."""
        targets = []
        if self.name in ("child", "both") and child is not None:
            targets.append(child.pid)
        if self.name == "rank" and child is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                targets += [process.pid for process in child.children()][-1:]
        if self.name in ("parent", "both"):
            targets.append(run.process.pid)
        hit = []
        for pid in targets:
            # A zombie, or one that ended this instant, is nobody.
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    os.kill(pid, number)
                    hit.append(pid)
        return hit


class Watch:
    """Follows a run to the stage that a fault is for, and its optimizer steps."""

    def __init__(self, sandbox: Sandbox, run: Run, node: str) -> None:
        self.sandbox, self.run, self.node = sandbox, run, node
        self.last_step = sandbox.last_step(node)
        self.child: psutil.Process | None = None
        self.began = 0.0

    def look(self) -> bool:
        """Note steps and the stage's process; whether the run goes on."""
        if self.child is None:
            self._find_child()
        self.last_step = max(self.last_step, self.sandbox.last_step(self.node))
        if time.monotonic() - self.run.popen_time > limits.run:
            self.run.process.kill()
            raise AssertionError(f"the run did not end; {self.run.output}")
        return self.run.process.poll() is None

    def until(self, reached: Callable[[], bool]) -> bool:
        """Whether `reached` came true before the run ended."""
        while self.look():
            if reached():
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def end(self) -> None:
        """Follow to the end of the run."""
        self.until(lambda: False)
        self.run.process.wait()
        self.last_step = max(self.last_step, self.sandbox.last_step(self.node))

    def _find_child(self) -> None:
        job = self.sandbox.folder(self.node) / "work" / "job.json"
        try:
            if json.loads(job.read_text())["parent_pid"] != self.run.process.pid:
                return
            for process in psutil.Process(self.run.process.pid).children():
                if str(job) in process.cmdline():
                    self.child, self.began = process, time.monotonic()
        except (OSError, ValueError, psutil.NoSuchProcess, psutil.AccessDenied):
            return


def at_a_share(sandbox: Sandbox, baseline: Sandbox, node: str, victim: str, share: float) -> Result:
    """Kill after a share of the time that the stage took in the unbroken run."""
    seconds = share * baseline.manifest(node).duration_seconds
    result = at_an_instant(sandbox, baseline, node, victim, seconds)
    result.at = f"{seconds:.2f} s after its start"
    return result


def at_an_instant(sandbox: Sandbox, baseline: Sandbox, node: str, victim: str, seconds: float) -> Result:
    """Kill `seconds` after the stage's process began."""

    def kill(run: Run) -> Watch:
        watch = Watch(sandbox, run, node)
        if watch.until(lambda: watch.child is not None and time.monotonic() - watch.began >= seconds):
            Victim(victim).kill(run, watch.child)
        return watch

    result = kill_and_compare(sandbox, baseline, node, [kill])
    if not result.is_missed or seconds < _TOO_SHORT_SECONDS:
        return result
    # The baseline was made on a busier machine.
    return at_an_instant(sandbox.beside("sooner"), baseline, node, victim, seconds / 3)


def at_steps(sandbox: Sandbox, baseline: Sandbox, node: str, victim: str, steps: list[int], seconds: float) -> Result:
    """Kill as soon as the training has done a step, and again in the next run at the next one of `steps`."""

    def at(step: int) -> Callable[[Run], Watch]:
        def kill(run: Run) -> Watch:
            watch = Watch(sandbox, run, node)
            if watch.until(lambda: watch.child is not None and sandbox.last_step(node) >= step):
                time.sleep(seconds)
                watch.last_step = max(watch.last_step, sandbox.last_step(node))
                Victim(victim).kill(run, watch.child)
            return watch

        return kill

    return kill_and_compare(sandbox, baseline, node, [at(step) for step in steps])


def at_drawn_event(sandbox: Sandbox, baseline: Sandbox, node: str, of: str, seed: str) -> Result:
    """Kill at an event that the seed draws from those of an unbroken run.

    of  commit, checkpoint, begin (before the stage's process), rank, or any
    """
    rng = random.Random(seed)
    event = rng.choice(_of(of, baseline.events(node), rng))
    delay = rng.choice((0.0, 0.0, rng.random() * 0.02))
    fault = {"role": event.role, "part": event.part, "nth": event.nth, "delay": delay, "both": rng.random() < 0.3}
    result = at_event(sandbox, baseline, node, fault)
    who = f"{event.role} and the other" if fault["both"] else event.role
    result.at = f"{who}, event {event.nth} on {event.part} + {delay * 1000:.1f} ms"
    return result


def _of(of: str, events: list[Event], rng: random.Random) -> list[Event]:
    """The events that a kill may come at."""
    if of == "checkpoint":
        return [event for event in events if event.part == "/work/checkpoints" and event.role == "child"]
    if of == "rank":
        return [event for event in events if event.role == "rank"]
    parents = [event for event in events if event.role == "parent" and not event.part.startswith("/work/l")]
    commit = next(i for i, event in enumerate(parents) if event.part.startswith("/work/output/"))
    if of == "commit":
        return parents[commit:]
    if of == "begin":
        return parents[:commit]
    # Each part as often as another: most events are on checkpoints.
    part = rng.choice(sorted({(event.role, event.part) for event in events}))
    return [event for event in events if (event.role, event.part) == part]


def at_event(sandbox: Sandbox, baseline: Sandbox, node: str, fault: dict[str, Any]) -> Result:
    """Have the victim end itself at its n-th file-system event below the node's folder, see killer/sitecustomize.py."""
    return kill_and_compare(
        sandbox, baseline, node, [lambda run: Watch(sandbox, run, node)], {**fault, "under": str(sandbox.folder(node))}
    )


def before_the_marker(sandbox: Sandbox, baseline: Sandbox, node: str, victim: str, nth: int) -> Result:
    """Kill when the nth checkpoint's folder is there and its completion marker is not."""

    def unmarked() -> bool:
        folders = sorted((sandbox.folder(node) / "work" / "checkpoints").glob("checkpoint-*"))
        return len(folders) >= nth and any(not (folder / CHECKPOINT_MARKER).exists() for folder in folders)

    def kill(run: Run) -> Watch:
        watch = Watch(sandbox, run, node)
        if watch.until(lambda: watch.child is not None and unmarked()):
            Victim(victim).kill(run, watch.child)
        return watch

    return kill_and_compare(sandbox, baseline, node, [kill])


def kill_and_compare(
    sandbox: Sandbox,
    baseline: Sandbox,
    node: str,
    kills: list[Callable[[Run], Watch]],
    fault: dict[str, Any] | None = None,
) -> Result:
    """Make `node` anew, one run per kill, then to the end; compare everything with the baseline."""
    sandbox.copy_from(baseline, without=node)
    result = Result(limit=sandbox.save_steps(node) if node in TRAINERS else 0)
    done = 0
    for kill in kills:
        run = sandbox.start(fault)
        watch = kill(run)
        watch.end()
        # Counted first: who is alive now must not be hidden by what follows.
        result.num_orphans += sandbox.num_orphans()
        done = _count_lost(result, run, node, done)
        if run.process.returncode == 0:
            result.is_missed = True
            break
        result.num_kills += 1
        done = max(done, watch.last_step)
        if run.process.returncode > 0 and not any(text in run.text for text in _TOLD):
            result.problems.append(f"the failure is not told: {run.text[-300:]}")
    return finish(sandbox, baseline, node, result, done)


def finish(sandbox: Sandbox, baseline: Sandbox, node: str, result: Result, done: int = 0, **overrides: Any) -> Result:
    """Run to the end and compare. `done`: optimizer steps of `node` that were done before."""
    code, run = sandbox.run(**overrides)
    if code:
        result.problems.append(f"the next run failed: {run.text[-600:]}")
        return result
    outcomes = run.outcomes()
    wanted = {node, *sandbox.left_out}
    remade = [name for name, outcome in outcomes.items() if outcome != "cached" and name not in wanted]
    if remade:
        result.problems.append(f"made again without need: {', '.join(remade)}")
    if outcomes.get(node) != "cached":
        _count_lost(result, run, node, done)
    if result.lost_steps > result.limit:
        result.problems.append(f"{result.lost_steps} steps lost, {result.limit} between checkpoints")
    result.problems += sandbox.differences(baseline)
    return result


def _count_lost(result: Result, run: Run, node: str, done: int) -> int:
    """Note what a run did again of `done` steps; how many are done where it went on from, if it got that far."""
    started = resumed_step(run, node)
    if started is None or node not in TRAINERS:
        return done
    result.lost_steps = max(result.lost_steps, done - started)
    return started


def resumed_step(run: Run, node: str) -> int | None:
    """The optimizer step that a run's training began at; None where it did not begin."""
    if match := re.search(rf"^{node}: resumes at step ([\d,]+) of", run.text, re.MULTILINE):
        return int(match[1].replace(",", ""))
    return 0 if re.search(rf"^{node}: step 0 of", run.text, re.MULTILINE) else None
