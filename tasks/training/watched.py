"""Puts the held-out prompts of RLVR on a trainer, whatever the algorithm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from smoltulu.schemas.rlvr import RLVRSettings
from smoltulu.tasks.stage import StageContext
from smoltulu.tasks.training.held_out_rows import Split

if TYPE_CHECKING:
    from transformers import Trainer

    from smoltulu.tasks.training.held_out import HeldOut


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
