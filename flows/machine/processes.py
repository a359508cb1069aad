"""Processes of this machine, told apart by id and start time, so that a recycled id is never taken for ours."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A background process of ours. `started` tells it from a later process with the same id."""

    pid: int
    started: str
    port: int = 0
    name: str = ""
    limit: int = 0

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return start_time(self.pid) == self.started


def start_time(pid: int) -> str | None:
    """Boot id and start tick of a process; None where it is gone or only waits to be reaped."""
    try:
        # Fields after the command name, which may itself hold spaces and brackets (proc(5)): state is the first,
        # starttime the twentieth.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return None if fields[0] in "ZX" else f"{boot}/{fields[19]}"


def environment_of(pid: int) -> dict[str, str] | None:
    """Environment with which a process was started; None where it may not be read."""
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def processes_with(name: str, value: str | None = None) -> list[Process]:
    """Live processes in whose environment `name` is set (to `value`, where given), except this one and its parents."""
    found = []
    mine = set(ancestors(os.getpid()))
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) in mine:
            continue
        started, environment = start_time(int(entry)), environment_of(int(entry))
        if started and environment and name in environment and value in (None, environment[name]):
            found.append(Process(int(entry), started))
    return found


def ancestors(pid: int) -> Iterator[int]:
    """The process and its parents, up to the first one."""
    while pid > 0:
        yield pid
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return


def flow_run_of(process: Process) -> str:
    """Id of the flow run that a process works for (its engine or a stage); empty where none."""
    return (environment_of(process.pid) or {}).get("PREFECT__FLOW_RUN_ID", "")


def send(processes: list[Process], number: int) -> None:
    """Signal those that still are who they were."""
    for process in processes:
        if process.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def wait_gone(processes: list[Process], seconds: float) -> list[Process]:
    """Wait for processes to end; returns those that did not."""
    deadline = time.monotonic() + seconds
    while True:
        left = [process for process in processes if process.alive]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)
