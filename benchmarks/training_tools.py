"""What the parts of `benchmarks/training.py` share: the run, processes, medians, tables."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.training_rows import SHAPES, Shape, write_model
from smoltulu.recipes import CHAT_TEMPLATES

WORK = Path(__file__).with_name("training_work.py")
LEARNING_RATE, SEED = 1e-5, 42
CHAT_TEMPLATE = (CHAT_TEMPLATES / "tulu.jinja").read_text("utf-8")
NAMES = {"sft": "SFT", "reward_model": "reward model", "dpo": "DPO"}


class ChildFailed(RuntimeError):
    """A training of the benchmark ended without a result; the text holds the end of its log."""

    def __init__(self, text: str, returncode: int) -> None:
        super().__init__(text)
        self.returncode = returncode


@dataclass
class Run:
    """What one run of the benchmark knows so far."""

    folder: Path
    options: argparse.Namespace
    #: The script whose functions run in a process of their own.
    work: Path = WORK
    goals: list[tuple[str, str, bool]] = field(default_factory=list)
    _models: dict[str, Path] = field(default_factory=dict)
    _number: int = 0

    @property
    def shape(self) -> Shape:
        """Of parts 1 and 2."""
        return SHAPES[self.options.shape]

    def goal(self, text: str, value: str, met: bool) -> None:
        self.goals.append((text, value, met))

    def model(self, shape: Shape, device: str = "cpu") -> str:
        """Folder of a model of that shape, written on first use."""
        if shape.name not in self._models:
            write_model(shape, self.folder / f"model-{shape.name}", device)
            self._models[shape.name] = self.folder / f"model-{shape.name}"
        return str(self._models[shape.name])

    def fresh(self, name: str) -> Path:
        """A path that nothing has yet."""
        self._number += 1
        return self.folder / f"{self._number:03d}-{name}"

    def child(self, function: str, jobs: list[dict[str, Any]], environment: dict[str, str]) -> list[dict[str, Any]]:
        """Results of a function of `work`, in a process of its own."""
        file = self.fresh("jobs.json")
        file.write_text(json.dumps(jobs))
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        quiet |= {"HF_DATASETS_CACHE": str(self.folder / "datasets"), "TQDM_DISABLE": "1"}
        done = subprocess.run(
            [sys.executable, str(self.work), function, str(file)],
            capture_output=True,
            text=True,
            env={**environment, **quiet},
            check=False,
        )
        if done.returncode:
            text = f"{function} failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            raise ChildFailed(text, done.returncode)
        return list(json.loads(done.stdout.splitlines()[-1]))


def our_environment() -> dict[str, str]:
    """What the runner gives the process of a stage: allocator, waiting threads."""
    from smoltulu.schemas.compute import ComputeSettings
    from smoltulu.tasks.engine.launch import _child_environment

    return _child_environment(ComputeSettings(), 1)


def step_seconds(runs: list[list[float]]) -> list[float]:
    """Of every optimizer step its median over the runs, which all did the same steps; `runs`: when they ended.

    Taken step by step, so that a disturbance of one run meets only the steps it fell on; what recurs at the same step
    of every run (logging) stays in.
    """
    assert len({len(ends) for ends in runs}) == 1, [len(ends) for ends in runs]
    durations = [[end - begin for begin, end in zip([0.0, *ends], ends, strict=False)] for ends in runs]
    return [statistics.median(of_one_step) for of_one_step in zip(*durations, strict=True)]


def spread(values: list[float]) -> str:
    """Lowest to highest."""
    return f"{number(min(values))}–{number(max(values))}"


def number(value: float) -> str:
    """Three significant digits or whole numbers."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(head: list[str], rows: list[list[str]]) -> None:
    """Print as Markdown, first column left, others right."""
    print(f"\n| {' | '.join(head)} |\n|---|{'---:|' * (len(head) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


def step_clock(seconds: list[float]) -> Any:
    """A callback of a trainer that adds the time from the end of a step to that of the next: loading is part of it."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.last = time.monotonic()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now = time.monotonic()
            seconds.append(now - self.last)
            self.last = now

    return Clock()


def plain_environment() -> dict[str, str]:
    """What a script started by hand has."""
    return dict(os.environ)
