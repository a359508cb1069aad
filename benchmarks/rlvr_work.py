"""The trainings of benchmarks/rlvr.py, timed by phase, in a process of its own: `rlvr_work.py FUNCTION JOBS.json`.

Prints, as JSON in its last line, a result for every job. Both sides carry the same clock, around the same functions.
"""

from __future__ import annotations

import contextlib
import gc
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

#: Where the time of an optimizer step goes: writing the rollouts, grading them, looking at them before the update
#: (log-probabilities of policy and reference, values, advantages), and the rest: forward, backward, optimizer, logs.
PHASES = ("generation", "scoring", "look", "update")


class Phases:
    """A clock that is always in one phase; what a phase calls may be in another one, and is not counted twice.

    On a GPU it waits for the device wherever the phase changes, and reads the peak of the memory since the last change.
    """

    def __init__(self, num_warm_up_steps: int) -> None:
        import torch

        self.num_warm_up_steps = num_warm_up_steps
        self.cuda = torch.cuda if torch.cuda.is_available() else None
        #: Phase -> seconds, one dictionary a step.
        self.steps: list[dict[str, float]] = []
        #: Tokens that were written, one number a step.
        self.num_written: list[int] = []
        #: Phase -> bytes, over the steps behind the warm-up.
        self.peaks: dict[str, int] = {}
        self.left_by_generation = 0
        self._before_generation = 0
        self._phase, self._since = "update", time.monotonic()
        self._seconds: Counter[str] = Counter()
        self._num_written = 0

    def begin(self) -> None:
        """Of the first step: what lies before it counts nowhere."""
        self.end_step()
        self.steps.clear()
        self.num_written.clear()

    def end_step(self) -> None:
        self._change(self._phase)
        self.steps.append({phase: self._seconds[phase] for phase in PHASES})
        self.num_written.append(self._num_written)
        self._seconds.clear()
        self._num_written = 0

    def within(self, phase: str, function: Callable[..., Any], num_written: Callable[..., int] | None = None) -> Any:
        """`function`, in this phase. `num_written`: tokens that it wrote, of its result and arguments."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            before = self._phase
            self._change(phase)
            if phase == "generation":
                self._before_generation = self._allocated()
            # What is graded was written, and whatever context that was done in has ended.
            elif phase == "scoring" and len(self.steps) >= self.num_warm_up_steps:
                left = self._allocated() - self._before_generation
                self.left_by_generation = max(self.left_by_generation, left)
            try:
                made = function(*args, **kwargs)
            finally:
                self._change(before)
            if num_written is not None:
                self._num_written += num_written(made, *args)
            return made

        return timed

    def result(self, losses: list[float]) -> dict[str, Any]:
        made = {"steps": self.steps, "num_written": self.num_written, "losses": losses}
        return made | {"peaks": self.peaks, "left_by_generation": self.left_by_generation}

    def _allocated(self) -> int:
        return self.cuda.memory_allocated() if self.cuda else 0

    def _change(self, phase: str) -> None:
        if self.cuda:
            self.cuda.synchronize()
            if len(self.steps) >= self.num_warm_up_steps:
                self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), self.cuda.max_memory_allocated())
            self.cuda.reset_peak_memory_stats()
        now = time.monotonic()
        self._seconds[self._phase] += now - self._since  # type: ignore[assignment]
        self._phase, self._since = phase, now


@contextlib.contextmanager
def phases_of_grpo(phases: Phases) -> Iterator[None]:
    """TRL's trainer, and so ours, which is made of it, with the clock in it. Ours writes rollouts by an engine."""
    from trl import GRPOTrainer

    from smoltulu.tasks.training.rollout_engine import Writer

    written = phases.within("generation", Writer.__call__, lambda made, *_: sum(len(one.ids) for one in made))
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Writer, "__call__", written))
        for phase, name, num_written in (
            ("look", "_prepare_inputs", None),
            ("generation", "_generate_single_turn", lambda made, *_: sum(map(len, made[0]))),
            ("scoring", "_calculate_rewards", None),
        ):
            timed = phases.within(phase, getattr(GRPOTrainer, name), num_written)
            stack.enter_context(mock.patch.object(GRPOTrainer, name, timed))
        yield


@contextlib.contextmanager
def phases_of_ppo(phases: Phases) -> Iterator[None]:
    """Our PPO with the clock in it."""
    from smoltulu.tasks.training import ppo
    from smoltulu.tasks.training.ppo_trainer import PPOTrainer

    scores_of_verifiers = ppo.verifier_scores

    def verifier_scores(*args: Any) -> Any:
        return phases.within("scoring", scores_of_verifiers(*args))

    def num_written(made: None, trainer: Any, batch: int, episodes: Any) -> int:
        return sum(len(episode["ids"]) for episode in episodes)

    roll_out, generate = PPOTrainer._roll_out, PPOTrainer._generate
    with (
        mock.patch.object(ppo, "verifier_scores", verifier_scores),
        mock.patch.object(PPOTrainer, "_roll_out", phases.within("look", roll_out)),
        mock.patch.object(PPOTrainer, "_generate", phases.within("generation", generate, num_written)),
    ):
        yield


def plain_grpo(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """TRL's `scripts/grpo.py`: the trainer with a model's folder, one reward function, the rows and a config.

    Job: model, rows (parquet), settings (keyword arguments of GRPOConfig), folder, num_warm_up_steps.
    """
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    results = []
    for job in jobs:
        phases = Phases(job["num_warm_up_steps"])

        class Clock(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                phases.begin()  # noqa: B023 - it is called within this round only

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                phases.end_step()  # noqa: B023

        with phases_of_grpo(phases):
            trainer = GRPOTrainer(
                model=job["model"],
                reward_funcs=[plain_reward],
                args=GRPOConfig(output_dir=job["folder"], **job["settings"]),
                train_dataset=load_dataset("parquet", data_files=job["rows"], split="train"),
                callbacks=[Clock()],
            )
            trainer.train()
        results.append(phases.result([row["loss"] for row in trainer.state.log_history if "loss" in row]))
        del trainer
        _free()
    return results


def plain_reward(
    completions: list[list[dict[str, str]]], verifier: list[str], ground_truth: list[str], **_: Any
) -> list[float]:
    """What somebody would write for these rows: the last number, or all keywords. It says on them what ours says."""
    rewards = []
    for (message,), name, truth in zip(completions, verifier, ground_truth, strict=True):
        if name == "gsm8k":
            numbers = re.findall(r"\d+", message["content"])
            rewards.append(float(bool(numbers) and numbers[-1] == truth))
        else:
            words = json.loads(truth)["keyword_list"]
            rewards.append(float(all(word in message["content"] for word in words)))
    return rewards


class _EnoughError(Exception):
    """The last step is done: what follows (saving, the gate) is not what is measured."""


def our_rlvr(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our stage's own function, one training after the other, up to the last optimizer step.

    Job: config, inputs, compute, folder, num_warm_up_steps; bfloat16: autocast on a CPU too.
    """
    from smoltulu.schemas.compute import ComputeSettings
    from smoltulu.schemas.rlvr import RLVRInputs, RLVRSettings
    from smoltulu.tasks.stage import StageContext
    from smoltulu.tasks.training.rlvr import train_rlvr

    results = []
    for job in jobs:
        folder, phases = Path(job["folder"]), Phases(job["num_warm_up_steps"])
        for name in ("out", "work/checkpoints"):
            (folder / name).mkdir(parents=True, exist_ok=True)

        def report(step: int, num_steps: int, **metrics: float) -> None:
            if step == 0:
                phases.begin()  # noqa: B023 - it is called within this round only
                return
            phases.end_step()  # noqa: B023
            if step == num_steps:
                raise _EnoughError

        context = StageContext(folder / "out", folder / "work", ComputeSettings(**job["compute"]), report)
        config = RLVRSettings.model_validate(job["config"])
        clock = phases_of_ppo if config.algorithm == "ppo" else phases_of_grpo
        half = mock.patch("smoltulu.tasks.trainer.loop.use_bfloat16", lambda *_: True)
        with (
            clock(phases),
            half if job.get("bfloat16") else contextlib.nullcontext(),
            contextlib.suppress(_EnoughError),
        ):
            train_rlvr(config, RLVRInputs(**job["inputs"]), context)
        rows = map(json.loads, (folder / "work" / "logs" / "history.jsonl").read_text().splitlines())
        results.append(phases.result([row["loss"] for row in rows if "loss" in row]))
        _free()
    return results


def _free() -> None:
    """What a training leaves of the device's memory."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    done = {"plain_grpo": plain_grpo, "our_rlvr": our_rlvr}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
    print(json.dumps(done))
