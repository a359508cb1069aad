"""Shared by the training stages: trainer arguments, progress, resumable checkpoints, history."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.artifacts.checkpoints import mark_complete, newest_checkpoint, num_steps_of, torn_checkpoints
from smoltulu.artifacts.files import remove_tree, write_atomically
from smoltulu.artifacts.keys import LOGS_FOLDER
from smoltulu.artifacts.layout import CHECKPOINTS
from smoltulu.schemas.budget import accumulation_steps, rows_of_process
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.models import ModelOutputs
from smoltulu.schemas.schedules import ScheduleSettings
from smoltulu.schemas.training import GateSettings, SupervisedSettings, TrainingInputs, TrainingSettings
from smoltulu.tasks.models.folders import (
    device_of,
    fit_embeddings,
    load_language_model,
    load_tokenizer,
    save_model,
    stop_ids,
    switch_dropout_off,
    use_bfloat16,
)
from smoltulu.tasks.models.lora import ADAPTER_FOLDER, save_adapter
from smoltulu.tasks.models.tokens import TOKENISATION, tokenisation
from smoltulu.tasks.process import RANK_START_S
from smoltulu.tasks.stage import DATASETS_FOLDER, StageContext, StageStopped
from smoltulu.tasks.trainer.arguments import FIXED
from smoltulu.tasks.trainer.extension import keep_checkpoint, store_checkpoint
from smoltulu.tasks.trainer.gate import check_saved, probe
from smoltulu.tasks.trainer.guards import LossRule, guard
from smoltulu.tasks.trainer.packed_attention import pack
from smoltulu.tasks.trainer.prepare import give_back_memory
from smoltulu.tasks.trainer.schedules import learning_rate_factor
from smoltulu.tasks.trainer.sharded import gathered, is_sharded, whole
from smoltulu.tasks.trainer.stragglers import name_stragglers
from smoltulu.tasks.trainer.tracking import num_tokens, numbers, speed_and_memory, trackers
from smoltulu.tasks.trainer.waits import look_for_no_packed_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

    from smoltulu.tasks.trainer.checkpoint_writer import CheckpointWriter

logger = logging.getLogger("smoltulu")
HISTORY_FILE = f"{LOGS_FOLDER}/history.jsonl"
#: Logged values whose mean is a metric of the manifest.
_NUM_AVERAGED = 10


def budget(settings: SupervisedSettings, rows: Dataset) -> dict[str, Any]:
    """`num_train_epochs` and `max_steps` for the trainer, which prefers a number of steps to epochs."""
    max_steps = settings.max_steps
    if settings.max_tokens is not None and len(rows):
        max_steps = settings.budget.num_steps(len(rows), count_tokens(rows))
    return {"num_train_epochs": settings.num_train_epochs, "max_steps": max_steps or -1}


def count_tokens(rows: Dataset) -> int:
    """Tokens of tokenised rows; of pairs those of both sides, each with its prompt, as the trainers count them."""
    import pyarrow.compute as pc

    times = {"input_ids": 1, "prompt_ids": 2, "chosen_ids": 1, "rejected_ids": 1}
    # Lengths only: the tokens themselves, gigabytes, stay on disk.
    return sum(
        times[name] * int(pc.sum(pc.list_value_length(rows.data.column(name))).as_py())
        for name in rows.column_names
        if name in times
    )


def load_rows(file: str, context: StageContext, columns: list[str]) -> Dataset:
    """Rows of an artifact, memory-mapped; their Arrow cache lives in the stage's work folder and goes with it."""
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=file, split="train", cache_dir=str(context.work / DATASETS_FOLDER))
    return rows.select_columns(columns)


def check_tokenisation(file: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError where the rows of a preflight were tokenised otherwise than this tokenizer does it."""
    from pyarrow import parquet

    said = (parquet.read_metadata(file).metadata or {}).get(TOKENISATION)  # none in those of older versions
    if said is not None and said.decode() != tokenisation(tokenizer):
        raise ValueError(
            f"{Path(file).name} was tokenised otherwise than the tokenizer of this stage's model does it: another "
            "chat template, tokenizer or version of transformers or tokenizers. Make the rows again (refresh preflight)"
        )


def load_model(
    settings: TrainingSettings,
    inputs: TrainingInputs,
    packing: bool,
    load: Callable[[Path], PreTrainedModel] = load_language_model,
    dropout: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that a training starts from, and its tokenizer. The seed draws the new weights.

    `dropout`: as the model's config says; False: none.
    """
    from transformers import set_seed

    tokenizer = load_tokenizer(Path(inputs.model), inputs.chat_template)
    check_tokenisation(inputs.dataset, tokenizer)
    set_seed(settings.seed)
    model = load(Path(inputs.model))
    look_for_no_packed_rows(model)
    fit_embeddings(model, tokenizer)
    stop_ids(model, tokenizer)
    if not dropout:
        switch_dropout_off(model)
    if packing:
        pack(model)
    return model, tokenizer


def trainer_arguments(settings: TrainingSettings, context: StageContext) -> dict[str, Any]:
    """Keyword arguments that every TRL config takes, from a stage's science and its machinery."""
    compute = context.compute
    if compute.by_tokens and isinstance(settings, SupervisedSettings):
        # A batch of the loader is a whole optimizer step, which tasks/trainer/token_budget.py cuts.
        num_rows, num_batches = rows_of_process(settings.effective_batch_size, compute.num_processes), 1
    else:
        num_rows = compute.per_device_train_batch_size
        num_batches = accumulation_steps(settings.effective_batch_size, compute)
    return {
        **FIXED,
        "output_dir": str(context.work / CHECKPOINTS),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_ratio,  # transformers 5: below one it is a share of all steps
        "weight_decay": settings.weight_decay,
        "adam_beta2": settings.adam_beta2,
        "adam_epsilon": settings.adam_epsilon,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "per_device_train_batch_size": num_rows,
        "gradient_accumulation_steps": num_batches,
        "bf16": use_bfloat16(settings.precision, compute),
        "use_cpu": device_of(compute) == "cpu",
        "activation_checkpointing": compute.activation_checkpointing,
        "dataloader_num_workers": num_workers(compute),
        "dataloader_pin_memory": device_of(compute) == "cuda",
        # From pinned memory, and not waited for (tasks/trainer/waits.py).
        "accelerator_config": FIXED["accelerator_config"] | {"non_blocking": device_of(compute) == "cuda"},
        # A model's buffers are tables that never change; each forward pass would begin with their exchange.
        "ddp_broadcast_buffers": False,
        # Longer than that of tasks/engine/pulse.py, which says whose fault it is.
        "ddp_timeout": int(60 * compute.rank_timeout_minutes + RANK_START_S + 60),
        "logging_steps": compute.logging_steps,
        "logging_nan_inf_filter": False,  # the filter would hide a NaN loss
        "save_strategy": "steps",
        "save_steps": compute.save_steps,
        "save_total_limit": None,  # CheckpointWriter removes old ones, and only after the new one is whole
        "report_to": "none",  # tasks/trainer/tracking.py: its own do not know what was logged before a resume
        "disable_tqdm": True,
        "push_to_hub": False,
        "trust_remote_code": False,
    }


def num_workers(compute: ComputeSettings) -> int:
    """Processes that make batches ahead of the training."""
    if compute.dataloader_num_workers is not None:
        return compute.dataloader_num_workers
    return 1 if device_of(compute) == "cuda" else 0


def callbacks(context: StageContext, writer: CheckpointWriter) -> list[TrainerCallback]:
    """Progress, history, trackers and writing of checkpoints, as callbacks."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        """Reports every optimizer step; the history file begins with what was logged until the resumed step."""

        def __init__(self) -> None:
            self.history = context.work / HISTORY_FILE
            self.history.parent.mkdir(exist_ok=True)
            self.metrics: dict[str, float] = {}

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # In one rename: a kill half-way would lose the history up to the resumed step.
            if state.is_world_process_zero:
                rows = ({"step": entry["step"], **numbers(entry)} for entry in state.log_history)
                write_atomically(self.history, "".join(json.dumps(row) + "\n" for row in rows))
            # A resume loads the checkpoint's intervals, which may be another training's.
            state.logging_steps, state.save_steps = args.logging_steps, args.save_steps
            context.report(state.global_step, state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            context.report(state.global_step, state.max_steps, **self.metrics)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if not state.is_world_process_zero or not logs or "train_runtime" in logs:
                return
            values = numbers(logs)
            of_pairs = ("rewards/accuracies", "accuracy")
            shown = ("loss", "held_out/loss", "reward", "held_out/accuracy", *of_pairs, "tokens_per_second")
            self.metrics |= {name: values[name] for name in shown if name in values}
            with self.history.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **values}) + "\n")

    class WriteCheckpoint(TrainerCallback):
        """Has a checkpoint written once the callbacks before this one have added to it.

        The best is kept: by the mean reward (RLVR), else by the loss, over what was logged since the checkpoint before.
        """

        def __init__(self) -> None:
            self.logged: list[float] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            score = logs.get("reward", -logs["loss"] if "loss" in logs else None) if logs else None
            if score is not None:
                self.logged.append(float(score))

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            writer.begin_training()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            writer.before_update()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            writer.check()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            score = sum(self.logged) / len(self.logged) if self.logged else None
            writer.write(Path(args.output_dir) / f"checkpoint-{state.global_step}", score)
            self.logged.clear()

    return [
        WriteCheckpoint(),  # first: a step counts as done once it has been looked whether the last checkpoint is
        Progress(),
        trackers(context.compute.report_to, context.folder, context.work),
    ]


def train(
    trainer: Trainer,
    context: StageContext,
    schedule: ScheduleSettings | None,
    loss_rule: LossRule = LossRule(),  # noqa: B008 - frozen
    cycle: int = 1,
    keeps_for_extension: bool = True,
    own_guard: TrainerCallback | None = None,
) -> int:
    """Train from the newest complete checkpoint, or from the start. Returns the number of optimizer steps in all.

    Copies the history of logged metrics into the artifact. A `schedule` replaces the trainer's own. `cycle`: optimizer
    steps between two points at which a checkpoint is enough to resume from. `keeps_for_extension`: whether a longer
    training could go on from here. `own_guard`: a callback of the stage that may end the training, once a step is in
    the history. ValueError where the schedule does not fit into the number of steps, or where a guard
    (`tasks.trainer.guards`) ends the training.
    """
    # Here, because they import torch.
    from smoltulu.tasks.trainer.checkpoint_writer import CheckpointWriter
    from smoltulu.tasks.trainer.dropout import by_rows
    from smoltulu.tasks.trainer.stop import StopWhenAsked

    trainer.add_callback(by_rows(trainer))
    writer = CheckpointWriter(trainer, context.compute.save_total_limit)
    writer.attach()
    stop = StopWhenAsked(trainer, cycle)
    for callback in (*callbacks(context, writer), stop, name_stragglers(trainer)):
        if callback is not None:
            trainer.add_callback(callback)
    if trainer.is_world_process_zero():
        # A resume uses the tokenised rows again; the runner drops files that changed since they were written.
        mark_complete(context.work / DATASETS_FOLDER)
    newest = _checkpoint_of_all(context.work / CHECKPOINTS)
    num_steps = 0
    if newest is not None:
        # Not from the checkpoint where possible: it may be of a shorter training.
        num_steps = trainer.args.max_steps if trainer.args.max_steps > 0 else num_steps_of(newest[1]) or 0
        logger.info("resumes at step %s of %s", f"{newest[0]:,}", f"{num_steps:,}")
        if trainer.is_world_process_zero():
            with (context.work / "resumed.jsonl").open("a") as file:
                file.write(f"{newest[0]}\n")
    trainer.add_callback(speed_and_memory(trainer))
    if schedule is not None:
        _follow(schedule, trainer)
        # GRPO can resume only between two generations; tasks/trainer/extension.py does not look for such a step.
        keeps = keeps_for_extension and context.compute.keep_extension_checkpoint
        if keeps and not hasattr(trainer.args, "num_generations"):
            trainer.add_callback(keep_checkpoint(schedule, context, writer.when_whole))
    num_warmup_steps = schedule.num_warmup_steps if schedule else trainer.args.get_warmup_steps
    if own_guard is not None:
        trainer.add_callback(own_guard)
    # Last, so that it knows whether a checkpoint will be written.
    trainer.add_callback(guard(trainer, loss_rule, num_warmup_steps))
    if newest is not None and newest[0] >= num_steps > 0:
        # The trainer checks whether it is done only after a step: within an epoch it would do one too many.
        trainer._run_epoch = lambda **kwargs: None
    if trainer.args.device.type == "cuda":
        give_back_memory()
    try:
        trainer.train(resume_from_checkpoint=str(newest[1]) if newest else None)
        writer.end()
    except BaseException:
        writer.abandon()
        raise
    finally:
        stop.end()
    if trainer.state.global_step < trainer.state.max_steps:
        raise StageStopped(f"stopped as asked at step {trainer.state.global_step:,} of {trainer.state.max_steps:,}")
    if trainer.is_world_process_zero():
        (context.folder / LOGS_FOLDER).mkdir(exist_ok=True)
        (context.folder / HISTORY_FILE).write_bytes((context.work / HISTORY_FILE).read_bytes())
        store_checkpoint(context)
    return trainer.state.global_step


def _checkpoint_of_all(checkpoints: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest whole checkpoint, as rank 0 finds it, for every rank; torn ones are removed."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    found: list[tuple[int, Path] | None] = [None]
    if PartialState().is_main_process:
        found = [newest_checkpoint(checkpoints, full=True)]
        for step, path, fault in torn_checkpoints(checkpoints, full=True):
            logger.warning("checkpoint of step %s is not whole (%s): passed over and removed", f"{step:,}", fault)
            remove_tree(path)
    return broadcast_object_list(found)[0]


def _follow(schedule: ScheduleSettings, trainer: Trainer) -> None:
    """Make the trainer take its learning rates from our schedule.

    It replaces `create_scheduler`: only there is the number of steps known and the optimizer made while the state of a
    checkpoint is not loaded yet. So a resume restores this scheduler as it restores the trainer's own.
    """
    from torch.optim.lr_scheduler import LambdaLR

    def create_scheduler(num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        # A function, not an object: LambdaLR saves an object's fields, and a resume would overwrite the new ones.
        def factor(step: int) -> float:
            return learning_rate_factor(schedule, step, num_training_steps, num_tokens(trainer))

        class FromFunction(LambdaLR):
            def load_state_dict(self, state_dict: dict[str, Any]) -> None:
                """Resume with our schedule's rate of the checkpoint's step.

                The stored rate follows the schedule that saved it: at the end of a shorter training it has decayed.
                """
                super().load_state_dict(state_dict)
                now = factor(self.last_epoch)
                self._last_lr = [base * now for base in self.base_lrs]
                for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
                    group["lr"] = rate

        trainer.lr_scheduler = FromFunction(optimizer or trainer.optimizer, factor)
        return trainer.lr_scheduler

    trainer.create_scheduler = create_scheduler


def finish(
    trainer: Trainer,
    context: StageContext,
    num_steps: int,
    shown: tuple[str, ...],
    gate: GateSettings | None = None,
) -> tuple[ModelOutputs, dict[str, float]]:
    """Save and check the trained model. Returns the outputs, and the means of the last logged `shown` metrics.

    `gate`: thresholds for the answers of a language model; None for a reward model, which is only loaded and compared.
    """
    from accelerate.utils import is_peft_model

    model = trainer.accelerator.unwrap_model(trainer.model)
    if is_peft_model(model) and trainer.is_world_process_zero():
        save_adapter(model, context.folder / ADAPTER_FOLDER)
        model = model.merge_and_unload(safe_merge=True)  # the base model: same names and dtypes
    num_parameters, passed = save_and_check(trainer, model, context.folder / "model", gate)
    if not trainer.is_world_process_zero():
        return ModelOutputs(num_parameters=num_parameters), {}
    history = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
    outputs = ModelOutputs(
        num_parameters=num_parameters,
        num_steps=num_steps,
        num_tokens=num_tokens(trainer),
        history_file=HISTORY_FILE,
    )
    metrics = {}
    for name in shown:
        values = [entry[name] for entry in history if isinstance(entry.get(name), (int, float))][-_NUM_AVERAGED:]
        if values:
            metrics[name] = sum(values) / len(values)
    return outputs, metrics | passed


def save_and_check(
    trainer: Trainer, model: PreTrainedModel, folder: Path, gate: GateSettings | None
) -> tuple[int, dict[str, float]]:
    """The main process saves a trained model and checks what it saved. Returns its parameters' number, and metrics.

    All processes must come here: each may hold a part of the model.
    """
    tokenizer, rows, is_main = trainer.processing_class, trainer.train_dataset, trainer.is_world_process_zero()
    probes = None
    if is_sharded(model):
        with gathered(model):
            probes = probe(model, tokenizer, rows)
        model = whole(model, is_main)
    if not is_main:
        return model.num_parameters(), {}
    num_parameters = save_model(model, tokenizer, folder)
    return num_parameters, check_saved(model, tokenizer, folder, rows, gate, trainer.args.bf16, probes)
