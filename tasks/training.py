"""What the training stages share: trainer arguments, progress, resumable checkpoints, history."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts.store import mark_complete, newest_checkpoint
from schemas.compute import ComputeSettings
from schemas.models import ModelOutputs
from schemas.training import TrainingSettings
from tasks.models import device_of, history_metrics, save_model, use_bfloat16
from tasks.stage import Report, StageContext

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

logger = logging.getLogger("smoltulu")
HISTORY_FILE = "history.jsonl"


def accumulation_steps(effective_batch_size: int, compute: ComputeSettings) -> int:
    """gradient_accumulation_steps = effective / (per device x processes).

    ValueError where they do not divide: a silently different effective batch would be another experiment.
    """
    per_step = compute.per_device_train_batch_size * compute.num_processes
    if effective_batch_size % per_step:
        allowed = [size for size in range(1, effective_batch_size + 1) if effective_batch_size % size == 0]
        raise ValueError(
            f"effective_batch_size {effective_batch_size} is not a multiple of per_device_train_batch_size "
            f"{compute.per_device_train_batch_size} x num_processes {compute.num_processes}; "
            f"their product must be one of {allowed}"
        )
    return effective_batch_size // per_step


def load_rows(file: str, context: StageContext, columns: list[str]) -> Dataset:
    """Rows of a dataset artifact, memory-mapped; its Arrow cache lives in the stage's work folder and goes with it."""
    from datasets import load_dataset

    rows = load_dataset("json", data_files=file, split="train", cache_dir=str(context.work / "datasets"))
    return rows.select_columns(columns)


def trainer_arguments(settings: TrainingSettings, context: StageContext) -> dict[str, Any]:
    """Keyword arguments that every TRL config takes, from a stage's science and its machinery."""
    compute = context.compute
    return {
        "output_dir": str(context.work / "checkpoints"),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_ratio,  # transformers 5: below one it is a share of all steps
        "weight_decay": settings.weight_decay,
        "adam_epsilon": settings.adam_epsilon,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "per_device_train_batch_size": compute.per_device_train_batch_size,
        "gradient_accumulation_steps": accumulation_steps(settings.effective_batch_size, compute),
        "bf16": use_bfloat16(settings.precision, compute),
        "use_cpu": device_of(compute) == "cpu",
        "activation_checkpointing": compute.activation_checkpointing,
        "dataloader_num_workers": compute.dataloader_num_workers,
        "dataloader_pin_memory": device_of(compute) == "cuda",
        "logging_steps": compute.logging_steps,
        "logging_nan_inf_filter": False,  # the filter would hide a NaN loss
        "save_strategy": "steps",
        "save_steps": compute.save_steps,
        "save_total_limit": compute.save_total_limit,
        "report_to": "tensorboard",
        "disable_tqdm": True,
        "push_to_hub": False,
        "trust_remote_code": False,
    }


def prepare_torch(context: StageContext) -> None:
    """Settings of the process: logs inside the artifact, threads, and no cuDNN attention (NaN in DPO, trl#7181)."""
    import os

    import torch
    import transformers

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(context.folder / "tensorboard")
    if context.compute.num_threads:
        torch.set_num_threads(context.compute.num_threads)
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)
    transformers.utils.logging.disable_progress_bar()


def callbacks(context: StageContext) -> list[TrainerCallback]:
    """Progress, history and the completion marker of checkpoints, as callbacks of transformers' Trainer."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        """Reports every optimizer step; the history file is cut back to the resumed step, so no line is there twice."""

        def __init__(self, report: Report, history: Path) -> None:
            self.report, self.history = report, history
            self.started: tuple[float, float] | None = None
            self.metrics: dict[str, float] = {}

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rows = _read_history(self.history) if self.history.exists() else []
            kept = [row for row in rows if row["step"] <= state.global_step]
            self.history.write_text("".join(json.dumps(row) + "\n" for row in kept))
            self.started = (time.monotonic(), float(state.num_input_tokens_seen or 0))
            self.report(state.global_step, state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.report(state.global_step, state.max_steps, **self.metrics)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if not state.is_world_process_zero or not logs or "train_runtime" in logs:
                return
            values = {name: float(value) for name, value in logs.items() if isinstance(value, (int, float))}
            assert self.started is not None
            tokens = float(values.get("num_tokens", 0.0)) - self.started[1]
            seconds = time.monotonic() - self.started[0]
            if tokens > 0 and seconds > 0:
                values["tokens_per_second"] = tokens / seconds
            shown = ("loss", "reward", "rewards/accuracies", "accuracy", "tokens_per_second")
            self.metrics = {name: values[name] for name in shown if name in values}
            loss = values.get("loss", values.get("grad_norm", 0.0))
            if not math.isfinite(loss):
                raise ValueError(
                    f"loss is {loss} at step {state.global_step}; the checkpoints before it are kept. Lower the "
                    "learning rate, or look for rows that the preflight did not catch"
                )
            with self.history.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **values}) + "\n")

    class CompleteCheckpoint(TrainerCallback):
        """Marks a checkpoint whole once the trainer has written all of it."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return [Progress(context.report, context.work / HISTORY_FILE), CompleteCheckpoint()]


def train(trainer: Trainer, context: StageContext, num_rows: int) -> int:
    """Train from the newest complete checkpoint, or from the start. Number of optimizer steps done in all.

    `num_rows` went into the trainer: what it dropped in silence is said. The history of logged metrics lands in the
    artifact. ValueError where the trainer kept no row.
    """
    num_kept = len(trainer.train_dataset)
    if not num_kept:
        raise ValueError(f"none of {num_rows:,} rows has anything to train on within max_length; raise it")
    if num_kept < num_rows:
        logger.warning("%s of %s rows left out: too long for max_length", f"{num_rows - num_kept:,}", f"{num_rows:,}")
    newest = newest_checkpoint(context.work / "checkpoints")
    if newest is not None:
        logger.info("resumes at step %d", newest[0])
        if trainer.is_world_process_zero():
            with (context.work / "resumed.jsonl").open("a") as file:
                file.write(f"{newest[0]}\n")
    trainer.train(resume_from_checkpoint=str(newest[1]) if newest else None)
    if trainer.is_world_process_zero():
        (context.folder / HISTORY_FILE).write_bytes((context.work / HISTORY_FILE).read_bytes())
    return trainer.state.global_step


def finish(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, context: StageContext, num_steps: int, shown: tuple[str, ...]
) -> tuple[ModelOutputs, dict[str, float]]:
    """Save the trained model, checked by loading it again; outputs, and the `shown` metrics as last logged."""
    if not trainer.is_world_process_zero():
        return ModelOutputs(num_parameters=trainer.model.num_parameters()), {}
    history = _read_history(context.folder / HISTORY_FILE)
    num_parameters = save_model(trainer.accelerator.unwrap_model(trainer.model), tokenizer, context.folder / "model")
    outputs = ModelOutputs(
        num_parameters=num_parameters,
        num_steps=num_steps,
        num_tokens=int(max((row.get("num_tokens", 0) for row in history), default=0)),
        history_file=HISTORY_FILE,
    )
    return outputs, history_metrics(history, shown)


def _read_history(file: Path) -> list[dict[str, Any]]:
    rows = []
    for line in file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            # A kill can tear the last line; the steps since the last checkpoint are logged again anyway.
            continue
    return rows
