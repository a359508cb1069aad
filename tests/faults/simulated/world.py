"""Machines in virtual time under a seeded scheduler: one thread runs at a time, and time passes when all sleep.

The code under test is the real one. While a `World` is entered, its calls of the file system, of the clock and of
threads lead here, from threads of the world only.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import importlib
import io
import os
import random
import threading
import time as real_time
import types
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from tests.faults.simulated.disk import Disk

_MODULES_WITH_TIME = ("files", "locks", "store", "shared.lease", "shared.objects", "shared.door")
_MODULES_WITH_POOLS = ("keys", "store", "shared.remote")


class Killed(BaseException):
    """Unwinds the thread of a process that is dead: whatever it tries from then on has no effect."""


@dataclass(eq=False)
class Machine:
    """A computer with a disk, or a server's."""

    name: str
    disk: Disk


@dataclass(eq=False)
class Process:
    """A program on a machine: its threads live and die together.

    plan   number of the call (from 1) -> what happens then: called before the call is done
    """

    pid: int
    machine: Machine
    plan: dict[int, Callable[[Process, str], None]] = field(default_factory=dict)
    is_dead: bool = False
    num_calls: int = 0
    stalled_until: float = 0.0
    calls: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Actor:
    """A thread."""

    process: Process
    name: str
    thread: threading.Thread | None = None
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    wakes_at: float = 0.0
    waits_for: Callable[[], bool] | None = None
    is_over: bool = False
    error: BaseException | None = None


_here = threading.local()


def here() -> Actor:
    """The thread of the world that asks."""
    actor: Actor = _here.actor
    return actor


class World:
    """Machines, processes, the clock and the dice."""

    def __init__(self, seed: int, home: Path, switching: float = 0.1) -> None:
        self.rng = random.Random(seed)
        self.home = home
        self.now = 0.0
        self.switching = switching
        self.machines: list[Machine] = []
        self.processes: list[Process] = []
        self.actors: list[Actor] = []
        self.errors: list[BaseException] = []
        self._back = threading.Semaphore(0)
        self._ticks = 0
        self._pids = 1000

    def machine(self, name: str) -> Machine:
        self.machines.append(Machine(name, Disk(self.home / name)))
        return self.machines[-1]

    def start(self, machine: Machine, program: Callable[[], None], plan: dict[int, Any] | None = None) -> Process:
        """A process that runs `program` from the next turn on."""
        self._pids += 1
        process = Process(self._pids, machine, plan or {})
        self.processes.append(process)
        self._begin(process, "main", program)
        return process

    def _begin(self, process: Process, name: str, program: Callable[[], None]) -> Actor:
        actor = Actor(process, name)

        def run() -> None:
            actor.go.acquire()
            _here.actor = actor
            try:
                if not process.is_dead:
                    program()
            except Killed:
                pass
            except BaseException as error:  # an uncaught error ends a process, not the simulation
                actor.error = error
            actor.is_over = True
            self._back.release()

        actor.thread = threading.Thread(target=run, daemon=True)
        actor.thread.start()
        self.actors.append(actor)
        return actor

    # The scheduler, in the thread of the test

    def run(self, until: Callable[[], bool], limit: float = 100_000.0) -> bool:
        """Let the threads run until that holds at a turn; False where the time is over, or all sleep for ever."""
        while not until():
            alive = [actor for actor in self.actors if not actor.is_over]
            # The dead first: a killed process frees its locks at once.
            ready = [actor for actor in alive if actor.process.is_dead] or [a for a in alive if self._is_ready(a)]
            if not ready:
                times = [max(a.wakes_at, a.process.stalled_until) for a in alive if a.wakes_at < float("inf")]
                if not times or min(times) > limit:
                    return False
                self.now = max(self.now, min(times))
                continue
            actor = self.rng.choice(ready)
            actor.go.release()
            self._back.acquire()
            if actor.is_over:
                self.actors.remove(actor)
                if actor.error is not None:
                    self.errors.append(actor.error)
        return True

    def _is_ready(self, actor: Actor) -> bool:
        if actor.process.stalled_until > self.now:
            return False
        return actor.wakes_at <= self.now or (actor.waits_for is not None and actor.waits_for())

    def kill(self, process: Process) -> None:
        process.is_dead = True

    def cut_power(self, machine: Machine) -> None:
        """All processes of a machine die; its disk keeps what is safe. From the test's thread, or a plan's."""
        for process in self.processes:
            if process.machine is machine:
                process.is_dead = True
        actor, _here.actor = getattr(_here, "actor", None), None
        machine.disk.cut_power(self.rng)
        _here.actor = actor

    # From the threads of the world

    def step(self, what: str) -> None:
        """A call is about to be done: what is planned for it happens, others may go first."""
        actor = here()
        process = actor.process
        self._require_alive(actor)
        process.num_calls += 1
        process.calls.append(what)
        if (planned := process.plan.get(process.num_calls)) is not None:
            planned(process, what)
            self._require_alive(actor)
        if self.rng.random() < self.switching or process.stalled_until > self.now:
            self._yield(actor)

    def sleep(self, seconds: float) -> None:
        self.wait(lambda: False, seconds)

    def wait(self, true: Callable[[], bool], timeout: float | None) -> bool:
        """Sleep until that holds or the time is over."""
        actor = here()
        self._require_alive(actor)
        if true():
            return True
        actor.waits_for = true
        actor.wakes_at = float("inf") if timeout is None else self.now + timeout
        self._yield(actor)
        return true()

    def _yield(self, actor: Actor) -> None:
        self._back.release()
        actor.go.acquire()
        actor.wakes_at, actor.waits_for = 0.0, None
        self._require_alive(actor)

    @staticmethod
    def _require_alive(actor: Actor) -> None:
        if actor.process.is_dead:
            raise Killed

    # Stand-ins

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Calls of the threads of this world lead here."""
        time = types.SimpleNamespace(
            monotonic=lambda: self.now if _inside() else real_time.monotonic(),
            monotonic_ns=lambda: self._tick(),
            time=lambda: 1.8e9 + self.now,
            time_ns=lambda: int((1.8e9 + self.now) * 1e9) + self._tick(),
            sleep=lambda seconds: self.sleep(seconds) if _inside() else real_time.sleep(seconds),
        )
        with contextlib.ExitStack() as stack:
            for name in _MODULES_WITH_TIME:
                module = importlib.import_module(f"smoltulu.artifacts.{name}")
                stack.enter_context(mock.patch.object(module, "time", time))
            for name in _MODULES_WITH_POOLS:
                module = importlib.import_module(f"smoltulu.artifacts.{name}")
                stack.enter_context(mock.patch.object(module, "ThreadPoolExecutor", _OneAfterTheOther))
            lease = importlib.import_module("smoltulu.artifacts.shared.lease")
            threads = types.SimpleNamespace(
                Event=lambda: _Event(self),
                Thread=lambda target, name, daemon: _Thread(self, target, name),
                current_thread=lambda: getattr(_here.actor, "stand_in", None),
            )
            stack.enter_context(mock.patch.object(lease, "threading", threads))
            for module, name, stand_in in _Calls(self).stand_ins():
                stack.enter_context(mock.patch.object(module, name, stand_in))
            yield
            for actor in self.actors:
                actor.process.is_dead = True
            self.run(lambda: not self.actors)

    def _tick(self) -> int:
        self._ticks += 1
        return self._ticks


def _inside() -> bool:
    return getattr(_here, "actor", None) is not None


class _Event:
    def __init__(self, world: World) -> None:
        self.world, self.is_on = world, False

    def set(self) -> None:
        self.is_on = True

    def clear(self) -> None:
        self.is_on = False

    def is_set(self) -> bool:
        return self.is_on

    def wait(self, timeout: float | None = None) -> bool:
        return self.world.wait(lambda: self.is_on, timeout)


class _Thread:
    def __init__(self, world: World, target: Callable[[], None], name: str) -> None:
        self.world, self.target, self.name = world, target, name

    def start(self) -> None:
        self.actor = self.world._begin(_here.actor.process, self.name, self.target)
        self.actor.stand_in = self  # type: ignore[attr-defined]

    def join(self) -> None:
        self.world.wait(lambda: self.actor.is_over, None)


class _OneAfterTheOther:
    """An executor that does each task at once: which is first among equals is the scheduler's to say."""

    def __init__(self, num_workers: int) -> None:
        pass

    def submit(self, action: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(action(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def map(self, action: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
        return map(action, *arguments)

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        pass

    def __enter__(self) -> _OneAfterTheOther:
        return self

    def __exit__(self, *error: object) -> None:
        pass


_TRUE_OPEN, _TRUE_UUID = io.open, uuid.uuid4
_TRUE = {
    name: getattr(os, name)
    for name in ("open", "fsync", "rename", "unlink", "mkdir", "rmdir", "link", "utime", "getpid")
}


class _RawFile(io.FileIO):
    """A file that is written to: each write is a call, a process that is dead writes nothing."""

    world: World
    process: Process
    disk: Disk
    num_cuts: int

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.process.is_dead:
            return len(view)
        if self.disk.num_cuts != self.num_cuts:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        with _short_write() as short:
            self.world.step(f"write {Path(os.readlink(f'/proc/self/fd/{self.fileno()}')).name}")
        return super().write(view[: max(1, len(view) // 2)] if short else view)


@contextlib.contextmanager
def _short_write() -> Iterator[list[bool]]:
    short: list[bool] = []
    try:
        yield short
    except ShortWrite:
        short.append(True)


class ShortWrite(Exception):
    """Planned for a write: half of the bytes are written, as `write` may do at any time. Of other calls: nothing."""


class _Calls:
    """The calls of the file system: as they are, and what a disk has to know of them."""

    def __init__(self, world: World) -> None:
        self.world = world

    def stand_ins(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        names = ("open", "fsync", "rename", "unlink", "mkdir", "rmdir", "link", "utime", "getpid")
        return [
            *((os, name, getattr(self, name)) for name in names),
            (os, "replace", self.rename),
            (os, "remove", self.unlink),
            (io, "open", self.open_file),
            (builtins, "open", self.open_file),
            (uuid, "uuid4", self.uuid4),
        ]

    def getpid(self) -> int:
        return _here.actor.process.pid if _inside() else _TRUE["getpid"]()

    def uuid4(self) -> uuid.UUID:
        return uuid.UUID(int=self.world.rng.getrandbits(128)) if _inside() else _TRUE_UUID()

    def disk_of(self, path: Any, dir_fd: int | None = None) -> tuple[Disk | None, Path]:
        """The disk that a path lies on (None: not of this world), and the whole path."""
        if not _inside() or not isinstance(path, (str, os.PathLike)):
            return None, Path()
        whole = Path(os.fspath(path))
        if dir_fd is not None:
            whole = Path(os.readlink(f"/proc/self/fd/{dir_fd}")) / whole
        whole = Path(os.path.normpath(whole.absolute()))
        disks = (m.disk for m in self.world.machines if whole.is_relative_to(m.disk.root))
        return next(disks, None), whole

    def step(self, what: str, path: Path) -> None:
        # Half of a write is said of a write only.
        with contextlib.suppress(ShortWrite):
            self.world.step(f"{what} {path.name}")

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        disk, whole = self.disk_of(path, dir_fd)
        if disk is None:
            return _TRUE["open"](path, flags, mode, dir_fd=dir_fd)
        self.step("open", whole)
        is_new = bool(flags & os.O_CREAT) and not os.path.lexists(whole)
        descriptor = _TRUE["open"](path, flags, mode, dir_fd=dir_fd)
        if is_new:
            disk.made(whole)
        return descriptor

    def open_file(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        disk, whole = self.disk_of(file)
        if disk is None or not set(mode) & set("wax+"):
            if disk is not None:
                self.step("read", whole)
            return _TRUE_OPEN(file, mode, *arguments, **options)
        self.step("open", whole)
        is_new = not os.path.lexists(whole)
        raw = _RawFile(whole, mode.replace("b", "").replace("t", ""))
        if is_new:
            disk.made(whole)
        raw.world, raw.process, raw.disk, raw.num_cuts = self.world, here().process, disk, disk.num_cuts
        binary = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        return binary if "b" in mode else io.TextIOWrapper(binary, encoding="utf-8")

    def fsync(self, descriptor: int) -> None:
        disk, path = self.disk_of(os.readlink(f"/proc/self/fd/{descriptor}")) if _inside() else (None, Path())
        if disk is None:
            return _TRUE["fsync"](descriptor)
        self.step("fsync", path)
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(" (deleted)"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        disk.synced(path)

    def rename(self, source: Any, target: Any, **options: Any) -> None:
        (disk, old), (_, new) = self.disk_of(source), self.disk_of(target)
        if disk is None:
            return _TRUE["rename"](source, target, **options)
        self.step("rename", new)
        if new.is_file():
            disk.keep_bytes(new)
        _TRUE["rename"](source, target)
        disk.renamed(old, new)

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        disk, whole = self.disk_of(path, dir_fd)
        if disk is not None:
            self.step("unlink", whole)
            if whole.is_file():
                disk.keep_bytes(whole)
        _TRUE["unlink"](path, dir_fd=dir_fd)
        if disk is not None:
            disk.removed(whole)

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        disk, whole = self.disk_of(path, dir_fd)
        if disk is not None:
            self.step("mkdir", whole)
        _TRUE["mkdir"](path, mode, dir_fd=dir_fd)
        if disk is not None:
            disk.made(whole, is_folder=True)

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        disk, whole = self.disk_of(path, dir_fd)
        if disk is not None:
            self.step("rmdir", whole)
        _TRUE["rmdir"](path, dir_fd=dir_fd)
        if disk is not None:
            disk.removed(whole)

    def link(self, source: Any, target: Any, **options: Any) -> None:
        (disk, old), (_, new) = self.disk_of(source), self.disk_of(target)
        if disk is not None:
            self.step("link", new)
        _TRUE["link"](source, target, **options)
        if disk is not None:
            disk.linked(old, new)

    def utime(self, path: Any, *arguments: Any, **options: Any) -> None:
        disk, whole = self.disk_of(path)
        if disk is not None:
            self.step("utime", whole)
        _TRUE["utime"](path, *arguments, **options)
