"""The critic of PPO: a model with one score a token, its own optimizer and schedule, and how it is kept.

It starts from the reward model, whose score head is read at every response token (Tulu 3). A reward model is trained at
the last token only: elsewhere its scores mean nothing yet, which `critic.warmup_steps` is for. From the policy it
starts with a head of zeros: values of 0 leave advantages unbiased, and a random head would add its noise to all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.rlvr import PPOSettings, RLVRInputs
from smoltulu.tasks.models.classifiers import (
    check_one_score,
    check_same_tokens,
    keep_in_float32,
    load_classifier,
    load_reward_model,
)
from smoltulu.tasks.models.folders import check_model_folder, fit_embeddings, stop_ids, switch_dropout_off
from smoltulu.tasks.models.sizes import weight_files
from smoltulu.tasks.trainer.schedules import learning_rate_factor
from smoltulu.tasks.trainer.sharded import all_finite
from smoltulu.tasks.trainer.waits import look_for_no_packed_rows

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from smoltulu.tasks.trainer.checkpoint import Trained

#: Folder of the artifact.
CRITIC_FOLDER = "critic"
_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"


def checked_folder(folder: str | None, who: str, setting: str, tokenizer: PreTrainedTokenizerBase) -> Path:
    """The folder of a reward model or critic, refused before any weight is loaded. `setting`: why there must be one."""
    if folder is None:
        raise ValueError(f"{setting} needs a {who}, and none was given: add the reward_model block, or a critic.path")
    check_model_folder(Path(folder))
    check_one_score(Path(folder))
    check_same_tokens(Path(folder), who, tokenizer)
    return Path(folder)


def load_critic(config: PPOSettings, inputs: RLVRInputs, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The critic that a training starts with, in float32, without dropout.

    Raises:
        ValueError: the model that it should start from is missing, has another head, or reads other tokens.
    """
    import torch

    initial = config.critic.initial
    if initial == "policy":
        model = load_classifier(Path(inputs.model))
        torch.nn.init.zeros_(model.score.weight)
    else:
        given, who = (inputs.critic, "critic") if initial == "path" else (inputs.reward_model, "reward model")
        model = load_reward_model(checked_folder(given, who, f"critic.initial {initial}", tokenizer))
    return prepared(model, tokenizer)


def prepared(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A classifier ready to score: the tokenizer's ids, no dropout, its head outside of autocast."""
    fit_embeddings(model, tokenizer)
    stop_ids(model, tokenizer)
    switch_dropout_off(model)
    keep_in_float32(model.score)
    look_for_no_packed_rows(model)
    return model


class Critic:
    """The model, and once `begin` was called its optimizer and schedule."""

    def __init__(self, model: PreTrainedModel, settings: PPOSettings) -> None:
        self.model = model
        self.settings = settings
        #: With its optimizer offloaded: each weight and its copy in CPU memory, which is what the optimizer moves.
        self._on_cpu: list[tuple[Any, Any]] = []

    def begin(self, trainer: Trainer, num_steps: int, num_tokens: Callable[[], int]) -> None:
        """Make optimizer and schedule for a training of so many steps, as the trainer makes the policy's.

        num_tokens  trained on so far, for a schedule in tokens
        """
        rate = self.settings.critic.learning_rate or self.settings.learning_rate
        optimizer_class, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, self.model)
        decayed = set(trainer.get_decay_parameter_names(self.model))
        named = list(self.model.named_parameters())
        if self.settings.critic.offload_optimizer:
            self._on_cpu = [(one, one.detach().cpu().clone()) for _, one in named]
            named = [(name, copy) for (name, _), (_, copy) in zip(named, self._on_cpu, strict=True)]
        groups = [
            {"params": [one for name, one in named if name in decayed], "weight_decay": trainer.args.weight_decay},
            {"params": [one for name, one in named if name not in decayed], "weight_decay": 0.0},
        ]
        self.optimizer = optimizer_class(groups, **(options | {"lr": rate}))
        self.scheduler = self._scheduler(num_steps, num_tokens)

    def _scheduler(self, num_steps: int, num_tokens: Callable[[], int]) -> LambdaLR:
        from torch.optim.lr_scheduler import LambdaLR
        from transformers import get_scheduler

        settings, own = self.settings, self.settings.critic
        schedule = settings.schedule
        if schedule is not None and own.lr_scheduler_type is None and own.warmup_ratio is None:
            # A function, not an object: LambdaLR would save an object's fields.
            return LambdaLR(self.optimizer, lambda step: learning_rate_factor(schedule, step, num_steps, num_tokens()))
        kind = own.lr_scheduler_type or settings.lr_scheduler_type
        ratio = settings.warmup_ratio if own.warmup_ratio is None else own.warmup_ratio
        made: Any = get_scheduler(
            kind, self.optimizer, num_warmup_steps=math.ceil(num_steps * ratio), num_training_steps=num_steps
        )
        return made

    @property
    def rate(self) -> float:
        """Learning rate of the next step."""
        return float(self.scheduler.get_last_lr()[0])

    def step(self) -> None:
        """Move the weights, then the schedule."""
        for weight, copy in self._on_cpu:
            copy.grad = None if weight.grad is None else weight.grad.cpu()
        self.optimizer.step()
        self.sync_weights()
        self.scheduler.step()

    def sync_weights(self) -> None:
        """Give the model the weights that an offloaded optimizer has."""
        import torch

        with torch.no_grad():
            for weight, copy in self._on_cpu:
                weight.copy_(copy)

    @property
    def trained(self) -> Trained:
        """For a checkpoint: the weights as the optimizer has them, by name."""
        from smoltulu.tasks.trainer.checkpoint import Trained

        copies = {id(weight): copy for weight, copy in self._on_cpu}
        weights = {name: copies.get(id(one), one) for name, one in self.model.named_parameters()}
        return Trained(weights, self.optimizer, self.scheduler)

    def require_finite(self, accelerator: Accelerator) -> None:
        """ValueError where a weight is not."""
        if not all_finite(self.model, accelerator):
            raise ValueError(
                "weights of the critic hold NaN or infinity: no checkpoint of them was written, those before it are "
                "kept. Lower critic.learning_rate"
            )

    # The next two read checkpoints of versions before tasks/trainer/checkpoint.py.

    def load_weights(self, folder: Path) -> None:
        from safetensors.torch import load_file

        state = {name: value for file in weight_files(folder) for name, value in load_file(file).items()}
        self.model.load_state_dict(state, strict=True)

    def load_optimizer(self, folder: Path) -> None:
        import torch

        self.optimizer.load_state_dict(torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True))
        self.scheduler.load_state_dict(torch.load(folder / _SCHEDULER, weights_only=True))
