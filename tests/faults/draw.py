"""Which faults a campaign tries: drawn by a seed from what an unbroken run did."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults import damage, kills, shared, worker
from tests.faults.killer.sitecustomize import part_of
from tests.faults.kills import Result
from tests.faults.sandbox import TRAINERS, Sandbox

Attempt = Callable[[Sandbox, Sandbox], Result]


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong. The number and the seed give the same one again."""

    number: int
    kind: str
    text: str
    attempt: Attempt


@dataclass(frozen=True)
class Event:
    """A file-system event of an unbroken run: who, below which part of its folder, and the how-manieth there."""

    role: str
    part: str
    nth: int


class Draw:
    """Draws faults by a seed; what an unbroken run did says what there is to interrupt."""

    def __init__(self, baseline: Sandbox, seed: int, home: Path) -> None:
        self.baseline, self.seed, self.home = baseline, seed, home
        self.nodes = list(baseline.graph.nodes)
        self.trainers = [node for node in TRAINERS if node in baseline.graph.nodes]
        self.uploads = Counter[str]()
        self.faults: list[Fault] = []
        self._events = {node: list(self._events_of(node)) for node in self.nodes}

    def kills(self, num_kills: int) -> None:
        """At least `num_kills` SIGKILLs in fixed proportions; every node is hit at a random instant first."""
        turns = [
            *(["instant"] * 3), "steps", "commit", "checkpoint", "checkpoint", "event",
            *(["instant"] * 3), "steps", "commit", "checkpoint", "upload", "download",
        ]  # fmt: skip
        planned, turn, instants = 0, 0, 0
        while planned < num_kills:
            kind = turns[turn % len(turns)]
            rng = self._rng()
            if kind == "instant":
                self.instant(rng, self.nodes[instants % len(self.nodes)])
                instants += 1
            elif kind == "steps":
                # Every third one is killed three times in a row.
                num = 3 if turn % (3 * len(turns)) == 3 else 1
                self.steps(rng, num)
                planned += num - 1
            else:
                getattr(self, kind)(rng)
            planned += 1
            turn += 1

    def workers(self, num: int) -> None:
        for _ in range(num):
            rng = self._rng()
            node = rng.choice(self.trainers)
            step = rng.randint(1, self._num_steps(node) - 2)
            attempt = functools.partial(worker.killed_worker, home=self.home / "prefect", node=node, step=step)
            self.add("SIGKILL of the Prefect worker", f"{node}, step {step}", attempt)

    def uploads_to_s3(self, num: int) -> None:
        for _ in range(num):
            num_parts = self._rng().randint(1, 12)
            attempt = functools.partial(shared.killed_upload_to_s3, num_parts=num_parts)
            self.add("SIGKILL in an upload to S3", f"after {num_parts} parts", attempt)

    def damages(self) -> None:
        """One fault of every other kind."""
        for node, pattern in damage.ARTIFACT_FILES:
            if node in self.nodes:
                attempt = functools.partial(damage.flipped_artifact, node=node, pattern=pattern, rng=self._rng())
                self.add("flipped bit in an artifact", f"{node}: {pattern}", attempt)
        for node, below in (("sft", "dpo"), ("dpo", "rlvr"), ("base-model", "sft")):
            if below in self.nodes:
                attempt = functools.partial(damage.flipped_input, node=node, below=below, rng=self._rng())
                self.add("flipped bit in an input", f"{node}, {below} is to be made", attempt)
        for pattern in damage.WORK_FILES:
            rng = self._rng()
            node = rng.choice(self.trainers)
            attempt = functools.partial(damage.flipped_work, node=node, pattern=pattern, rng=rng)
            self.add("flipped bit in unfinished work", f"{node}: {pattern}", attempt)
        for pattern in shared.OBJECTS:
            attempt = functools.partial(shared.flipped_object, node="dataset-sft", pattern=pattern, rng=self._rng())
            self.add("flipped bit in a shared store", f"dataset-sft: {pattern}", attempt)
        for how in ("truncated", "empty", "gone", "newer"):
            node = self._rng().choice(self.nodes)
            attempt = functools.partial(damage.damaged_manifest, node=node, how=how)
            self.add("damaged or foreign manifest", f"{node}: {how}", attempt)
        for share in (0.2, 0.5, 0.8):
            node = self._rng().choice(self.trainers)
            self.add(
                "disk full",
                f"{node}, {share:.0%} of it fits",
                functools.partial(damage.full_disk, node=node, share=share),
            )
        node = self._rng().choice(self.trainers)
        self.add("read-only store", node, functools.partial(damage.read_only, node=node))
        for killed in (False, True):
            attempt = functools.partial(damage.two_producers, node="sft", killed=killed)
            self.add("two producers", "sft, the first is killed" if killed else "sft", attempt)
        for role, shift in (
            ("both", damage.DAY),
            ("both", -damage.DAY),
            ("child", damage.DAY),
            ("parent", -damage.DAY),
        ):
            node = self._rng().choice(self.trainers)
            attempt = functools.partial(damage.wrong_clock, node=node, role=role, shift=shift)
            self.add("wrong clock", f"{node}, {role}: {shift:+.0f} s", attempt)
        for shift in (damage.DAY, -damage.DAY):
            self.add("wrong clock", f"all files {shift:+.0f} s", functools.partial(damage.wrong_times, shift=shift))

    # One fault of a kind each.

    def instant(self, rng: random.Random, node: str) -> None:
        victim = rng.choice(("parent", "child", "both"))
        seconds = rng.random() * 0.95 * self.baseline.manifest(node).duration_seconds
        attempt = functools.partial(kills.at_an_instant, node=node, victim=victim, seconds=seconds)
        self.add(f"SIGKILL of {_WHO[victim]}", f"{node}, {seconds:.2f} s after its start", attempt)

    def steps(self, rng: random.Random, num: int) -> None:
        node, victim = rng.choice(self.trainers), rng.choice(("parent", "child", "both"))
        steps = sorted(rng.sample(range(1, self._num_steps(node)), num))
        seconds = rng.random() * 0.2
        attempt = functools.partial(kills.at_steps, node=node, victim=victim, steps=steps, seconds=seconds)
        text = f"{node}, {seconds:.2f} s after step {', '.join(map(str, steps))}"
        self.add(f"SIGKILL of {_WHO[victim]}", text, attempt)

    def commit(self, rng: random.Random) -> None:
        node = rng.choice(self.nodes)
        events = [
            event for event in self._events[node] if event.role == "parent" and not event.part.startswith("/work/l")
        ]
        begin = next(i for i, event in enumerate(events) if event.part.startswith("/work/output/"))
        self._event_fault("SIGKILL in a commit", rng, node, rng.choice(events[begin:]))

    def checkpoint(self, rng: random.Random) -> None:
        node = rng.choice(self.trainers)
        if rng.random() < 0.3:
            victim, nth = rng.choice(("parent", "child", "both")), rng.randint(1, 3)
            attempt = functools.partial(kills.before_the_marker, node=node, victim=victim, nth=nth)
            self.add("SIGKILL in a checkpoint", f"{node}, {victim}, checkpoint {nth} without marker", attempt)
            return
        events = [event for event in self._events[node] if event.part == "/work/checkpoints" and event.role == "child"]
        self._event_fault("SIGKILL in a checkpoint", rng, node, rng.choice(events))

    def event(self, rng: random.Random) -> None:
        node = rng.choice(self.nodes)
        part = rng.choice(sorted({(event.role, event.part) for event in self._events[node]}))
        events = [event for event in self._events[node] if (event.role, event.part) == part]
        self._event_fault("SIGKILL at a file event", rng, node, rng.choice(events))

    def _event_fault(self, kind: str, rng: random.Random, node: str, event: Event) -> None:
        delay = rng.choice((0.0, 0.0, rng.random() * 0.02))
        fault = {"role": event.role, "part": event.part, "nth": event.nth, "delay": delay, "both": rng.random() < 0.3}
        who = "both" if fault["both"] else event.role
        text = f"{node}, {who}, event {event.nth} on {event.part} + {delay * 1000:.1f} ms"
        self.add(kind, text, functools.partial(kills.at_event, node=node, fault=fault))

    def upload(self, rng: random.Random) -> None:
        node = rng.choice(self.nodes)
        nth, delay = rng.randint(1, max(1, self.uploads[node])), rng.choice((0.0, rng.random() * 0.005))
        attempt = functools.partial(shared.killed_upload, node=node, nth=nth, delay=delay)
        self.add("SIGKILL in an upload", f"{node}, event {nth} + {delay * 1000:.1f} ms", attempt)

    def download(self, rng: random.Random) -> None:
        node = rng.choice(self.nodes)
        # Lock, spec and the pull's own folder, then the files.
        nth = rng.randint(8, 8 + 2 * len(self.baseline.manifest(node).files))
        attempt = functools.partial(shared.killed_download, node=node, nth=nth, delay=0.0)
        self.add("SIGKILL in a download", f"{node}, event {nth}", attempt)

    def add(self, kind: str, text: str, attempt: Attempt) -> None:
        self.faults.append(Fault(len(self.faults) + 1, kind, text, attempt))

    def _rng(self) -> random.Random:
        return random.Random(f"{self.seed}-{len(self.faults)}")

    def _num_steps(self, node: str) -> int:
        return int(self.baseline.manifest(node).outputs["num_steps"])

    def _events_of(self, node: str) -> Iterator[Event]:
        """Events below a node's folder; their part without what differs from run to run (ids, times)."""
        counts: Counter[tuple[str, str]] = Counter()
        prefix = str(self.baseline.folder(node))
        for line in (self.baseline.home / "events.txt").read_text().splitlines():
            role, _, path = line.split("\t")
            if not path.startswith(f"{prefix}/"):
                continue
            part = part_of(path[len(prefix) :])
            counts[role, part] += 1
            yield Event(role, part, counts[role, part])


_WHO = {"parent": "the parent", "child": "the child", "both": "parent and child"}
