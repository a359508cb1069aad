"""A store that a fault is tried on: runs of a shrunken recipe, what they left, how it differs from the baseline."""

from __future__ import annotations

import filecmp
import fnmatch
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from smoltulu.artifacts.checkpoints import CHECKPOINT_MARKER
from smoltulu.artifacts.keys import CHECKPOINT_FOLDER, LOGS_FOLDER
from smoltulu.artifacts.layout import MANIFEST
from smoltulu.artifacts.store import Found, Missing, Store
from smoltulu.flows.graphs.recipe_graph import Graph
from smoltulu.flows.recipe import load_recipe
from smoltulu.schemas.artifact import Manifest
from tests import ROOT
from tests.faults.killer.sitecustomize import part_of
from tests.small_tiny import SMALL_TINY

PROJECT = ROOT
KILLER = Path(__file__).resolve().parent / "killer"
TRAINERS = ("sft", "reward-model", "dpo", "rlvr")


@dataclass
class Limits:
    """How long to wait, in units of what this machine takes: on a slow or busy one nothing is a fault for being late.

    run     until a run is given up
    orphan  until a process that should die with another one is gone
    flow    until a flow run that lost its worker is over
    """

    run: float = 600.0
    orphan: float = 15.0
    flow: float = 60.0

    def measure(self, seconds: float, num_stages: int) -> None:
        """Raise the limits to multiples of an unbroken run's time, and of its time per stage."""
        stage = seconds / num_stages
        self.run = max(self.run, 10 * seconds)
        self.orphan = max(self.orphan, 3 * stage)
        self.flow = max(self.flow, 10 * stage)


#: Of this process: `campaign.make_baseline` measures.
limits = Limits()

#: `tiny` with every stage as it is, but so small that each takes seconds; trainers write three to six checkpoints.
SHRUNKEN: dict[str, Any] = {
    **SMALL_TINY,
    "sft.max_steps": 18,
    "reward_model.max_steps": 12,
    "dpo.max_steps": 12,
    "rlvr.num_episodes": 320,
    "rlvr.effective_batch_size": 32,
    "rlvr.num_minibatches": 1,
    # So little training answers nothing right: without a reward for stopping, RLVR would leave the weights as they are.
    "rlvr.non_stop_reward": -1.0,
    "rlvr.learning_rate": 1e-3,
    "evaluation.sampled.num_prompts": 20,
    "evaluation.sampled.num_samples_per_prompt": 2,
    "evaluation.sampled.max_new_tokens": 16,
    "compute.stages.rlvr.per_device_train_batch_size": 32,
    "compute.stages.sft.save_steps": 3,
    "compute.stages.reward_model.save_steps": 3,
    "compute.stages.dpo.save_steps": 3,
    "compute.stages.rlvr.save_steps": 2,
    # Every step is in the history file, so that what a kill cost can be read off it.
    "compute.logging_steps": 1,
    "compute.min_free_disk_gb": 0,
}
#: For the sample in `make test`: from the world to SFT.
UP_TO_SFT: dict[str, Any] = {
    **{name: value for name, value in SHRUNKEN.items() if name.startswith(("world", "base_model", "sft", "compute.l"))},
    "compute.stages.sft.save_steps": 3,
    "compute.min_free_disk_gb": 0,
    **dict.fromkeys(("reward_model", "dpo", "rlvr", "evaluation", "publish", "contamination"), None),
}


@dataclass(frozen=True)
class Event:
    """A file-system event of an unbroken run: who, below which part of its folder, and the how-manieth there."""

    role: str
    part: str
    nth: int


@dataclass
class Run:
    """One `flows.local` process, running or over."""

    process: subprocess.Popen[bytes]
    output: Path
    popen_time: float = field(default_factory=time.monotonic)

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait(self) -> int:
        """Exit status. AssertionError where it does not end."""
        try:
            return self.process.wait(limits.run)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the run did not end; {self.output}") from None

    def outcomes(self) -> dict[str, str]:
        """Node -> cached, completed or resumed, as the run said."""
        lines = (line.split(": ", 1) for line in self.text.splitlines() if ": " in line)
        return {node: rest.split()[0] for node, rest in lines if rest.split() and rest.split()[0] in _OUTCOMES}


_OUTCOMES = ("cached", "completed", "resumed")
#: Words in the names of metrics that are not computed.
_MEASURED = ("second", "memory", "step_time")


@dataclass
class Sandbox:
    """A folder with a store, for runs of one recipe; what runs print goes to `logs` where that is another folder."""

    home: Path
    overrides: dict[str, Any]
    logs: Path | None = None
    #: what runs have in their environment besides this process's
    environment: dict[str, str] = field(default_factory=dict)
    #: what is wrong in every run, see killer/sitecustomize.py
    always: dict[str, Any] = field(default_factory=dict)
    num_runs: int = 0
    #: nodes whose artifacts are to be made
    left_out: set[str] = field(default_factory=set)

    @property
    def root(self) -> Path:
        return self.home / "store"

    @cached_property
    def graph(self) -> Graph:
        return Graph(load_recipe("tiny", self.overrides))

    @cached_property
    def store(self) -> Store:
        return Store(self.root)

    def beside(self, name: str) -> Sandbox:
        """Another one of the same recipe, in a folder of this one."""
        return self.at(self.home / name)

    def at(self, home: Path, logs: Path | None = None) -> Sandbox:
        """Another one of the same recipe."""
        return replace(self, home=home, logs=logs, environment=dict(self.environment), num_runs=0, left_out=set())

    def events(self, node: str) -> list[Event]:
        """File-system events below a node's folder, as an unbroken run here recorded them in `events.txt`."""
        return _events(self.home / "events.txt", f"{self.folder(node)}/")

    def folder(self, node: str) -> Path:
        """Folder of a node's key."""
        return self.store.folder(self.graph.spec(node))

    def found(self, node: str) -> Found | Missing:
        return self.store.find(self.graph.spec(node))

    def manifest(self, node: str) -> Manifest:
        """Manifest of a finished node."""
        found = self.found(node)
        assert isinstance(found, Found), f"{node}: {found.reason}"
        return found.manifest

    def start(self, fault: dict[str, Any] | None = None, **overrides: Any) -> Run:
        """Start the recipe; `fault` is for killer/sitecustomize.py."""
        self.num_runs += 1
        logs = self.logs or self.home
        logs.mkdir(parents=True, exist_ok=True)
        output = logs / f"run-{self.num_runs}.txt"
        environment = {
            **os.environ,
            "SMOLTULU_STORE": str(self.root),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(KILLER), os.environ.get("PYTHONPATH")])),
            "SMOLTULU_FAULT": json.dumps({**self.always, **(fault or {})}),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **self.environment,
        }
        given = [f"{name}={json.dumps(value)}" for name, value in {**self.overrides, **overrides}.items()]
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "smoltulu.flows.local", "tiny", *given],
                cwd=PROJECT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        return Run(process, output)

    def run(self, fault: dict[str, Any] | None = None, **overrides: Any) -> tuple[int, Run]:
        """Run the recipe to the end: exit status, run."""
        run = self.start(fault, **overrides)
        return run.wait(), run

    def copy_from(self, baseline: Sandbox, *, without: str | None = None) -> None:
        """Begin with what the baseline made, the artifact of one node left out.

        Without that of a training the publication is left out too: its card and lineage tell of the training.
        """
        self.left_out = {without} if without else set()
        if without in TRAINERS and "publish" in baseline.graph.nodes:
            self.left_out.add("publish")
        left_out = [baseline.folder(node) for node in self.left_out]
        shutil.copytree(
            baseline.root,
            self.root,
            ignore=lambda folder, names: [name for name in names if Path(folder, name) in left_out],
        )

    def take(self, other: Sandbox) -> None:
        """Copy what another sandbox has of this one's recipe: upstream nodes that recipes share have the same key."""
        for node in self.graph.nodes:
            if node not in other.graph.nodes or self.folder(node).exists():
                continue
            if (theirs := other.folder(node)).name == self.folder(node).name:
                shutil.copytree(theirs, self.folder(node))

    def processes(self) -> list[psutil.Process]:
        """Stage processes of this store, of whatever parent."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            command = process.info["cmdline"] or []
            if "smoltulu.tasks.engine.child" in command and any(text.startswith(f"{self.root}/") for text in command):
                found.append(process)
        return [process for process in found if process.info["status"] != psutil.STATUS_ZOMBIE]

    def num_orphans(self) -> int:
        """Stage processes that outlive their parent by more than `limits.orphan` seconds; they are ended then."""
        _, alive = psutil.wait_procs(self.processes(), timeout=limits.orphan)
        for process in alive:
            process.kill()
        return len(alive)

    def last_step(self, node: str) -> int:
        """Optimizer steps that a training in progress has done, by its history."""
        try:
            lines = (self.folder(node) / "work" / LOGS_FOLDER / "history.jsonl").read_text().splitlines()
        except OSError:
            return 0
        steps = [
            int(line.split(":", 1)[1].split(",", 1)[0]) for line in lines if line.startswith('{"step":') and "," in line
        ]
        return max(steps, default=0)

    def save_steps(self, node: str) -> int:
        """Optimizer steps between checkpoints of a node."""
        return self.graph.recipe.compute.of(self.graph.nodes[node].stage.name).save_steps

    def differences(self, baseline: Sandbox) -> list[str]:
        """What is not as in the baseline: every file of every artifact by its bytes, every manifest by its content."""
        wrong = []
        for node in self.graph.nodes:
            mine, theirs = self.found(node), baseline.found(node)
            assert isinstance(theirs, Found)
            if isinstance(mine, Missing):
                wrong.append(f"{node}: {mine.reason}")
                continue
            wrong += [f"{node}: {fault}" for fault in self.store.verify(mine)]
            files = differing_files(mine.folder, theirs.folder)
            fields = _differing_fields(mine.manifest, theirs.manifest)
            if node == "publish":
                # Its lineage, which is compared by content, tells when and how long each artifact was made.
                fields = [name for name in fields if name not in ("digest", "metrics")]  # its only metric: its size
            wrong += [f"{node}: {name} differs" for name in files]
            wrong += [f"{node}: {name} of the manifest differs" for name in fields]
        return wrong


@functools.cache
def _events(file: Path, prefix: str) -> list[Event]:
    """Their part without what differs from run to run (ids, times)."""
    counts: Counter[tuple[str, str]] = Counter()
    found = []
    for line in file.read_text().splitlines():
        role, _, path = line.split("\t")
        if path.startswith(prefix):
            part = part_of(path[len(prefix) - 1 :])
            counts[role, part] += 1
            found.append(Event(role, part, counts[role, part]))
    return found


def differing_files(mine: Path, theirs: Path) -> list[str]:
    def names(folder: Path) -> set[str]:
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        return {name for name in files if _told(name) or not (name == MANIFEST or name.startswith(f"{LOGS_FOLDER}/"))}

    both = names(mine) & names(theirs)
    readers = {name: read for name in sorted(both) if (read := _told(name))}
    _, differing, unreadable = filecmp.cmpfiles(mine, theirs, sorted(both - readers.keys()), shallow=False)
    told = [name for name, read in readers.items() if read(mine / name) != read(theirs / name)]
    return [*differing, *told, *unreadable, *sorted(names(mine) ^ names(theirs))]


def computed(values: dict[str, Any]) -> dict[str, Any]:
    """Metrics without what is measured: time, speed and memory."""
    return {name: value for name, value in values.items() if not any(word in name for word in _MEASURED)}


def _history(file: Path) -> list[dict[str, Any]]:
    """Every logged step."""
    return [computed(json.loads(line)) for line in file.read_text().splitlines()]


def _lineage(file: Path) -> list[dict[str, Any]]:
    """Every artifact that a published model was made from, without when, where and in how many attempts."""
    made = ("finished_at", "duration_seconds", "resumed_from_steps", "environment")
    records = [
        {name: value for name, value in record.items() if name not in made} for record in json.loads(file.read_text())
    ]
    return [{**record, "metrics": computed(record["metrics"])} for record in records]


def _trainer_state(file: Path) -> dict[str, Any]:
    """What the trainer keeps in a checkpoint, history included."""
    state = json.loads(file.read_text())
    return {**state, "log_history": [computed(row) for row in state["log_history"]]}


def _marker(file: Path) -> dict[str, Any]:
    """Files of a checkpoint, without the digest of the one that holds the history."""
    marker = json.loads(file.read_text())
    return {**marker, "files": {**marker["files"], "trainer_state.json": None}}


#: Files that tell how an artifact was made, by their pattern, with what of them does not differ from run to run.
_TOLD: dict[str, Callable[[Path], Any]] = {
    f"{LOGS_FOLDER}/history.jsonl": _history,
    "model/lineage.json": _lineage,
    f"{CHECKPOINT_FOLDER}/*/trainer_state.json": _trainer_state,
    f"{CHECKPOINT_FOLDER}/*/{CHECKPOINT_MARKER}": _marker,
}


def _told(name: str) -> Callable[[Path], Any] | None:
    return next((read for pattern, read in _TOLD.items() if fnmatch.fnmatch(name, pattern)), None)


def _differing_fields(mine: Manifest, theirs: Manifest) -> list[str]:
    def content(manifest: Manifest) -> dict[str, Any]:
        values = manifest.model_dump(include={"key", "spec", "digest", "inputs", "outputs", "metrics"})
        values["metrics"] = computed(values["metrics"])
        dry_run = values["outputs"].get("dry_run") or {}
        for name in ("seconds", "peak_memory_bytes"):
            dry_run.pop(name, None)
        return values

    a, b = content(mine), content(theirs)
    return [name for name in a if a[name] != b[name]]
