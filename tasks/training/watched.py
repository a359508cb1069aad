"""Puts what is held out on a trainer: prompts of RLVR, whatever the algorithm; rows of the other trainings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.held_out_loss import HeldOutLossSettings
from smoltulu.schemas.models import ModelOutputs
from smoltulu.schemas.rlvr import RLVRSettings
from smoltulu.schemas.training import GateSettings, SupervisedSettings, TrainingInputs
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.trainer.loop import finish
from smoltulu.tasks.training.held_out_rows import Split

if TYPE_CHECKING:
    from transformers import Trainer

    from smoltulu.tasks.training.held_out import HeldOut
    from smoltulu.tasks.training.held_out_loss import HeldOutLosses, LossesOf


def watch(
    trainer: Trainer, config: RLVRSettings, context: StageContext, split: Split | None, **others: Any
) -> HeldOut | None:
    """Add the callback, before those of tasks/trainer/loop.py; None where nothing is held out.

    others  name -> model that is trained beside the policy, and kept with it
    """
    if split is None:
        return None
    from smoltulu.tasks.training.held_out import HeldOut

    policy = trainer.accelerator.unwrap_model(trainer.model)
    held_out = HeldOut(trainer, split, config, context, {"policy": policy, **others})
    trainer.add_callback(held_out)
    return held_out


def watch_losses(
    trainer: Trainer,
    stage: str,
    config: SupervisedSettings,
    inputs: TrainingInputs,
    context: StageContext,
    load: Callable[[str], Any],
    losses_of: LossesOf,
) -> HeldOutLosses | None:
    """Add the callback, before those of tasks/trainer/loop.py; None where no row is held out.

    load  rows file of the held-out rows -> rows as the trainer's collator takes them
    """
    if inputs.held_out is None:
        return None
    from smoltulu.tasks.training.held_out_loss import HeldOutLosses

    rows = load(inputs.held_out)
    assert len(rows), "a preflight without rows makes no artifact"
    sources = _sources(inputs.held_out_rows) if inputs.held_out_rows else None
    settings = config.held_out or HeldOutLossSettings()
    watched = HeldOutLosses(trainer, stage, rows, settings, context, losses_of, sources)
    trainer.add_callback(watched)
    return watched


def finish_watched(
    held_out: HeldOutLosses | None,
    trainer: Trainer,
    context: StageContext,
    num_steps: int,
    shown: tuple[str, ...],
    gate: GateSettings | None = None,
) -> tuple[ModelOutputs, dict[str, float]]:
    """`finish` of the weights that are kept, with what the held-out rows said."""
    if held_out is None:
        return finish(trainer, context, num_steps, shown, gate)
    held_out.restore_best()
    return held_out.outputs(*finish(trainer, context, num_steps, shown, gate))


def _sources(file: str) -> list[int]:
    """Source of every row of a rows file, from its id."""
    from pyarrow import parquet

    return [int(one.partition(":")[0]) for one in parquet.read_table(file, columns=["id"])["id"].to_pylist()]
