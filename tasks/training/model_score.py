"""The reward model's score of rollouts, added to what their verifiers pay (`rlvr.reward_model_weight`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from smoltulu.schemas.rlvr import RLVRInputs, RLVRSettings
from smoltulu.schemas.training import TrainingInputs
from smoltulu.tasks.models.classifiers import load_classifier, load_reward_model
from smoltulu.tasks.models.tokens import conversations
from smoltulu.tasks.models.turns import tools_of
from smoltulu.tasks.trainer.sharded import gathered, is_sharded, shard
from smoltulu.tasks.training.critic import checked_folder, prepared
from smoltulu.tasks.training.rewards import Score

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from smoltulu.tasks.training.ppo_batch import Episode

#: Rollouts and what their verifiers pay -> the same scores, the model's added.
AddsScore = Callable[[Sequence["Episode"], list[Score]], list[Score]]


def check_reward_model(config: RLVRSettings, inputs: RLVRInputs, tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError where the reward model counts and is missing, no reward model, or one of other tokens."""
    if config.reward_model_weight > 0:
        checked_folder(inputs.reward_model, "reward model", "reward_model_weight above 0", tokenizer)


def load_scored_by(
    config: RLVRSettings, inputs: TrainingInputs, tokenizer: PreTrainedTokenizerBase, is_dry_run: bool = False
) -> PreTrainedModel | None:
    """The reward model, where it counts. `is_dry_run`: one is made of the policy, which has its size."""
    if not config.reward_model_weight:
        return None
    if is_dry_run:
        return prepared(load_classifier(Path(inputs.model)), tokenizer)
    assert isinstance(inputs, RLVRInputs) and inputs.reward_model is not None
    return prepared(load_reward_model(Path(inputs.reward_model)), tokenizer)


def adding_score_of(reward_model: PreTrainedModel, trainer: Trainer, weight: float) -> AddsScore:
    """`weight` times the model's score is added, but where a penalty replaced the reward or nothing could be graded."""
    tokenizer, size = trainer.processing_class, trainer.args.per_device_train_batch_size
    if is_sharded(trainer.model):
        shard(reward_model, trainer.args.device)
    else:
        reward_model.to(trainer.args.device)
    reward_model.eval()

    def add(rollouts: Sequence[Episode], paid: list[Score]) -> list[Score]:
        with gathered(reward_model):
            values = _values(reward_model, tokenizer, rollouts, size, trainer.accelerator.autocast)
        return [
            score
            if score.reward is None or score.verdict == "no_eos"
            else replace(score, reward=score.reward + weight * value.item())
            for score, value in zip(paid, values, strict=True)
        ]

    return add


def _values(
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rollouts: Sequence[Episode],
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[None]],
) -> list[torch.Tensor]:
    """The score of each rollout, (1,).

    A text that was ended is rendered by the template, as those that the reward model was trained on; any other is
    scored as it was written.
    """
    import torch

    from smoltulu.tasks.training.ppo_batch import by_episode, collate, last_scores

    def seen(rollout: Episode) -> list[int]:
        if not rollout["stopped"]:
            return rollout["prompt_ids"] + rollout["ids"]
        said = {"role": "assistant", "content": rollout["text"]}
        return conversations(tokenizer, [[*rollout["prompt"], said]], [tools_of(rollout["prompt"])])[0].input_ids

    # One "token" each: a text whose last token is the whole response, so that one value comes of it.
    texts: list[Episode] = []
    for rollout in rollouts:
        ids = seen(rollout)
        texts.append({"prompt_ids": ids[:-1], "ids": ids[-1:], "score": Score(0.0, "right")})

    def of_batch(batch: list[Episode]) -> torch.Tensor:
        with autocast():
            return last_scores(reward_model, collate(batch, tokenizer.pad_token_id, reward_model.device))

    with torch.no_grad():
        return by_episode(texts, batch_size, of_batch)
