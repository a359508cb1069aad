"""Trainings that the shrunken recipe does not have: each with an unbroken run of its own, up to that training only."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.faults.kills import Attempt, Result
from tests.faults.sandbox import Sandbox

_LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
_WSD = {"kind": "wsd", "warmup_steps": 2, "decay_ratio": 0.25}
_SCHEDULED = {"sft.lr_scheduler_type": "linear", "sft.warmup_ratio": 0.0, "sft.schedule": _WSD}
#: Wide layers, so that activations are most of what a batch of 64 rows needs: about 0.7 GB more than one of 32.
_WIDE = {
    "base_model.scratch.intermediate_size": 16384,
    "sft.effective_batch_size": 64,
    "sft.max_steps": 6,
    "compute.stages.sft.save_steps": 2,
    "preflight.dry_run": False,
}
_BLOCKS = ("sft", "reward_model", "dpo", "rlvr", "evaluation", "publish")


@dataclass(frozen=True)
class Variant:
    """A training configuration.

    own       its overrides; blocks of stages that `node` does not need are left out
    before    overrides of a training that is finished before, and gone on from
    smaller   overrides with which it fits into memory: the unbroken run has them, the others must come to them
    """

    kind: str
    node: str
    own: dict[str, Any]
    before: dict[str, Any] = field(default_factory=dict)
    smaller: dict[str, Any] = field(default_factory=dict)

    def overrides(self, common: dict[str, Any]) -> dict[str, Any]:
        """These of the recipe as a whole, up to this training."""
        needed = ("sft",) if self.node == "sft" else ("sft", self.node)
        left_out = [block for block in _BLOCKS if block not in needed]
        prefixes = tuple(f"{start}{block}" for block in left_out for start in ("", "compute.stages."))
        kept = {name: value for name, value in common.items() if not name.startswith(prefixes)}
        return {**kept, **dict.fromkeys(left_out), **self.own}

    def make(self, home: Path, main: Sandbox) -> Sandbox:
        """The unbroken run, in `home`; what it shares with that of the whole recipe is copied."""
        overrides = self.overrides(main.overrides)
        baseline = Sandbox(home, {**overrides, **self.smaller})
        baseline.take(main)
        # Not the same weights, where only machinery differs: it has the same key.
        shutil.rmtree(baseline.folder(self.node), ignore_errors=True)
        if self.before:
            _run(Sandbox(home, {**overrides, **self.before}))
        if not self.smaller:
            _run(baseline, {"record": str(home / "events.txt")})
            return baseline
        # Threads that meet in malloc get an arena each, 64 MB of address space.
        baseline.environment["MALLOC_ARENA_MAX"] = "1"
        small = _run(baseline, {"record": str(home / "events.txt")}, self.node)
        larger = Sandbox(home / "larger", overrides, environment=baseline.environment)
        larger.take(baseline)
        shutil.rmtree(larger.folder(self.node))
        large = _run(larger, node=self.node)
        # Near the smaller: memory must run out in the first step. What a step computed in one micro-batch is equal to
        # that of two up to rounding only.
        (home / "memory").write_text(str(small + (large - small) // 4))
        return baseline

    def recipe_of(self, main: Sandbox) -> Sandbox:
        """Its recipe, without a run."""
        return Sandbox(main.home / "none", self.overrides(main.overrides))

    def baseline(self, home: Path, main: Sandbox) -> Sandbox:
        """The unbroken run that is in `home`, with what every run of a fault has."""
        baseline = Sandbox(home, self.overrides(main.overrides))
        if self.smaller:
            baseline.environment["MALLOC_ARENA_MAX"] = "1"
            baseline.always = {"stage": self.node, "memory": int((home / "memory").read_text())}
        return baseline


def _run(sandbox: Sandbox, fault: dict[str, Any] | None = None, node: str = "") -> int:
    """Run to the end; most address space that the process of `node` had."""
    run = sandbox.start(fault)
    most = 0
    while run.process.poll() is None:
        for child in psutil.Process(run.process.pid).children() if node else ():
            try:
                if f"/{sandbox.folder(node).name}/" in " ".join(child.cmdline()):
                    status = Path(f"/proc/{child.pid}/status").read_text()
                    most = max(most, 1024 * int(status.partition("VmPeak:")[2].split()[0]))
            except (psutil.NoSuchProcess, OSError, IndexError):
                continue
        time.sleep(0.02)
    if run.wait():
        raise AssertionError(f"the unbroken run failed:\n{run.text[-3000:]}")
    return most


VARIANTS = {
    "lora-sft": Variant("SIGKILL with LoRA", "sft", {"sft.lora": _LORA}),
    "lora-dpo": Variant("SIGKILL with LoRA", "dpo", {"dpo.lora": _LORA}),
    # The recipe's own trainings are packed, a step in one micro-batch.
    "packed": Variant("SIGKILL with packing", "sft", {"compute.per_device_train_batch_size": 4}),
    "padded": Variant("SIGKILL with packing", "sft", {"compute.packing": False}),
    "extension": Variant(
        "SIGKILL in an extension", "sft", {**_SCHEDULED, "sft.max_steps": 24}, before={"sft.max_steps": 12}
    ),
    "processes": Variant(
        "SIGKILL with two processes",
        "sft",
        {"compute.stages.sft.num_processes": 2, "compute.per_device_train_batch_size": 8},
    ),
    "memory": Variant(
        "SIGKILL around an out-of-memory restart",
        "sft",
        {**_WIDE, "compute.stages.sft.per_device_train_batch_size": 64},
        smaller={"compute.stages.sft.per_device_train_batch_size": 32},
    ),
}
#: What a run says that did what the variant is for.
_SAYS = {
    "extension": "goes on from step",
    "memory": "out of memory with per_device_train_batch_size 64: goes on with 32",
}


def said(variant: str, attempt: Attempt) -> Attempt:
    """The attempt, which is wrong where no run of it says that it did what the variant is for."""

    def checked(sandbox: Sandbox, baseline: Sandbox) -> Result:
        result = attempt(sandbox, baseline)
        texts = [path.read_text(errors="replace") for path in sandbox.home.rglob("run-*.txt")]
        if variant in _SAYS and not any(_SAYS[variant] in text for text in texts):
            result.problems.append(f"no run says {_SAYS[variant]!r}")
        return result

    return checked


class Baselines:
    """The unbroken runs: of the whole recipe, and of each variant once a fault asks for it."""

    def __init__(self, home: Path, main: Sandbox) -> None:
        self.home, self.main = home, main
        self._locks = {name: threading.Lock() for name in VARIANTS}

    def of(self, variant: str) -> Sandbox:
        if not variant:
            return self.main
        home = self.home / f"baseline-{variant}"
        with self._locks[variant]:
            if not (home / "done").exists():
                shutil.rmtree(home, ignore_errors=True)
                VARIANTS[variant].make(home, self.main)
                (home / "done").touch()
        return VARIANTS[variant].baseline(home, self.main)
