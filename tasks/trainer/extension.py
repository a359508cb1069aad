"""Extends a finished training: finds and copies the stored checkpoint from which a larger budget resumes.

This only saves time; no result changes. A checkpoint is used only if a training from the start would have reached it
bit by bit: stage, inputs, data and settings are equal except for budget and schedule, and both schedules have the same
learning rates up to the checkpoint's step. RLVR is left out: it can resume only between two generations of rollouts,
and no code looks for such a step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from smoltulu.artifacts.checkpoints import fault, newest_checkpoint, place_checkpoint
from smoltulu.artifacts.files import read_plain, write_atomically
from smoltulu.artifacts.keys import CHECKPOINT_FOLDER
from smoltulu.artifacts.layout import CHECKPOINTS, SPEC
from smoltulu.artifacts.nearest import Changes, Nearest, SpecIndex
from smoltulu.artifacts.store import Found, Missing, Store
from smoltulu.schemas.artifact import ExtendedTraining, Spec
from smoltulu.schemas.compute import ComputeSettings
from smoltulu.schemas.schedules import ScheduleSettings
from smoltulu.schemas.training import SupervisedSettings
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.trainer.schedules import extension_step, same_past

if TYPE_CHECKING:
    from transformers import TrainerCallback

#: Settings in which two trainings may differ and still have their first steps in common.
_BUDGETS = ("max_steps", "num_train_epochs", "max_tokens")
#: Folder of `work` for the checkpoint that is to be kept: outside of those that the trainer prunes.
_KEPT_FOLDER = "kept"
#: File of `work` that names the source run.
_EXTENDS_FILE = "extends.json"
#: Of a checkpoint of an older version: its arguments, pickled, with folders of this machine. No resume reads the file.
_NOT_KEPT = ("training_args.bin",)


@dataclass(frozen=True)
class SourceRun:
    """A finished training and its checkpoint that another training can resume from."""

    record: ExtendedTraining
    checkpoint: Path
    environment: Mapping[str, Any]

    def __str__(self) -> str:
        return f"step {self.record.step:,} of {self.record.stage}/{self.record.key[:12]}"


def find_source_run(
    store: Store,
    spec: Spec,
    config: BaseModel,
    compute: ComputeSettings,
    input_digests: Mapping[str, str],
    *,
    index: SpecIndex | None = None,
    damaged: Callable[[str], None] | None = None,
) -> SourceRun | None:
    """The finished training that shares the most first steps with the wanted one; None where there is none.

    input_digests  content of the inputs (binding -> digest): a training on other content of these keys does not count
    index          of the store's specs, where there is one already
    damaged        reads checkpoints byte by byte, and is called with a message about each damaged one; None: only
                   sizes are compared
    """
    if not isinstance(config, SupervisedSettings) or config.schedule is None or config.max_steps is None:
        return None
    if config.held_out is not None and config.held_out.decides:
        return None  # see SupervisedSettings.is_extendable
    ranked = (index or SpecIndex(store.root)).ranked(spec.model_dump())
    near = [found for found in ranked if _only_the_budget_differs(found.changes)]
    found = list(_source_runs(store, near, config, compute, dict(input_digests), damaged))
    for source_run in sorted(found, key=lambda source_run: source_run.record.step, reverse=True):
        reason = fault(source_run.checkpoint, full=damaged is not None)
        if reason is None:
            return source_run
        if damaged is not None:
            damaged(f"{source_run} cannot be resumed from: {reason}")
    return None


def _only_the_budget_differs(changes: Changes) -> bool:
    fields = [name.removeprefix("config.") for name in changes]
    return all(field in _BUDGETS or field.startswith("schedule.") for field in fields)


def _source_runs(
    store: Store,
    near: list[Nearest],
    config: SupervisedSettings,
    compute: ComputeSettings,
    input_digests: dict[str, str],
    damaged: Callable[[str], None] | None,
) -> Iterator[SourceRun]:
    num_steps = config.max_steps
    assert config.schedule is not None and num_steps is not None
    for candidate in near:
        try:
            spec = Spec.model_validate_json(read_plain(candidate.folder / SPEC))
            old = type(config).model_validate(spec.config).schedule
            found = store.find(spec, input_digests)
        except (OSError, ValueError):
            continue  # written by other code, or damaged: `plan` and `verify` report it
        if isinstance(found, Missing) and found.damaged and damaged is not None:
            damaged(f"{spec.stage}/{candidate.key[:12]} cannot be resumed from: {found.reason}")
        if not isinstance(found, Found) or old is None:
            continue
        if not same_sums(found.manifest.compute, compute):
            continue
        stored = newest_checkpoint(found.folder / CHECKPOINT_FOLDER)
        old_num_steps = found.manifest.outputs.get("num_steps")
        if stored is None or not isinstance(old_num_steps, int) or stored[0] >= num_steps:
            continue
        step, checkpoint = stored
        if same_past(old, old_num_steps, config.schedule, num_steps, step):
            record = ExtendedTraining(stage=spec.stage, key=found.manifest.key, step=step, num_steps=old_num_steps)
            yield SourceRun(record, checkpoint, found.manifest.environment)


def same_sums(made: Mapping[str, Any], compute: ComputeSettings) -> bool:
    """Whether a training adds in the order of one with the `compute` that a manifest records.

    Another number of processes does not, nor another kind of parallelism, nor compiled layers: the first steps would
    differ in their last bits.
    """
    if made.get("num_processes", 1) != compute.num_processes or made.get("compile", False) != compute.compile:
        return False
    return compute.num_processes == 1 or made.get("parallel", "ddp") == compute.parallel


def begin_with(source_run: SourceRun | None, work: Path) -> None:
    """Copy the checkpoint of a source run into a work folder: the training resumes from it as from one of its own.

    Raises FileNotFoundError if the source run was removed meanwhile; a partial copy does not count as a checkpoint.
    """
    (work / _EXTENDS_FILE).unlink(missing_ok=True)
    if source_run is None:
        return
    write_atomically(work / _EXTENDS_FILE, source_run.record.model_dump_json())
    (work / "environment.json").write_text(json.dumps(source_run.environment))
    place_checkpoint(source_run.checkpoint, work / CHECKPOINTS / source_run.checkpoint.name)


def extended(work: Path) -> ExtendedTraining | None:
    """The source run of the training in a work folder; None where it started from step 0."""
    try:
        return ExtendedTraining.model_validate_json((work / _EXTENDS_FILE).read_bytes())
    except FileNotFoundError:
        return None


# --- In the training's own process ------------------------------------------------------------------------------------


def keep_checkpoint(
    schedule: ScheduleSettings, context: StageContext, when_whole: list[Callable[[Path], None]]
) -> TrainerCallback:
    """A callback that saves at the step from which a larger budget can resume, and keeps that checkpoint.

    when_whole  functions that are called, on the main process, with each checkpoint once it is whole
    """
    from transformers import TrainerCallback

    class KeepCheckpoint(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.step = extension_step(schedule, state.max_steps)
            when_whole.append(self._keep)
            # The training may resume from that step: a kill can come after the save and before the copy.
            saved = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if state.is_world_process_zero and fault(saved) is None:
                self._keep(saved)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == self.step:
                control.should_save = True

        def _keep(self, whole: Path) -> None:
            if whole.name == f"checkpoint-{self.step}":
                place_checkpoint(whole, context.work / _KEPT_FOLDER / whole.name, _NOT_KEPT)

    return KeepCheckpoint()


def store_checkpoint(context: StageContext) -> None:
    """Copy the kept checkpoint into the artifact."""
    kept = newest_checkpoint(context.work / _KEPT_FOLDER)
    if kept is not None:
        place_checkpoint(kept[1], context.folder / CHECKPOINT_FOLDER / kept[1].name)
