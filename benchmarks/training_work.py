"""The trainings of benchmarks/training.py, timed, in a process of its own: `training_work.py FUNCTION JOBS.json`.

Prints, as JSON in its last line, what the function returns. A job is one training; its result says when every
optimizer step ended (seconds since the training began), the losses logged and the peak memory.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

#: Kinds of work -> what the kernels (CUDA) and operators (CPU) that do it have in their names; the first match counts.
_KINDS = {
    "attention": r"flash|fmha|attention|varlen|sdpa",
    "optimizer": r"adam|multi_tensor|foreach",
    "matrix products": r"gemm|cutlass|nvjet|xmma|cublas|aten::(mm|addmm|bmm|linear|matmul)",
    "copies and casts": r"memcpy|memset|copy|aten::to",
}


def plain_trl(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """TRL as its own example scripts use it, one trainer after the other, and a callback with a clock.

    Job: stage, model (folder), rows (parquet), settings (keyword arguments of TRL's config).
    """
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.stamps: list[float] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.stamps = [time.monotonic()]

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.stamps.append(time.monotonic())

    classes = {
        "sft": (SFTConfig, SFTTrainer),
        "reward_model": (RewardConfig, RewardTrainer),
        "dpo": (DPOConfig, DPOTrainer),
    }
    results = []
    for job in jobs:
        config_class, trainer_class = classes[job["stage"]]
        clock = Clock()
        trainer = trainer_class(
            model=job["model"],
            args=config_class(output_dir=job["folder"], **job["settings"]),
            train_dataset=load_dataset("parquet", data_files=job["rows"], split="train"),
            callbacks=[clock],
        )
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        results.append(result(clock.stamps, losses))
        del trainer
        gc.collect()
    return results


class _EnoughError(Exception):
    """The last step is done: what follows (saving, the gate) is not what is measured."""


def our_stages(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our stages' own functions, one after the other, up to their last optimizer step.

    Job: stage, config, inputs, compute, folder; profile: steps at the end that the profiler watches; whole: do not
    leave after the last step; kill_at: step at whose end the process is killed; bfloat16: autocast on a CPU too.
    """
    from smoltulu.schemas.compute import ComputeSettings
    from smoltulu.tasks.stage import StageContext
    from smoltulu.tasks.stages import STAGES

    results = []
    for job in jobs:
        stage, folder = STAGES[job["stage"]], Path(job["folder"])
        for name in ("out", "work/checkpoints"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        watch = _Watch(job.get("profile", 0), job.get("whole", False), job.get("kill_at", 0))
        context = StageContext(folder / "out", folder / "work", ComputeSettings(**job["compute"]), watch)
        half = mock.patch("smoltulu.tasks.trainer.loop.use_bfloat16", lambda *_: True)
        with contextlib.suppress(_EnoughError), half if job.get("bfloat16") else contextlib.nullcontext():
            stage.function(stage.config(**job["config"]), stage.inputs(**job["inputs"]), context)
        history = folder / "work" / "logs" / "history.jsonl"
        rows = [json.loads(line) for line in history.read_text().splitlines()] if history.exists() else []
        results.append(result(watch.stamps, [row["loss"] for row in rows if "loss" in row]) | {"kinds": watch.kinds})
        gc.collect()
    return results


class _Watch:
    """A stage's `report`: a clock, and a profiler over the last steps."""

    def __init__(self, profile: int, whole: bool, kill_at: int) -> None:
        self.profile, self.whole, self.kill_at = profile, whole, kill_at
        self.stamps = [time.monotonic()]
        self.kinds: dict[str, float] = {}
        self.profiler: Any = None

    def __call__(self, step: int, num_steps: int, **metrics: float) -> None:
        if step == self.kill_at > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.profiler is None:
            self.stamps = [*(self.stamps if step else []), time.monotonic()]
        if self.profile and step == num_steps - self.profile:
            from torch.profiler import profile

            self.profiler = profile()
            self.profiler.start()
        if step == num_steps and not self.whole:
            if self.profiler is not None:
                self.profiler.stop()
                self.kinds = seconds_of_kinds(_events(self.profiler))
            raise _EnoughError


def _events(profiler: Any) -> Iterable[tuple[str, float]]:
    """(name, microseconds) of kernels where there are any, else of operators."""
    from torch.autograd import DeviceType

    events = [event for event in profiler.key_averages() if not event.is_user_annotation]
    # An operator has the time of its kernels as its own too: counted once.
    kernels = [(event.key, event.self_device_time_total) for event in events if event.device_type == DeviceType.CUDA]
    return kernels or [(event.key, event.self_cpu_time_total) for event in events]


def seconds_of_kinds(events: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Kind of work -> seconds, the largest first, of events (name, microseconds)."""
    times: Counter[str] = Counter()
    for name, spent in events:
        kind = next((kind for kind, names in _KINDS.items() if re.search(names, name, re.IGNORECASE)), "elementwise")
        times[kind] += spent / 1e6  # type: ignore[assignment]
    return dict(times.most_common())


def result(stamps: list[float], losses: list[float]) -> dict[str, Any]:
    """What is known about a training: when its steps ended, how it ended, what memory it took."""
    import torch

    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ends = [stamp - stamps[0] for stamp in stamps[1:]]
    return {"ends": ends, "losses": losses, "peak_bytes": peak}


if __name__ == "__main__":
    done = {"plain_trl": plain_trl, "our_stages": our_stages}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
    print(json.dumps(done))
