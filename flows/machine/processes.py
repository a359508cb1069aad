"""Processes of this machine, by psutil. It compares id and start time, so a recycled id is another process."""

from __future__ import annotations

import contextlib
import os
import time

import psutil


def alive(process: psutil.Process) -> bool:
    """Whether this process still runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def environment_of(process: psutil.Process) -> dict[str, str] | None:
    """Environment of a process at its start; None if it may not be read, or the process is gone."""
    try:
        return process.environ() if alive(process) else None
    except (psutil.Error, OSError):
        return None


def processes_with(name: str, value: str | None = None) -> list[psutil.Process]:
    """Live processes with `name` in their environment (set to `value`, if given), except this one and its parents."""
    mine = lineage(psutil.Process(os.getpid()))
    found = []
    for process in psutil.process_iter():
        environment = None if process.pid in mine else environment_of(process)
        if environment and name in environment and value in (None, environment[name]):
            found.append(process)
    return found


def lineage(process: psutil.Process) -> set[int]:
    """Ids of a process and of all its ancestors."""
    try:
        return {process.pid, *(parent.pid for parent in process.parents())}
    except psutil.Error:
        return {process.pid}


def flow_run_of(process: psutil.Process) -> str:
    """Id of the flow run that a process (its engine or a stage) belongs to; empty if none."""
    return (environment_of(process) or {}).get("PREFECT__FLOW_RUN_ID", "")


def send(processes: list[psutil.Process], number: int) -> None:
    """Send a signal to the processes that still exist."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def wait_gone(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait until processes end; returns those that did not."""
    # psutil.wait_procs also waits for zombies, which may never be reaped.
    deadline = time.monotonic() + seconds
    while (left := [process for process in processes if alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left
