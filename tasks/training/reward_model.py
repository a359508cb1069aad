"""Reward model: Bradley-Terry over preference pairs, -log sigmoid(r_chosen - r_rejected), from the SFT or DPO model.

As in Tulu 3 (open-instruct `reward_modeling.py`): score head drawn from N(0, 1/(hidden_size + 1)), no dropout, one
epoch, Adam epsilon 1e-5. TRL's own default head (std 0.02) is not Tulu's. Batches: tasks/training/reward_batch.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from smoltulu.schemas.models import ModelOutputs
from smoltulu.schemas.training import RewardModelSettings, TrainingInputs
from smoltulu.tasks.models.classifiers import keep_in_float32, load_classifier
from smoltulu.tasks.stage import Stage, StageContext
from smoltulu.tasks.trainer.arguments import config_of
from smoltulu.tasks.trainer.compiled import compile_layers
from smoltulu.tasks.trainer.even_rows import even_out
from smoltulu.tasks.trainer.loop import budget, load_model, load_rows, train, trainer_arguments
from smoltulu.tasks.trainer.prepare import prepare_torch
from smoltulu.tasks.trainer.sharded import shard_trainer
from smoltulu.tasks.trainer.token_budget import cut_by_tokens
from smoltulu.tasks.training.watched import finish_watched, watch_losses

if TYPE_CHECKING:
    from transformers import Trainer


def build(config: RewardModelSettings, inputs: TrainingInputs, context: StageContext) -> Trainer:
    """The trainer of a one-score classifier on tokenised pairs, none of which has a side longer than max_length."""
    prepare_torch(context)
    import torch
    from trl import RewardConfig

    from smoltulu.tasks.training.reward_batch import COLUMNS, PairCollator, PairTrainer

    model, tokenizer = load_model(config, inputs, context.compute.packing, load_classifier, dropout=False)
    torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.config.hidden_size + 1))
    keep_in_float32(model.score)
    rows = load_rows(inputs.dataset, context, list(COLUMNS))
    trainer = PairTrainer(
        model=model,
        args=config_of(
            RewardConfig,
            **trainer_arguments(config, context),
            **budget(config, rows),
            max_length=None,  # the preflight dropped what is longer
            remove_unused_columns=False,  # TRL would drop the prompts
            disable_dropout=True,
            center_rewards_coefficient=None,
            chat_template_path=None,
            eos_token=None,
            pad_token=None,
        ),
        data_collator=PairCollator(tokenizer.pad_token_id, context.compute.packing),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    even_out(trainer)
    cut_by_tokens(trainer, context.compute)
    shard_trainer(trainer, context.compute)
    compile_layers(context, trainer.model)
    return trainer


def train_reward_model(
    config: RewardModelSettings, inputs: TrainingInputs, context: StageContext
) -> tuple[ModelOutputs, dict[str, float]]:
    """Train a one-score classifier on preference pairs."""
    trainer = build(config, inputs, context)
    from smoltulu.tasks.training.reward_batch import COLUMNS

    held_out = watch_losses(
        trainer, "reward_model", config, inputs, context,
        lambda file: load_rows(file, context, list(COLUMNS)), trainer.row_losses,
    )  # fmt: skip
    num_steps = train(trainer, context, config.schedule)
    shown = ("loss", "accuracy", "margin", "tokens_per_second")
    return finish_watched(held_out, trainer, context, num_steps, shown)


reward_model = Stage(
    "reward_model", 3, RewardModelSettings, TrainingInputs, ModelOutputs, train_reward_model, build=build
)
