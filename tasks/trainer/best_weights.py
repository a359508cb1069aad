"""The best weights so far of a training, beside its checkpoints.

They lie in `work/best` before they count as the best. A checkpoint names those that were best then, and they stay as
long as it does: so a resume finds them, also from an older checkpoint where the newest is damaged.
"""

from __future__ import annotations

from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from smoltulu.artifacts.checkpoints import fault, mark_complete
from smoltulu.artifacts.files import remove_tree
from smoltulu.tasks.trainer.sharded import full_weights, put_weights

if TYPE_CHECKING:
    from transformers import Trainer

#: Folder of `work`: outside of the checkpoints, which are pruned.
BEST_FOLDER = "best"


class BestWeights:
    """Weights of `models` (name -> model; they are kept together), by the optimizer step after which they were best.

    subject  what they are the best by, and the stage, for messages
    """

    def __init__(self, trainer: Trainer, work: Path, models: dict[str, torch.nn.Module], subject: tuple[str, str]):
        self.trainer, self.folder, self.models, self.subject = trainer, work / BEST_FOLDER, models, subject

    def note(self, checkpoint: Path, step: int) -> None:
        """While a checkpoint is written: those of `step` are the best so far, and stay as long as it does."""
        (checkpoint / f"best-is-step-{step}").touch()

    def write(self, step: int) -> None:
        """Those of now. Others that no checkpoint names make room first. All processes must come here."""
        # What is trained: of a model with LoRA its adapter.
        is_main = self.trainer.is_world_process_zero()
        weights = {name: full_weights(model, is_main, trained_only=True) for name, model in self.models.items()}
        if not is_main:
            return
        # Not pathlib's, which fails where the writer's thread removes a checkpoint meanwhile.
        named = glob("checkpoint-*/best-is-step-*", root_dir=self.trainer.args.output_dir)
        kept = {Path(file).name.removeprefix("best-is-") for file in named}
        for path in self.folder.glob("step-*"):
            if path.name not in kept:
                remove_tree(path)
        folder = self.folder / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, of_model in weights.items():
            save_file(of_model, folder / f"{name}.safetensors")
        mark_complete(folder)

    def require(self, best: int, loaded: int) -> None:
        """Before hours of training: the weights that the checkpoint of step `loaded` names as the best are there."""
        folder = self.folder / f"step-{best}"
        found = fault(folder, full=True)
        self.trainer.accelerator.wait_for_everyone()  # the main process may write them anew
        if found is None:
            return
        if best == loaded:  # they are those that were just loaded
            self.write(loaded)
            return
        raise ValueError(self._damaged(folder, found))

    def restore(self, step: int) -> None:
        """Put the weights of `step` into the models, of all processes."""
        if step == self.trainer.state.global_step:
            return
        folder = self.folder / f"step-{step}"
        if (found := fault(folder, full=True)) is not None:
            raise ValueError(self._damaged(folder, found))
        for name, model in self.models.items():
            stored = load_file(folder / f"{name}.safetensors")
            assert stored.keys() == {key for key, one in model.named_parameters() if one.requires_grad}
            put_weights(model, stored)

    def _damaged(self, folder: Path, found: str) -> str:
        by, stage = self.subject
        step = int(folder.name.removeprefix("step-"))
        return (
            f"the weights of step {step:,}, the best by {by}, are damaged: {folder}: {found}; make the stage again "
            f"(refresh {stage})"
        )
