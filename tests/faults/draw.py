"""Which faults a campaign tries: drawn by a seed from the recipe alone, so that no machine has another list."""

from __future__ import annotations

import functools
import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path

from tests.faults import damage, kills, shared, stops, worker
from tests.faults.kills import Attempt
from tests.faults.sandbox import TRAINERS, Sandbox
from tests.faults.variants import VARIANTS, said

#: They share one Prefect server: one of them at a time.
PREFECT_KINDS = (
    "SIGKILL of the Prefect worker",
    "SIGKILL of the Prefect server",
    "SIGKILL in a push",
    "SIGKILL in a night",
)
#: They wait for a lease to become stale: that costs a minute, but no processor.
WAITING_KINDS = ("SIGKILL in an upload", "SIGKILL in an upload to S3", "SIGSTOP with a lease")
_WHO = {"parent": "the parent", "child": "the child", "both": "parent and child", "rank": "a rank"}
_VICTIMS = ("parent", "child", "both")


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong. The number and the seed give the same one again."""

    number: int
    kind: str
    text: str
    attempt: Attempt
    #: whose unbroken run it is compared with, see variants.py; none: that of the whole recipe
    variant: str = ""

    @property
    def identity(self) -> tuple[int, str, str]:
        return self.number, self.kind, self.text


@dataclass(frozen=True)
class Size:
    """How many of what a campaign tries."""

    num_kills: int
    num_of_a_variant: int = 0
    num_stops: int = 0
    num_full_disks: int = 0
    num_to_s3: int = 0
    num_workers: int = 0
    num_damages: int = 0
    num_operations: int = 0


SIZES = {
    "quick": Size(num_kills=12),
    "usual": Size(60, num_of_a_variant=2, num_stops=5, num_full_disks=2, num_to_s3=2, num_workers=2, num_damages=1,
                  num_operations=1),
    "full": Size(285, num_of_a_variant=14, num_stops=20, num_full_disks=12, num_to_s3=6, num_workers=8, num_damages=2,
                 num_operations=5),
}  # fmt: skip


class Draw:
    """Draws faults by a seed. `baseline` need not have run: what depends on it is drawn as a share."""

    def __init__(self, baseline: Sandbox, seed: int, home: Path) -> None:
        self.baseline, self.seed, self.home = baseline, seed, home
        self.nodes = list(baseline.graph.nodes)
        self.trainers = [node for node in TRAINERS if node in baseline.graph.nodes]
        self.faults: list[Fault] = []
        self._variants: dict[str, Sandbox] = {}

    def draw(self, size: Size) -> list[Fault]:
        """All faults of a campaign."""
        self.kills(size.num_kills)
        self.uploads_to_s3(size.num_to_s3)
        self.workers(size.num_workers)
        for _ in range(size.num_damages):
            self.damages()
        for turn in range(size.num_of_a_variant):
            for variant in VARIANTS:
                self.in_variant(variant, turn)
        self.stops(size.num_stops)
        for _ in range(size.num_full_disks):
            self.killed_on_a_full_disk(self._rng())
        if size.num_operations:
            self.operations(size.num_operations)
        return self.faults

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

    def in_variant(self, variant: str, turn: int) -> None:
        """A kill in a training of another configuration: at a step, in a checkpoint, in the commit, at an instant."""
        kind, node = VARIANTS[variant].kind, VARIANTS[variant].node
        if variant not in self._variants:
            self._variants[variant] = VARIANTS[variant].recipe_of(self.baseline)
        own = Draw(self._variants[variant], self.seed, self.home)
        own.faults = list(self.faults)  # the same numbers
        rng = self._rng()
        if variant == "processes" and turn % 3 == 0:
            own.steps(rng, 1, node, "rank")
        elif variant == "extension" and turn % 4 == 1:
            own.event_of("begin", kind, node)
        else:
            # Both kinds of turns in a usual campaign, over its variants.
            what = ("steps", "checkpoint", "commit", "instant")[(turn + list(VARIANTS).index(variant)) % 4]
            if what == "instant":
                own.instant(rng, node)
            elif what == "steps":
                own.steps(rng, 2 if turn % 2 else 1, node)
            elif what == "checkpoint":
                own.checkpoint(rng, node)
            else:
                own.event_of("commit", kind, node)
        last = own.faults[-1]
        how = "" if last.kind == kind else f"{last.kind}: "
        self.add(kind, f"{variant}: {how}{last.text}", said(variant, last.attempt), variant)

    def stops(self, num: int) -> None:
        for turn in range(num):
            rng = self._rng()
            node = rng.choice(self.trainers)
            step, victim = rng.randint(1, self._num_steps(node) - 2), rng.choice(_VICTIMS)
            how = ("lease", "wait", "killed", "rank", "long lease")[turn % 5]
            if how in ("lease", "long lease"):
                seconds = stops.LONG if how == "long lease" else stops.SHORT
                victim = "both" if how == "long lease" and turn < 5 else victim
                attempt: Attempt = functools.partial(
                    stops.stopped_with_a_lease, node=node, victim=victim, step=step, seconds=seconds
                )
                self.add("SIGSTOP with a lease", f"{node}, {_WHO[victim]}, step {step}, for {seconds:.0f} s", attempt)
            elif how == "wait":
                seconds = round(rng.uniform(1, 10), 1)
                attempt = functools.partial(stops.stopped, node=node, victim=victim, step=step, seconds=seconds)
                self.add("SIGSTOP", f"{node}, {_WHO[victim]}, step {step}, for {seconds} s", attempt)
            elif how == "killed":
                attempt = functools.partial(stops.stopped_then_killed, node=node, victim="child", step=step)
                self.add("SIGSTOP", f"{node}, the child, step {step}, then SIGKILL of the parent", attempt)
            else:
                node, step = "sft", rng.randint(1, self._num_steps("sft") - 2)
                if turn % 2:
                    attempt = functools.partial(stops.stopped, node=node, victim="rank", step=step, seconds=5.0)
                    self.add("SIGSTOP", f"processes: {node}, a rank, step {step}, for 5 s", attempt, "processes")
                else:
                    attempt = functools.partial(stops.stopped_then_killed, node=node, victim="rank", step=step)
                    text = f"processes: {node}, a rank, step {step}, then SIGKILL of the parent"
                    self.add("SIGSTOP", text, attempt, "processes")

    def killed_on_a_full_disk(self, rng: random.Random) -> None:
        node, victim = rng.choice(self.trainers), rng.choice(_VICTIMS)
        step, share = rng.randint(1, self._num_steps(node) - 2), rng.random()
        attempt = functools.partial(damage.killed_on_a_full_disk, node=node, victim=victim, step=step, share=share)
        text = f"{node}, {_WHO[victim]}, {share:.0%} of it fits from step {step} on"
        self.add("SIGKILL on a full disk", text, attempt)

    def operations(self, num: int) -> None:
        """What others do with a store: push, nightly evaluation, audit, gc, verify, tags; and the server."""
        if importlib.util.find_spec("tests.faults.operations") is not None:
            importlib.import_module("tests.faults.operations").add(self, num)

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
        victim, share = rng.choice(_VICTIMS), rng.random() * 0.95
        attempt = functools.partial(kills.at_a_share, node=node, victim=victim, share=share)
        self.add(f"SIGKILL of {_WHO[victim]}", f"{node}, after {share:.1%} of its time", attempt)

    def steps(self, rng: random.Random, num: int, node: str = "", victim: str = "") -> None:
        node, victim = node or rng.choice(self.trainers), victim or rng.choice(_VICTIMS)
        # An extension has the first half's steps from the training before; the last one is followed by the end at once.
        config = self.baseline.graph.nodes[node].config
        first = 1 if getattr(config, "schedule", None) is None else self._num_steps(node) // 2
        steps = sorted(rng.sample(range(first, self._num_steps(node)), num))
        seconds = rng.random() * 0.2
        attempt = functools.partial(kills.at_steps, node=node, victim=victim, steps=steps, seconds=seconds)
        text = f"{node}, {seconds:.2f} s after step {', '.join(map(str, steps))}"
        self.add(f"SIGKILL of {_WHO[victim]}", text, attempt)

    def checkpoint(self, rng: random.Random, node: str = "") -> None:
        node = node or rng.choice(self.trainers)
        if rng.random() < 0.3:
            victim, nth = rng.choice(_VICTIMS), rng.randint(1, 3)
            attempt = functools.partial(kills.before_the_marker, node=node, victim=victim, nth=nth)
            self.add("SIGKILL in a checkpoint", f"{node}, {victim}, checkpoint {nth} without marker", attempt)
        else:
            self.event_of("checkpoint", "SIGKILL in a checkpoint", node)

    def commit(self, rng: random.Random) -> None:
        self.event_of("commit", "SIGKILL in a commit", rng.choice(self.nodes))

    def event(self, rng: random.Random) -> None:
        self.event_of("any", "SIGKILL at a file event", rng.choice(self.nodes))

    def event_of(self, of: str, kind: str, node: str) -> None:
        """Which one of an unbroken run's events is drawn when it is known."""
        seed = f"{self.seed}-{len(self.faults)}-event"
        attempt = functools.partial(kills.at_drawn_event, node=node, of=of, seed=seed)
        self.add(kind, f"{node}, a file event{'' if of == 'any' else f' ({of})'}", attempt)

    def upload(self, rng: random.Random) -> None:
        node, share = rng.choice(self.nodes), rng.random()
        delay = rng.choice((0.0, rng.random() * 0.005))
        attempt = functools.partial(shared.killed_upload, node=node, share=share, delay=delay)
        self.add("SIGKILL in an upload", f"{node}, after {share:.0%} of its events + {delay * 1000:.1f} ms", attempt)

    def download(self, rng: random.Random) -> None:
        node, share = rng.choice(self.nodes), rng.random()
        attempt = functools.partial(shared.killed_download, node=node, share=share)
        self.add("SIGKILL in a download", f"{node}, after {share:.0%} of its events", attempt)

    def add(self, kind: str, text: str, attempt: Attempt, variant: str = "") -> None:
        self.faults.append(Fault(len(self.faults) + 1, kind, text, attempt, variant))

    def _rng(self) -> random.Random:
        return random.Random(f"{self.seed}-{len(self.faults)}")

    def _num_steps(self, node: str) -> int:
        config = self.baseline.graph.nodes[node].config
        return int(config.budget.max_steps)  # type: ignore[attr-defined]
