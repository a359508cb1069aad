"""The training stages on a two-layer model and a handful of rows: what the proofs of their mathematics run on.

Everything goes through the stage's own function and the real trainer. `run` trains; `trainer_of` builds the trainer
only, for tests of what it was given.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import smoltulu.tasks.training.dpo
import smoltulu.tasks.training.reward_model
import smoltulu.tasks.training.sft
from smoltulu.flows.graphs.recipe_graph import preflight_config
from smoltulu.schemas.artifact import Spec
from smoltulu.schemas.common import scientific
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.preflight import PreflightInputs, PreflightSettings
from smoltulu.schemas.reference import ReferenceLogpsConfig, ReferenceLogpsInputs
from smoltulu.schemas.rlvr import RLVRInputs
from smoltulu.schemas.training import (
    DPOInputs,
    DPOSettings,
    RewardModelSettings,
    SFTInputs,
    SFTSettings,
    TrainingInputs,
    TrainingSettings,
)
from smoltulu.tasks.engine.launch import run_child
from smoltulu.tasks.job import Job
from smoltulu.tasks.preflight.stage import run_preflight
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.stages import STAGES
from smoltulu.tasks.training.reference_logps import run_reference_logps
from tests.rows_file import write_rows
from tests.tiny_model import TULU_TEMPLATE

MODULES = {
    "sft": smoltulu.tasks.training.sft,
    "reward_model": smoltulu.tasks.training.reward_model,
    "dpo": smoltulu.tasks.training.dpo,
}
FUNCTIONS: dict[str, Callable] = {
    "sft": smoltulu.tasks.training.sft.train_sft,
    "reward_model": smoltulu.tasks.training.reward_model.train_reward_model,
    "dpo": smoltulu.tasks.training.dpo.train_dpo,
}
SETTINGS: dict[str, Callable] = {"sft": SFTSettings, "reward_model": RewardModelSettings, "dpo": DPOSettings}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def conversations(count: int) -> list[dict[str, Any]]:
    """SFT rows of clearly different lengths; every third has two turns, every fourth a system turn."""
    rows = []
    for i in range(count):
        system = [turn("system", "You are helpful.")] if i % 4 == 1 else []
        first = [turn("user", f"What is {i} plus {i % 7}?"), turn("assistant", "so " * (4 * i % 9) + f"#### {i}")]
        second = [turn("user", "Which one is better?"), turn("assistant", f"The answer is {i}.")] if i % 3 == 0 else []
        rows.append({"id": f"0:{i}", "messages": system + first + second})
    return rows


def pairs(count: int) -> list[dict[str, Any]]:
    """Preference rows; the chosen side is longer in some and shorter in others, every third prompt has two turns."""
    rows = []
    for i in range(count):
        before = [turn("user", "Good morning"), turn("assistant", "Good morning.")] if i % 3 == 0 else []
        prompt = [*before, turn("user", f"What is {i} plus {i % 7}?")]
        chosen, rejected = "so " * (5 * i % 8) + f"#### {i + i % 7}", "or more " * (3 * i % 5) + f"#### {i}"
        rows.append(
            {
                "id": f"0:{i}",
                "prompt": prompt,
                "chosen": [turn("assistant", chosen)],
                "rejected": [turn("assistant", rejected)],
            }
        )
    return rows


@dataclass(frozen=True)
class Run:
    """A finished training: its history (one row per logged step) and where its files lie."""

    outputs: Any
    metrics: dict[str, float]
    history: list[dict[str, float]]
    model: Path
    checkpoints: Path


def stage_arguments(
    stage: str, folder: Path, model: Path, rows: list[dict[str, Any]], settings: dict[str, Any],
    template: str = TULU_TEMPLATE, held_out: list[dict[str, Any]] | None = None, **compute: Any,
) -> tuple[Any, TrainingInputs, StageContext]:  # fmt: skip
    """What the stage's function is called with; what stages before it make of the rows is written to `folder`."""
    (folder / "out").mkdir(parents=True, exist_ok=True)
    (folder / "work" / "checkpoints").mkdir(parents=True, exist_ok=True)
    chosen = {
        "learning_rate": 1e-3,
        "effective_batch_size": len(rows),
        "max_length": 128,
        "precision": "float32",
        "gate": {"num_prompts": 0},
    }
    if stage == "reward_model":
        del chosen["gate"]
    machinery = {
        "device": "cpu",
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_steps": 1,
        "num_threads": 1,
    }
    machines = ComputeSettings(**machinery | compute)
    config = SETTINGS[stage](**chosen | settings)
    inputs = training_inputs(stage, folder, model, rows, config, machines, template)
    if held_out is not None:
        aside = training_inputs(stage, folder / "held_out", model, held_out, config, machines, template)
        reference = {"held_out_reference_logps": aside.reference_logps} if isinstance(aside, DPOInputs) else {}
        texts = str(folder / "held_out" / "rows.parquet")
        inputs = inputs.model_copy(update={"held_out": aside.dataset, "held_out_rows": texts, **reference})
    context = StageContext(folder / "out", folder / "work", machines, lambda *args, **kwargs: None)
    return config, inputs, context


def training_inputs(
    stage: str,
    folder: Path,
    model: Path,
    rows: list[dict[str, Any]],
    config: TrainingSettings,
    compute: ComputeSettings,
    template: str = TULU_TEMPLATE,
) -> TrainingInputs:
    """The model, the rows as the preflight tokenises them, and for DPO the reference's log-probabilities."""
    folder.mkdir(parents=True, exist_ok=True)
    source = write_rows(folder / "rows.parquet", rows)
    checks = PreflightSettings(max_overlong_share=1, max_unstable_share=1, max_faulty_share=1, dry_run=False)
    outputs, _ = run_preflight(
        preflight_config(stage, config, checks),
        PreflightInputs(model=str(model), dataset=str(source), chat_template=template),
        _context(folder / "preflight", compute),
    )
    taken = {
        "model": str(model),
        "dataset": str(folder / "preflight" / "out" / outputs.file),
        "chat_template": template,
    }
    if stage != "dpo":
        return (RLVRInputs if stage == "rlvr" else TrainingInputs)(**taken)
    reference, _ = run_reference_logps(
        ReferenceLogpsConfig(precision=config.precision),
        ReferenceLogpsInputs(**taken),
        _context(folder / "reference", compute),
    )
    return DPOInputs(**taken, reference_logps=str(folder / "reference" / "out" / reference.file))


def _context(folder: Path, compute: ComputeSettings) -> StageContext:
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return StageContext(folder / "out", folder / "work", compute, lambda *args, **kwargs: None)


def run(
    stage: str, folder: Path, model: Path, rows: list[dict[str, Any]], settings: dict[str, Any], **compute: Any
) -> Run:
    """Train; all rows make one optimizer step unless `effective_batch_size` is given."""
    config, inputs, context = stage_arguments(stage, folder, model, rows, settings, **compute)
    outputs, metrics = FUNCTIONS[stage](config, inputs, context)
    history = [json.loads(line) for line in (folder / "out" / "logs" / "history.jsonl").open()]
    return Run(outputs, metrics, history, folder / "out" / "model", folder / "work" / "checkpoints")


def weights_of_checkpoint(checkpoint: Path, who: str = "model") -> dict[str, torch.Tensor]:
    """Of a checkpoint that one process wrote."""
    written, start = load_file(checkpoint / "shards" / "rank-0-of-1.safetensors"), f"{who}.weights."
    return {name.removeprefix(start): value for name, value in written.items() if name.startswith(start)}


def trainer_of(
    stage: str, folder: Path, model: Path, rows: list[dict[str, Any]], settings: dict[str, Any], **compute: Any
) -> Any:
    """The trainer as the stage builds it, with tokenised rows, before its first step."""
    return MODULES[stage].build(*stage_arguments(stage, folder, model, rows, settings, **compute))


def two_processes(
    stage: str, folder: Path, model: Path, rows: list[Any], settings: Any, weights: str | None = None, **compute: Any
) -> Callable[[str], Path]:
    """A function: name of a folder -> the work folder of a training there by two processes, warm ones."""
    compute = {"num_processes": 2, "launcher": "warm"} | compute
    config, inputs, context = stage_arguments(stage, folder / "job", model, rows, settings, **compute)
    if weights is not None:
        inputs = SFTInputs(**inputs.model_dump(), weights=weights)
    spec = Spec(stage=stage, version=1, config=scientific(config), inputs={}, externals={})
    job = Job(stage, STAGES[stage], config, context.compute, spec, inputs)

    def made(name: str) -> Path:
        work = folder / name / "work"
        (work / "output").mkdir(parents=True)
        run_child(job, work, work / "output", logging.getLogger("test"))
        return work

    return made
