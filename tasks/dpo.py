"""DPO from the SFT model, which is also the reference.

`sigmoid_norm` is open-instruct's dpo_norm: with s = policy minus reference log-probability of a completion, summed,
and n its number of tokens, loss = -log sigmoid(beta (s_chosen / n_chosen - s_rejected / n_rejected)).
"""

from __future__ import annotations

from pathlib import Path

from schemas.models import ModelOutputs
from schemas.training import DPOSettings, TrainingInputs
from tasks.models import load_language_model, load_tokenizer, stop_ids
from tasks.stage import Stage, StageContext
from tasks.training import callbacks, finish, load_rows, prepare_torch, train, trainer_arguments


def train_dpo(
    config: DPOSettings, inputs: TrainingInputs, context: StageContext
) -> tuple[ModelOutputs, dict[str, float]]:
    """Preference optimisation. Rows: {"prompt", "chosen", "rejected"}, each a list of messages."""
    prepare_torch(context)
    from trl import DPOConfig, DPOTrainer

    tokenizer = load_tokenizer(Path(inputs.model), inputs.chat_template)
    model = load_language_model(Path(inputs.model))
    stop_ids(model, tokenizer)

    rows = load_rows(inputs.dataset, context, ["prompt", "chosen", "rejected"])
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            **trainer_arguments(config, context),
            num_train_epochs=config.num_train_epochs,
            max_steps=config.max_steps or -1,
            max_length=config.max_length,
            loss_type=[config.loss_type],
            beta=config.beta,
            # Once, before training: the reference is then not kept in memory. The model is still the SFT model here,
            # also when training goes on from a checkpoint, which is loaded later.
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=context.compute.per_device_eval_batch_size,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=callbacks(context),
    )
    num_steps = train(trainer, context, len(rows))
    shown = ("loss", "rewards/accuracies", "rewards/margins", "tokens_per_second")
    return finish(trainer, tokenizer, context, num_steps, shown)


dpo = Stage("dpo", 1, DPOSettings, TrainingInputs, ModelOutputs, train_dpo)
