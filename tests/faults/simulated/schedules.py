"""Schedules: machines make and share one artifact, things go wrong by a seed, and what is left is looked at each time.

What must hold, whatever happens and whenever:

- What the local store finds is whole, and is what some attempt made.
- A commit that returned is there. A checkpoint that was marked is there until a commit is.
- Of one key one process at a time makes an artifact on a machine.
- What the shared store shows is whole. A push that returned is shown, or what was pushed after it.
- Once nothing goes wrong any more, every machine comes to an artifact, within minutes of its own clock.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from smoltulu.artifacts.checkpoints import mark_complete, newest_checkpoint, prune, torn_checkpoints
from smoltulu.artifacts.files import remove_tree
from smoltulu.artifacts.keys import artifact_key
from smoltulu.artifacts.layout import look
from smoltulu.artifacts.shared.door import SharedStore
from smoltulu.artifacts.shared.lease import Lease
from smoltulu.artifacts.shared.remote import Remote, RemoteArtifact
from smoltulu.artifacts.store import Found, Missing, Store, read_manifest
from smoltulu.schemas.artifact import Manifest, Spec
from tests.faults.simulated.network import Server
from tests.faults.simulated.world import Machine, Process, ShortWrite, World, here

KINDS = ("local", "folder", "objects")
SPEC = Spec(stage="sft", version=1, config={"learning_rate": 1}, inputs={}, externals={})
KEY = artifact_key(SPEC)
NUM_STEPS = 3
#: Files above this go to a shared store in parts.
_PART_BYTES = 40
_ERRORS = (errno.EIO, errno.ENOSPC, errno.EINTR)


@dataclass
class Seen:
    """What the processes were told, to be held against what is left."""

    made: dict[str, str] = field(default_factory=dict)
    #: machine -> digests of what commits returned, oldest first
    committed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    #: machine and generation -> step of the last checkpoint that was marked
    marked: Counter[tuple[str, str]] = field(default_factory=Counter)
    #: digest that a process is sharing
    sharing: dict[Process, str] = field(default_factory=dict)
    #: digests of what pushes returned, oldest first
    shared: list[str] = field(default_factory=list)
    #: token -> who was given that turn; those that were taken away
    turns: dict[int, Process] = field(default_factory=dict)
    fenced: set[int] = field(default_factory=set)
    making: dict[str, Process] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    num_attempts: int = 0


@dataclass
class Outcome:
    """What came of one schedule."""

    seed: int
    kind: str
    problems: list[str]
    happened: list[str]
    seconds: float

    def line(self) -> str:
        return f"{self.seed} ({self.kind}; {', '.join(self.happened) or 'nothing'}): {'; '.join(self.problems)}"


class Schedule:
    """One schedule, all of it drawn from the seed."""

    def __init__(self, seed: int, home: Path, kind: str | None = None, num_faults: int | None = None) -> None:
        self.seed = seed
        rng = random.Random(seed)
        self.kind = kind or rng.choice(KINDS)
        self.world = World(seed, home, switching=rng.choice((0.0, 0.05, 0.5)))
        self.seen = Seen()
        self.happened: list[str] = []
        names = ("a",) if self.kind == "local" else ("a", "b")
        self.machines = [self.world.machine(name) for name in names]
        self.disk_server = self.world.machine("server") if self.kind == "folder" else None
        self.server = Server(self.world, rng.choice((0.0, 0.05, 0.3))) if self.kind == "objects" else None
        self.num_faults = rng.choice((1, 1, 2, 3, 5)) if num_faults is None else num_faults
        self.calls = _calls(self.kind) if self.num_faults else (1, 1, 1)
        self._fallen: list[Machine] = []
        self._spare = rng

    # The program: what the engine does around a stage

    def store(self, machine: Machine) -> Store:
        root = machine.disk.root / "store"
        if self.kind == "local":
            return Store(root)
        url = "s3://bucket/store" if self.server else str(self.world.home / "server" / "shared")
        remote = Remote(url, part_bytes=_PART_BYTES)
        if self.server:
            remote._objects = self.server.client(url)
        remote.lease = partial(self.lease, remote.lease)  # type: ignore[method-assign]
        return SharedStore(root, remote)

    @contextlib.contextmanager
    def lease(self, true_lease: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[Lease | None]:
        """`Remote.lease`; notes who is given which turn, and how the turn before ended."""
        with true_lease(*arguments, **options) as held:
            if held is not None:
                if held.token in self.seen.turns:
                    self.seen.problems.append(f"two hold turn {held.token}")
                self.seen.turns[held.token] = here().process
                if b"fenced" in self.object(f"turns/{held.token - 1:08d}.end"):
                    self.seen.fenced.add(held.token - 1)
            yield held

    def object(self, name: str) -> bytes:
        """Bytes of an object of the shared store, without asking; empty where there is none."""
        if self.server:
            return self.server.objects.get(f"sft/{KEY}/{name}", b"")
        path = self.world.home / "server" / "shared" / "sft" / KEY / name
        return path.read_bytes() if path.exists() else b""

    def program(self, machine: Machine, refresh: bool = False) -> None:
        """Find the artifact, or make it and share it; `refresh`: make it again though it is there."""
        log = _Log(self.seen)
        try:
            store = self.store(machine)
            if isinstance(store, SharedStore) and self.disk_server:
                store.remote._objects.prepare()
            found = store.find(SPEC, {})
            if isinstance(found, Found) and not refresh:
                store.touch(found)
                self.seen.sharing[here().process] = found.manifest.digest
                store.share(found, "sft", log)  # type: ignore[arg-type]
                return
            asked_for = found
            with store.producer(SPEC, lambda whom: None) as folder:
                found = store.find(SPEC, {})
                if isinstance(found, Found) and (not refresh or found != asked_for):
                    return
                if isinstance(found, Missing) and found.damaged:
                    store.quarantine(folder, found.damaged, found.reason)
                make = partial(self.make, store, folder, machine)
                taken, is_made = store.make_once(SPEC, {}, "sft", log, refresh, make)
                if not is_made:
                    self.committed(machine, taken)
        except (OSError, ValueError) as error:
            # A clear message, with which a run ends; the next one goes on.
            self.seen.told.append(f"{type(error).__name__}: {error}")
            if not str(error):
                self.seen.problems.append(f"an error without a word: {error!r}")

    def make(self, store: Store, folder: Path, machine: Machine) -> Found:
        world, seen = self.world, self.seen
        other = seen.making.get(machine.name)
        if other is not None and not other.is_dead:
            seen.problems.append("two processes make one artifact")
        seen.making[machine.name] = here().process
        try:
            work = store.open_work(folder, {})
            checkpoints = work / "checkpoints"
            newest = newest_checkpoint(checkpoints, full=True)
            for _, path, _ in torn_checkpoints(checkpoints, full=True):
                remove_tree(path)
            step, mark = newest[0] if newest else 0, (machine.name, (work / "generation").read_text())
            if step < seen.marked[mark]:
                seen.problems.append(f"goes on from step {step}, {seen.marked[mark]} was marked")
            while step < NUM_STEPS:
                world.sleep(world.rng.uniform(1, 30))
                step += 1
                checkpoint = checkpoints / f"checkpoint-{step}"
                (checkpoint / "model").mkdir(parents=True)
                (checkpoint / "model" / "weights").write_text(f"weights of step {step}")
                (checkpoint / "optimizer").write_text(f"optimizer of step {step}")
                mark_complete(checkpoint)
                seen.marked[mark] = step
                prune(checkpoints, 1)
            output = work / "output"
            remove_tree(output)
            (output / "model" / "deep").mkdir(parents=True)
            seen.num_attempts += 1
            text = f"made on {machine.name} by attempt {seen.num_attempts}"
            (output / "model" / "weights").write_text(text * 3)
            (output / "model" / "deep" / "part").write_text(text)
            (output / "rows").write_text(text * 2)

            def draft(files: dict, digest: str) -> Manifest:
                seen.made[digest] = text
                return Manifest(
                    key=KEY, spec=SPEC, digest=digest, inputs={}, outputs={}, metrics={"loss": 1.0}, files=files,
                    environment={}, node="sft", started_at="", finished_at="", duration_seconds=0,
                )  # fmt: skip

            made = store.commit(SPEC, output, draft)
            self.committed(machine, made)
            seen.sharing[here().process] = made.manifest.digest
            return made
        finally:
            if not here().process.is_dead:
                del seen.making[machine.name]

    def committed(self, machine: Machine, found: Found) -> None:
        self.seen.committed[machine.name].append(found.manifest.digest)

    # Faults

    def plan(self, num_faults: int) -> dict[int, Callable[[Process, str], None]]:
        """Faults of one process, by the number of the call at which they happen."""
        rng = self._spare
        kinds = ["kill", "kill", "power", "power", "stall", "error", "short"]
        if self.disk_server:
            kinds += ["server", "server", "stall", "stall"]
        if self.server:
            kinds += ["cut off", "cut off", "stall", "stall"]
        # A third of them anywhere, a third in the commit, a third in what comes after it.
        begin, end, last = self.calls
        spans = [rng.choice(((1, last), (begin, end), (end, last))) for _ in range(num_faults)]
        return {rng.randint(*span): self._fault(rng.choice(kinds), rng) for span in spans}

    def _fault(self, kind: str, rng: random.Random) -> Callable[[Process, str], None]:
        seconds, number = rng.choice((3.0, 30.0, 200.0)), rng.choice(_ERRORS)

        def happen(process: Process, what: str) -> None:
            self.happened.append(f"{kind} of {process.machine.name} at {what}")
            if kind == "kill":
                self._fallen.append(process.machine)
                self.world.kill(process)
            elif kind == "power":
                self._fallen.append(process.machine)
                self.world.cut_power(process.machine)
            elif kind == "server":
                assert self.disk_server is not None
                self._fallen.append(self.disk_server)
                self.world.cut_power(self.disk_server)
            elif kind == "stall":
                process.stalled_until = self.world.now + seconds
            elif kind == "cut off":
                assert self.server is not None
                self.server.cut_off[process.machine.name] = (self.world.now, self.world.now + seconds)
            elif kind == "short":
                raise ShortWrite
            else:
                raise OSError(number, "planned for this call", what)

        return happen

    # The schedule

    def run(self) -> Outcome:
        world, seen = self.world, self.seen
        with world.entered():
            first, left = self.machines[0], self.num_faults
            # In half of the schedules something is there already, and is to be made again.
            if refresh := self._spare.random() < 0.5:
                world.start(first, lambda: self.program(first))
                world.run(lambda: not world.actors)
            for machine in self.machines:
                share = self._spare.randint(machine is first, left) if left else 0
                left -= share
                world.start(machine, partial(self.program, machine, refresh), self.plan(share))
            if self._spare.random() < 0.3:
                world.start(first, partial(self.program, first, refresh), self.plan(left))
            for _ in range(20):
                ended = world.run(lambda: bool(self._fallen) or not world.actors)
                if not ended:
                    seen.problems.append("all wait for ever")
                    break
                if not self._fallen:
                    break
                # Those that died free what they held; then what is left is looked at, and one begins again.
                fallen, self._fallen = self._fallen, []
                world.run(lambda: not [actor for actor in world.actors if actor.process.is_dead])
                self.look_at_shared()
                for machine in fallen:
                    if machine in self.machines:
                        self.look(machine)
                        plan = self.plan(1) if self._spare.random() < 0.3 else {}
                        world.start(machine, partial(self.program, machine, refresh), plan)
            # Nothing goes wrong from here on.
            for process in world.processes:
                process.plan.clear()
            if self.server:
                self.server.share_lost = 0.0
                self.server.cut_off.clear()
            for _ in range(2):
                for machine in self.machines:
                    world.start(machine, partial(self.program, machine))
                if not world.run(lambda: not world.actors, limit=world.now + 2000):
                    seen.problems.append("does not come to an end, though nothing goes wrong any more")
                    break
            for machine in self.machines:
                self.look(machine, is_end=True)
            self.look_at_shared(is_end=True)
        seen.problems += [f"{type(error).__name__}: {error}" for error in world.errors]
        return Outcome(self.seed, self.kind, seen.problems, self.happened, world.now)

    def look(self, machine: Machine, is_end: bool = False) -> None:
        """What is left on a machine."""
        seen, name = self.seen, machine.name
        store = Store(machine.disk.root / "store")
        found, folder = store.find(SPEC, {}), store.folder(SPEC)
        committed = seen.committed[name]
        if isinstance(found, Found):
            if (faults := store.verify(found)) or found.manifest.digest not in seen.made:
                seen.problems.append(f"{name}: found what is not whole, or nobody made: {faults}")
            if found.manifest.digest in committed[:-1]:
                seen.problems.append(f"{name}: found what is older than the last commit")
        elif committed:
            seen.problems.append(f"{name}: what was committed is not found: {found.reason}")
        elif is_end:
            seen.problems.append(f"{name}: nothing was made in the end: {found.reason}; told: {seen.told[-3:]}")
        there = look(folder)
        if (newest := there.newest) is not None:
            # Perhaps renamed and not pointed at yet: the next producer does that.
            try:
                faults = store.verify(Found(read_manifest(folder / newest), folder / newest))
            except ValueError as error:
                faults = [str(error)]
            if faults:
                seen.problems.append(f"{name}: {newest} is not whole: {faults}")
        step = seen.marked[name, there.next_generation]
        checkpoint = newest_checkpoint(folder / "work" / "checkpoints", full=True) if step else None
        if step > (checkpoint[0] if checkpoint else 0):
            seen.problems.append(f"{name}: the checkpoint of step {step} is lost; left: {checkpoint}")

    def look_at_shared(self, is_end: bool = False) -> None:
        """What the shared store shows to a reader whom nothing disturbs."""
        seen, world = self.seen, self.world
        if self.kind == "local" or not (seen.shared or is_end):
            return
        problems: list[str] = []
        lost, cut_off = (self.server.share_lost, dict(self.server.cut_off)) if self.server else (0.0, {})
        if self.server:
            self.server.share_lost, self.server.cut_off = 0.0, {}

        def read() -> None:
            store = self.store(reader)
            assert isinstance(store, SharedStore)
            shared = store.remote.find("sft", KEY)
            if not isinstance(shared, RemoteArtifact):
                problems.append(f"the shared store shows nothing: {shared.reason}")
                return
            target = reader.disk.root / "read"
            store.remote.pull(shared, target)
            if faults := store.verify(Found(shared.manifest, target)):
                problems.append(f"the shared store shows what is not whole: {faults}")
            digest = shared.manifest.digest
            if digest not in seen.made or (is_end and digest in seen.shared and digest != seen.shared[-1]):
                problems.append("the shared store shows something older than what was shared last")

        reader = world.machine(f"reader-{len(world.machines)}")
        process = world.start(reader, read)
        world.run(lambda: not [actor for actor in world.actors if actor.process is process])
        if self.server:
            self.server.share_lost, self.server.cut_off = lost, cut_off
        seen.problems += problems


class _Log(logging.LoggerAdapter):
    """Notes what processes are told; a push that returned is noted by what the machine has."""

    def __init__(self, seen: Seen) -> None:
        super().__init__(logging.getLogger("simulated"), {})
        self.seen = seen

    def log(self, level: int, msg: object, *arguments: object, **options: object) -> None:  # type: ignore[override]
        text = str(msg) % arguments
        self.seen.told.append(text)
        if text.endswith("is in the shared store"):
            process = here().process
            self.seen.shared.append(self.seen.sharing[process])
            taken = [token for token in self.seen.fenced if self.seen.turns.get(token) is process]
            if taken and taken[-1] == max(t for t, whose in self.seen.turns.items() if whose is process):
                self.seen.problems.append(f"turn {taken[-1]} was taken over, and published all the same")

    def info(self, msg: object, *arguments: object, **options: object) -> None:  # type: ignore[override]
        self.log(logging.INFO, msg, *arguments)

    def warning(self, msg: object, *arguments: object, **options: object) -> None:  # type: ignore[override]
        self.log(logging.WARNING, msg, *arguments)


class OneError(Schedule):
    """A process whose n-th call fails in one way. What it leaves is looked at, then it runs again."""

    def __init__(self, home: Path, kind: str, nth: int, how: int | None, refresh: bool) -> None:
        super().__init__(nth, home, kind, num_faults=0)
        self.nth, self.how, self.refresh = nth, how, refresh
        if self.server:
            self.server.share_lost = 0.0

    def run(self) -> Outcome:
        world, machine = self.world, self.machines[0]

        def fail(process: Process, what: str) -> None:
            name = "short write" if self.how is None else errno.errorcode[self.how]
            self.happened.append(f"{name} at call {self.nth}, {what}")
            raise ShortWrite if self.how is None else OSError(self.how, os.strerror(self.how), what)

        with world.entered():
            if self.refresh:
                world.start(machine, partial(self.program, machine))
                world.run(lambda: not world.actors)
            world.start(machine, partial(self.program, machine, self.refresh), {self.nth: fail})
            world.run(lambda: not world.actors)
            self.look(machine)
            self.look_at_shared()
            for _ in range(2):
                world.start(machine, partial(self.program, machine))
                world.run(lambda: not world.actors)
            self.look(machine, is_end=True)
            self.look_at_shared(is_end=True)
            self.seen.problems += [f"{type(error).__name__}: {error}" for error in world.errors]
        return Outcome(self.nth, self.kind, self.seen.problems, self.happened, world.now)


def errors() -> list[tuple[str, int, int | None, bool]]:
    """Every call of a process with every way in which it can fail: kind, call, error (None: a short write), refresh."""
    return [
        (kind, nth, how, refresh)
        for kind in KINDS
        for refresh in (False, True)
        for nth, call in enumerate(_undisturbed(kind), 1)
        for how in (*_ERRORS, *((None,) if call.startswith("write") else ()))
    ]


def try_error(kind: str, nth: int, how: int | None, refresh: bool) -> Outcome:
    """One process with one error."""
    with temporary_home() as home:
        return OneError(home, kind, nth, how, refresh).run()


@contextlib.contextmanager
def temporary_home() -> Iterator[Path]:
    """A folder for one schedule, in memory where there is such a one."""
    memory = Path("/dev/shm")
    home = Path(tempfile.mkdtemp(prefix="smoltulu-simulated-", dir=memory if memory.is_dir() else None))
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def try_schedule(seed: int, kind: str | None = None) -> Outcome:
    """One schedule."""
    with temporary_home() as home:
        return Schedule(seed, home, kind).run()


@cache
def _undisturbed(kind: str) -> list[str]:
    """The calls of a process that nothing happens to."""
    with temporary_home() as home:
        undisturbed = Schedule(0, home, kind, num_faults=0)
        undisturbed.run()
    return next(process.calls for process in undisturbed.world.processes if "mkdir output" in process.calls)


def _calls(kind: str) -> tuple[int, int, int]:
    """At which of its calls a process that nothing happens to begins its commit, ends it, and is done."""
    calls = _undisturbed(kind)
    begin = calls.index("rename manifest.json")
    return begin, next(i for i in range(begin, len(calls)) if "rename .trash-work" in calls[i]) + 1, len(calls)
