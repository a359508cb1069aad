"""DPO from the SFT model, which is also the reference.

`sigmoid_norm` is open-instruct's dpo_norm: with s = policy minus reference log-probability of a completion, summed,
and n its number of tokens, loss = -log sigmoid(beta (s_chosen / n_chosen - s_rejected / n_rejected)).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from schemas.models import ModelOutputs
from schemas.training import DPOSettings, TrainingInputs
from tasks.models import load_language_model, load_tokenizer, stop_ids
from tasks.stage import Stage, StageContext
from tasks.training import callbacks, finish, load_rows, prepare_torch, train, trainer_arguments


def _trainer_class() -> type:
    """DPOTrainer that also logs accuracies and margins divided by length: TRL logs them from sums, whatever the loss.

    `rewards/accuracies_normalised` is the share of pairs with s_chosen / n_chosen > s_rejected / n_rejected,
    `rewards/margins_normalised` the mean of beta times that difference.
    """
    from trl import DPOTrainer

    class NormalisedMarginsTrainer(DPOTrainer):
        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            # No row left: `train` says so in words, TRL fails on an empty list of tensors.
            return super()._precompute_ref_logps(dataset, name, batch_size) if len(dataset) else dataset

        def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
            # TRL keeps the log-probabilities to itself, and a second forward pass would cost a third of the training.
            seen: list[Any] = []
            hook = model.register_forward_hook(lambda module, args, output: seen.append(output.log_probs.detach()))
            try:
                result = super()._compute_loss(model, inputs, return_outputs)
            finally:
                hook.remove()
            num_chosen, num_rejected = inputs["completion_mask"].sum(dim=1).chunk(2)
            chosen, rejected = seen[0].sum(dim=1).chunk(2)
            margins = (chosen - inputs["ref_chosen_logps"]) / num_chosen
            margins = self.accelerator.gather(margins - (rejected - inputs["ref_rejected_logps"]) / num_rejected)
            metrics = self._metrics["train" if self.model.training else "eval"]
            metrics["rewards/accuracies_normalised"].append((margins > 0).float().mean().item())
            metrics["rewards/margins_normalised"].append(self.beta * margins.mean().item())
            return result

    return NormalisedMarginsTrainer


def train_dpo(
    config: DPOSettings, inputs: TrainingInputs, context: StageContext
) -> tuple[ModelOutputs, dict[str, float]]:
    """Preference optimisation. Rows: {"prompt", "chosen", "rejected"}, each a list of messages."""
    prepare_torch(context)
    from trl import DPOConfig

    tokenizer = load_tokenizer(Path(inputs.model), inputs.chat_template)
    model = load_language_model(Path(inputs.model))
    stop_ids(model, tokenizer)

    rows = load_rows(inputs.dataset, context, ["prompt", "chosen", "rejected"])
    trainer = _trainer_class()(
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
    num_steps = train(trainer, context, len(rows), config.schedule)
    rewards = ("rewards/accuracies", "rewards/margins", "rewards/accuracies_normalised", "rewards/margins_normalised")
    return finish(trainer, tokenizer, context, num_steps, ("loss", *rewards, "tokens_per_second"))


dpo = Stage("dpo", 1, DPOSettings, TrainingInputs, ModelOutputs, train_dpo)
