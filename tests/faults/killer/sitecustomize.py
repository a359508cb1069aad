"""What a victim of the fault campaign imports first: it ends its own process at a chosen file-system event.

Python imports `sitecustomize` at its start from PYTHONPATH, so nothing in the code under test knows of this. The
environment variable SMOLTULU_FAULT holds JSON:
  role      parent (a recipe, a command, a flow), child (tasks.engine.child) or rank (a further process of a training)
  record    file that every event is appended to, as "role <tab> event <tab> path"
  under     only events on a path below this folder count ...
  part      ... and of this part of it, see `part_of`; left out: of any
  nth       the event (from 1) at which to kill
  tally     file that gets a byte per event: all processes of the role count together; left out: each for itself
  delay     seconds from the event to the kill: it then hits the write that the event announced, or what follows it
  full      only removals count, and only while the file system of their path has less than so many bytes free
  both      kill the other one of parent and child too, first
  other     kill that one alone
  mark      file that is made before anybody is killed
  shift     seconds by which this process's wall clock is wrong
  stage     the stage whose processes have less address space, `memory` bytes
"""

import json
import os
import re
import signal
import sys
import threading
import time
from typing import Any

_ROLES = {
    "smoltulu.tasks.engine.child": "child",
    "smoltulu.flows.local": "parent",
    "smoltulu.flows.cli.main": "parent",
    "tests.faults.served": "parent",
}
_PATHS = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.utime": 1, "os.link": 2, "shutil.rmtree": 1}
_REMOVALS = ("os.remove", "os.rmdir", "shutil.rmtree")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def part_of(path: str) -> str:
    """A path below a key's folder without what differs from run to run: process ids, times, digests."""
    part = re.sub(r"[-.]?\d{4,}.*", "", path)
    return re.sub(r"(/work/(checkpoints|datasets|logs))/.*", r"\1", part)


def _text(path: Any) -> str | None:
    if isinstance(path, int) or path is None:
        return None
    try:
        return os.fsdecode(path)
    except TypeError:
        return None


def _paths(event: str, arguments: tuple[Any, ...]) -> list[str]:
    """Paths that an event is about to change."""
    if event == "open":
        path, mode, flags = arguments
        writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & _WRITING)
        found = [_text(path)] if writes else []
    else:
        found = [_text(path) for path in arguments[: _PATHS.get(event, 0)]]
    return [path for path in found if path is not None]


def _children() -> list[int]:
    pids = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/children") as file:
            pids += [int(pid) for pid in file.read().split()]
    return pids


def _free(path: str) -> int:
    """Bytes that are free where a path is, or is about to be."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    there = os.statvfs(path)
    return there.f_bavail * there.f_frsize


class Killer:
    """The audit hook."""

    def __init__(self, role: str, fault: dict[str, Any]) -> None:
        self.role, self.fault = role, fault
        self.num_events = 0
        self.is_busy = threading.local()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if (event != "open" and event not in _PATHS) or getattr(self.is_busy, "now", False):
            return
        self.is_busy.now = True
        try:
            for path in _paths(event, arguments):
                self._seen(event, path)
        finally:
            self.is_busy.now = False

    def _seen(self, event: str, path: str) -> None:
        if "record" in self.fault:
            with open(self.fault["record"], "a") as file:
                file.write(f"{self.role}\t{event}\t{path}\n")
            return
        under = self.fault["under"]
        if self.role != self.fault["role"] or not path.startswith(f"{under}/"):
            return
        if self.fault.get("part", (part := part_of(path[len(under) :]))) != part:
            return
        if "full" in self.fault and (event not in _REMOVALS or _free(path) >= self.fault["full"]):
            return
        self.num_events = self._count()
        if self.num_events != self.fault["nth"]:
            return
        if delay := self.fault.get("delay", 0.0):
            threading.Thread(target=lambda: (time.sleep(delay), self._kill()), daemon=True).start()
        else:
            self._kill()

    def _count(self) -> int:
        if "tally" not in self.fault:
            return self.num_events + 1
        with open(self.fault["tally"], "ab") as file:
            file.write(b".")
            return file.tell()

    def _kill(self) -> None:
        if "mark" in self.fault:
            os.close(os.open(self.fault["mark"], os.O_CREAT))
        if self.fault.get("both") or self.fault.get("other"):
            for pid in [os.getppid()] if self.role == "child" else _children():
                os.kill(pid, signal.SIGKILL)
        if not self.fault.get("other"):
            os.kill(os.getpid(), signal.SIGKILL)


def shift_clock(seconds: float) -> None:
    """Have this process's wall clock be wrong, also for modules that import it by name later."""
    import datetime

    true_time, true_time_ns, true_datetime = time.time, time.time_ns, datetime.datetime

    class ShiftedDatetime(true_datetime):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return true_datetime.now(tz) + datetime.timedelta(seconds=seconds)

        @classmethod
        def utcnow(cls) -> Any:
            return true_datetime.utcnow() + datetime.timedelta(seconds=seconds)

    time.time = lambda: true_time() + seconds
    time.time_ns = lambda: true_time_ns() + int(seconds * 1e9)
    datetime.datetime = ShiftedDatetime  # type: ignore[misc]


def limit_memory(stage: str, num_bytes: int) -> None:
    """Where this is a process of `stage`, have allocations beyond `num_bytes` of address space fail."""
    import resource

    with open(sys.orig_argv[-1]) as file:
        if json.load(file)["stage"] == stage:
            resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))


def _install() -> None:
    fault = json.loads(os.environ.get("SMOLTULU_FAULT") or "{}")
    role = next((role for module, role in _ROLES.items() if module in sys.orig_argv), None)
    if not fault or role is None:
        return
    if role == "child" and os.environ.get("RANK", "0") != "0":
        role = "rank"
    if role == "child" and "memory" in fault:
        limit_memory(fault["stage"], fault["memory"])
    if "shift" in fault and fault["role"] in (role, "both"):
        shift_clock(fault["shift"])
    if "record" in fault or "nth" in fault:
        sys.addaudithook(Killer(role, fault))


_install()
