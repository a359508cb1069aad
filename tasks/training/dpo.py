"""DPO from the SFT model, which is also the reference. Losses: preference_loss.py, batches: preference_batch.py.

The trainer derives from transformers' Trainer, not from TRL's DPOTrainer. Tokenisation, collator, reference and loss
are ours, and the loop is transformers' own. DPOTrainer would also hash every weight for a cache that we do not have,
and give a LoRA model a second adapter as its reference.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.models import ModelOutputs
from smoltulu.schemas.reference import ReferenceLogpsConfig, ReferenceLogpsInputs
from smoltulu.schemas.training import DPOInputs, DPOSettings, TrainingInputs
from smoltulu.tasks.models.lora import with_adapter
from smoltulu.tasks.stage import Stage, StageContext
from smoltulu.tasks.trainer.arguments import config_of
from smoltulu.tasks.trainer.compiled import compile_layers
from smoltulu.tasks.trainer.even_rows import even_out, is_blank
from smoltulu.tasks.trainer.gate import gate_failures
from smoltulu.tasks.trainer.guards import LossRule
from smoltulu.tasks.trainer.loop import budget, load_model, load_rows, train, trainer_arguments
from smoltulu.tasks.trainer.prepare import prepare_torch
from smoltulu.tasks.trainer.sharded import shard_trainer
from smoltulu.tasks.trainer.token_budget import cut_by_tokens
from smoltulu.tasks.trainer.waits import sums_over_ranks
from smoltulu.tasks.training.reference_logps import run_reference_logps
from smoltulu.tasks.training.watched import finish_watched, watch_losses

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import Trainer


def _trainer_class() -> type:
    """A Trainer whose loss is a preference loss, averaged over the pairs of the whole optimizer step.

    transformers averages the means of micro-batches, which weighs pairs otherwise where the last of an epoch is short.
    Logged metrics are means over all pairs since the previous log. Names are TRL's, and as in TRL the values are sums
    over tokens whatever the loss: rewards are beta (log pi - log pi_ref). Those divided by length are ours:
    `rewards/margins_normalised` is the mean of beta (c / n_c - r / n_r), `rewards/accuracies_normalised` the share of
    pairs in which it is above 0.
    """
    import torch
    from transformers import Trainer

    from smoltulu.tasks.training.held_out_loss import RowLoss
    from smoltulu.tasks.training.preference_batch import completion_logps
    from smoltulu.tasks.training.preference_loss import LogRatios, preference_loss, to_reference

    class PreferenceTrainer(Trainer):
        loss_is_scaled_for_ga = True

        def __init__(self, *args: Any, settings: DPOSettings, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.settings = settings
            #: Name -> sum over pairs since the last log; on the device, so that no step waits for it.
            self._sums: dict[str, torch.Tensor] = {}
            self._num_pairs = 0
            self._total_train_tokens = 0

        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], int]:
            """The micro-batches of an optimizer step, and the number of pairs in them, of all processes."""
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            of_pairs = [batch for batch in batches if not is_blank(batch)]
            counts = [sum(len(batch["row"]) for batch in of_pairs), sum(batch["num_tokens"] for batch in of_pairs)]
            counts = sums_over_ranks(self, counts)
            self._total_train_tokens += counts[1]
            return batches, counts[0]

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> torch.Tensor:
            """Sum over the micro-batch, divided by the pairs of the step (alone: by its own)."""
            assert not return_outputs, "no evaluation here"
            chosen, rejected = completion_logps(model, inputs)
            # None in a blank batch: its loss is an empty sum, whose gradient is exactly 0.
            num_pairs = 0 if is_blank(inputs) else len(inputs["row"])
            chosen, rejected = chosen[:num_pairs], rejected[:num_pairs]
            ratios = to_reference(inputs, chosen, rejected)
            losses = preference_loss(self.settings.loss_type, ratios, self.settings.beta, self.settings.label_smoothing)
            self._note(chosen.detach(), rejected.detach(), ratios)
            num_processes = self.accelerator.num_processes
            # Gradients of several processes are averaged, not summed.
            return losses.sum() * num_processes / (num_items_in_batch or len(losses) * num_processes)

        def row_losses(self, model: Any, inputs: Any, rows: Sequence[dict[str, Any]]) -> list[RowLoss]:
            """Of each pair of a batch; right: a positive margin, as in `rewards/accuracies`."""
            ratios = to_reference(inputs, *completion_logps(model, inputs))
            losses = preference_loss(self.settings.loss_type, ratios, self.settings.beta, self.settings.label_smoothing)
            right = (ratios.margins > 0).tolist()
            return [RowLoss(loss, 1, one) for loss, one in zip(losses.double().tolist(), right, strict=True)]

        @torch.no_grad()
        def _note(self, chosen: torch.Tensor, rejected: torch.Tensor, ratios: LogRatios) -> None:
            beta = self.settings.beta
            values = {
                "rewards/chosen": beta * ratios.chosen,
                "rewards/rejected": beta * ratios.rejected,
                "rewards/accuracies": ratios.margins > 0,
                "rewards/margins": beta * ratios.margins,
                "rewards/accuracies_normalised": ratios.normalised_margins > 0,
                "rewards/margins_normalised": beta * ratios.normalised_margins,
                "logps/chosen": chosen,
                "logps/rejected": rejected,
            }
            for name, value in values.items():
                self._sums[name] = self._sums.get(name, 0) + value.double().sum()
            self._num_pairs += len(chosen)

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            # Not if there were pairs: a process without any must still take part in the reduction.
            if self._sums:
                count = torch.tensor(self._num_pairs, dtype=torch.float64, device=self.accelerator.device)
                # All processes come here, at the same step.
                sums = self.accelerator.reduce(torch.stack([*self._sums.values(), count]), "sum").tolist()
                logs |= {name: value / sums[-1] for name, value in zip(self._sums, sums[:-1], strict=True)}
                logs["num_tokens"] = self._total_train_tokens
                self._sums, self._num_pairs = {}, 0
            super().log(logs, start_time)

    return PreferenceTrainer


def load_pairs(dataset: str, reference_logps: str, context: StageContext) -> Dataset:
    """Tokenised pairs with the reference's log-probabilities; ValueError where those are of other rows."""
    from pyarrow import parquet

    from smoltulu.tasks.training.preference_batch import COLUMNS, REFERENCE_COLUMNS

    rows = load_rows(dataset, context, list(COLUMNS))
    reference = parquet.read_table(reference_logps)
    if len(reference) != len(rows):
        raise ValueError(
            f"{reference_logps} has {len(reference):,} lines and {dataset} {len(rows):,} pairs: the "
            "reference's log-probabilities are of other rows; make them again (refresh reference-logps)"
        )
    for name, source in zip(REFERENCE_COLUMNS, ("chosen", "rejected"), strict=True):
        rows = rows.add_column(name, reference[source].to_numpy())
    return rows


def build(config: DPOSettings, inputs: DPOInputs, context: StageContext) -> Trainer:
    """The trainer on tokenised pairs, whose log-probabilities under the reference are known."""
    prepare_torch(context)
    from transformers import TrainingArguments

    from smoltulu.tasks.training.preference_batch import PairCollator, give_fused_head

    model, tokenizer = load_model(config, inputs, context.compute.packing, dropout=False)
    give_fused_head(model)
    if config.lora:
        model = with_adapter(model, config.lora)

    rows = load_pairs(inputs.dataset, inputs.reference_logps, context)
    arguments = trainer_arguments(config, context)
    del arguments["trust_remote_code"]  # TRL's own; `load_language_model` runs none
    trainer = _trainer_class()(
        model=model,
        args=config_of(
            TrainingArguments,
            **arguments,
            **budget(config, rows),
            remove_unused_columns=False,
        ),
        data_collator=PairCollator(tokenizer.pad_token_id, context.compute.packing),
        train_dataset=rows,
        processing_class=tokenizer,
        settings=config,
    )
    even_out(trainer)
    cut_by_tokens(trainer, context.compute)
    shard_trainer(trainer, context.compute)
    compile_layers(context, trainer.model)
    return trainer


def build_with_reference(config: DPOSettings, inputs: TrainingInputs, context: StageContext) -> Trainer:
    """`build` for a dry run: computes the reference's log-probabilities first."""
    reference, _ = run_reference_logps(
        ReferenceLogpsConfig(precision=config.precision), ReferenceLogpsInputs(**inputs.model_dump()), context
    )
    gc.collect()  # the reference model is in a reference cycle
    file = str(context.folder / reference.file)
    return build(config, DPOInputs(**inputs.model_dump(), reference_logps=file), context)


def train_dpo(config: DPOSettings, inputs: DPOInputs, context: StageContext) -> tuple[ModelOutputs, dict[str, float]]:
    """Preference optimisation of pairs."""
    trainer = build(config, inputs, context)

    def load_held_out(file: str) -> Dataset:
        assert inputs.held_out_reference_logps is not None, "held-out pairs come with their reference"
        return load_pairs(file, inputs.held_out_reference_logps, context)

    held_out = watch_losses(trainer, "dpo", config, inputs, context, load_held_out, trainer.row_losses)
    # With the hinge loss, a pair beyond the margin has a loss of 0.
    rule = LossRule(zero_is_fault=config.loss_type != "hinge")
    num_steps = train(trainer, context, config.schedule, rule)
    rewards = ("rewards/accuracies", "rewards/margins", "rewards/accuracies_normalised", "rewards/margins_normalised")
    shown = ("loss", *rewards, "tokens_per_second")
    return finish_watched(held_out, trainer, context, num_steps, shown, config.gate)


dpo = Stage("dpo", 2, DPOSettings, DPOInputs, ModelOutputs, train_dpo, gate_failures, build_with_reference)
