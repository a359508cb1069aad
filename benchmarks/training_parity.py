"""Part 1 of `benchmarks/training.py`: the same training by a plain TRL script and by our runner."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any
from unittest import mock

from pydantic import BaseModel

from benchmarks.training_rows import (
    conversation_rows,
    mixed_lengths,
    num_tokens,
    pair_rows,
    write_plain_rows,
    write_rows,
)
from benchmarks.training_tools import (
    CHAT_TEMPLATE,
    LEARNING_RATE,
    NAMES,
    SEED,
    Run,
    number,
    our_environment,
    spread,
    step_seconds,
    table,
)
from smoltulu.artifacts.store import Store
from smoltulu.schemas.artifact import ArtifactReference, Spec
from smoltulu.schemas.common import scientific
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.reference import ReferenceLogpsConfig, ReferenceLogpsInputs
from smoltulu.schemas.training import (
    DPOInputs,
    DPOSettings,
    GateSettings,
    RewardModelSettings,
    SFTSettings,
    TrainingInputs,
)
from smoltulu.tasks.engine import launch
from smoltulu.tasks.engine.runner import Job, run_stage
from smoltulu.tasks.progress import Progress
from smoltulu.tasks.stages import STAGES

EFFECTIVE, PER_DEVICE, LOGGING_STEPS = 8, 4, 5
_NUM_WARM_UP_STEPS = 3
_PROMPT_SHARE, _SPREAD = 0.25, 0.3
_GOAL = 0.98
_LOG = logging.getLogger("smoltulu.benchmark")


def same_settings(run: Run) -> None:
    """The table of part 1."""
    num_steps = _NUM_WARM_UP_STEPS + run.options.steps
    rows = []
    for stage in run.options.stages:
        files, tokens = _inputs(run, stage, num_steps)
        plain: list[dict[str, Any]] = []
        ours: list[dict[str, Any]] = []
        for _ in range(run.options.repeats):
            plain += run.child("plain_trl", [_plain_job(run, stage, files["plain"], num_steps)], our_environment())
            ours.append(_through_the_runner(run, stage, files, num_steps))
        # All rows are of one random mix: a step's tokens are those of the mean.
        measured_tokens = tokens * run.options.steps / num_steps
        rates = [
            measured_tokens / sum(step_seconds([result["ends"] for result in results])[_NUM_WARM_UP_STEPS:])
            for results in (plain, ours)
        ]
        spreads = [
            spread([measured_tokens / (result["ends"][-1] - result["ends"][_NUM_WARM_UP_STEPS - 1]) for result in side])
            for side in (plain, ours)
        ]
        ratio = rates[1] / rates[0]
        cells = [f"{number(rate)} ({seen})" for rate, seen in zip(rates, spreads, strict=True)]
        rows.append(
            [NAMES[stage], *cells, f"{ratio:.3f}", f"{plain[0]['losses'][-1]:.5f} / {ours[0]['losses'][-1]:.5f}"]
        )
        run.goal(f"{NAMES[stage]}: ours / plain TRL, tokens/s >= {_GOAL}", f"{ratio:.3f}", ratio >= _GOAL)
    table(["same settings", "plain TRL, tokens/s", "ours, tokens/s", "ratio", "last loss, TRL / ours"], rows)
    print(
        f"\n{run.options.steps} steps of {EFFECTIVE} rows (pairs), {PER_DEVICE} a forward pass, after "
        f"{_NUM_WARM_UP_STEPS} of warm-up; {run.options.repeats} runs of each in turn, every step's median (in "
        "brackets: whole runs). Float32, padded on both sides; log-probabilities of the reference computed before. "
        "Ours: store, lock, child process, progress to the parent, history, tracker, guards; TRL's script logs to no "
        "tracker and has our child's environment (allocator). The reward model's head is drawn otherwise, so its "
        "losses differ."
    )


def _inputs(run: Run, stage: str, num_steps: int) -> tuple[dict[str, str], int]:
    """(files, tokens of one epoch); as many rows as the steps take."""
    num_rows = EFFECTIVE * num_steps
    minute = run.shape.name == "minute"
    mean, median, longest = (24, 20, 64) if minute else (160, 125, 512)
    lengths = mixed_lengths(num_rows, mean, median, longest, SEED)
    if stage == "sft":
        made = conversation_rows(lengths, run.shape)
    else:
        made = pair_rows(lengths, _PROMPT_SHARE, run.shape, _SPREAD, SEED)
    files = {
        "ours": str(write_rows(made, run.fresh("rows.parquet"))),
        "plain": str(write_plain_rows(made, stage, run.fresh("plain.parquet"))),
    }
    if stage == "dpo":
        files["reference_logps"] = _reference_logps(run, files["ours"])
    return files, num_tokens(made, longest)[0]


def _plain_job(run: Run, stage: str, rows: str, num_steps: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "learning_rate": LEARNING_RATE, "max_steps": num_steps, "seed": SEED, "data_seed": SEED,
        "per_device_train_batch_size": PER_DEVICE, "gradient_accumulation_steps": EFFECTIVE // PER_DEVICE,
        "activation_checkpointing": False, "bf16": False, "use_cpu": True, "logging_steps": LOGGING_STEPS,
        "save_strategy": "no", "disable_tqdm": True, "max_length": 512,
    }  # fmt: skip
    if stage == "reward_model":
        settings |= {"adam_epsilon": 1e-5}
    if stage == "dpo":
        settings |= {"loss_type": ["sigmoid_norm"], "beta": 5.0, "precompute_ref_log_probs": True}
    return {
        "stage": stage, "model": run.model(run.shape), "rows": rows, "folder": str(run.fresh("plain")),
        "settings": settings,
    }  # fmt: skip


def _through_the_runner(run: Run, stage: str, files: dict[str, str], num_steps: int) -> dict[str, Any]:
    """One training as a flow runs it; when its steps ended, by the messages that reached the parent."""
    settings: dict[str, Any] = {
        "learning_rate": LEARNING_RATE, "effective_batch_size": EFFECTIVE, "max_steps": num_steps, "seed": SEED,
        "precision": "float32", "max_length": 512,
    }  # fmt: skip
    config = {
        "sft": lambda: SFTSettings(**settings, gate=GateSettings(num_prompts=0)),
        "reward_model": lambda: RewardModelSettings(**settings),
        "dpo": lambda: DPOSettings(**settings, gate=GateSettings(num_prompts=0)),
    }[stage]()
    inputs: dict[str, Any] = {"model": run.model(run.shape), "dataset": files["ours"], "chat_template": CHAT_TEMPLATE}
    stage_inputs = (
        DPOInputs(**inputs, reference_logps=files["reference_logps"]) if stage == "dpo" else TrainingInputs(**inputs)
    )
    stamps: list[float] = []

    class Clock(Progress):
        def __call__(self, step: int, num_steps: int, **metrics: float) -> None:
            if step == 0:
                stamps.clear()
            stamps.append(time.monotonic())
            super().__call__(step, num_steps, **metrics)

    with mock.patch.object(launch, "Progress", Clock):
        made = _run_stage(run, stage, config, stage_inputs)
    history = (Path(made.path) / "logs" / "history.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, history) if "loss" in row]
    return {"ends": [stamp - stamps[0] for stamp in stamps[1:]], "losses": losses}


def _reference_logps(run: Run, rows: str) -> str:
    """File of the reference's log-probabilities, by our own stage."""
    config = ReferenceLogpsConfig(precision="float32")
    inputs = ReferenceLogpsInputs(model=run.model(run.shape), dataset=rows, chat_template=CHAT_TEMPLATE)
    made = _run_stage(run, "reference_logps", config, inputs)
    return str(Path(made.path) / made.outputs["file"])


def _run_stage(run: Run, stage: str, config: BaseModel, inputs: BaseModel) -> ArtifactReference:
    """Make an artifact that was not there before."""
    compute = ComputeSettings(
        device="cpu", per_device_train_batch_size=PER_DEVICE, logging_steps=LOGGING_STEPS, packing=False,
        save_steps=1_000_000, min_free_disk_gb=0,
    )  # fmt: skip
    store = run.fresh("store")
    spec = Spec(stage=stage, version=1, config=scientific(config), inputs={}, externals={"run": store.name})
    return run_stage(Job(stage, STAGES[stage], config, compute, spec, inputs), Store(store), _LOG)
