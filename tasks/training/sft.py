"""SFT: loss on assistant tokens and the closing eos only, token-exact over the optimizer step.

Rows come tokenised from the preflight. Those of a micro-batch lie end to end (docs/packing.md) or are padded, which
changes no result: TRL divides the summed loss by the number of supervised tokens in the whole optimizer step, so the
gradient does not depend on how the step is cut. Tulu 3 summed and left the scale to Adam (open-instruct,
`--reduce_loss sum`), which is the same up to a per-step factor. Rows may have weights: tasks/training/row_weights.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smoltulu.schemas.models import ModelOutputs
from smoltulu.schemas.training import SFTInputs, SFTSettings, TrainingInputs
from smoltulu.tasks.models import mup
from smoltulu.tasks.models.lora import with_adapter
from smoltulu.tasks.models.tokens import IGNORED
from smoltulu.tasks.stage import Stage, StageContext
from smoltulu.tasks.trainer.arguments import config_of
from smoltulu.tasks.trainer.even_rows import BLANK, even_out, is_blank
from smoltulu.tasks.trainer.gate import gate_failures
from smoltulu.tasks.trainer.loop import budget, load_model, load_rows, prepare_torch, train, trainer_arguments
from smoltulu.tasks.trainer.means import weigh
from smoltulu.tasks.trainer.packed_attention import segments_of_lengths
from smoltulu.tasks.trainer.sharded import shard_trainer
from smoltulu.tasks.trainer.token_budget import cut_by_tokens
from smoltulu.tasks.training.row_weights import (
    WEIGHTS,
    WeightedCollator,
    normalise,
    pass_over_steps_without_weight,
    weighted,
    with_weights,
)
from smoltulu.tasks.training.watched import finish_watched, watch_losses

if TYPE_CHECKING:
    from transformers import Trainer

    from smoltulu.tasks.training.held_out_loss import RowLoss

COLUMNS = ("row", "input_ids", "labels")


def collate_packed(rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """Rows end to end: {"input_ids", "labels", "position_ids"}, each (1, T), and "segments".

    The label of a row's first token is ignored: what stands before it is the end of another row.
    """
    import torch

    segments = segments_of_lengths([len(row["input_ids"]) for row in rows])
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "labels": torch.tensor([[label for row in rows for label in (IGNORED, *row["labels"][1:])]]),
        "position_ids": torch.tensor([segments.position_ids]),
        "segments": segments,
    }


@dataclass(frozen=True)
class RowCollator:
    """A collator whose batches also name their rows: `row` (B,), by number in the rows that the preflight read."""

    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch

        return {**self.collate(rows), "row": torch.tensor([row["row"] for row in rows])}


def _trainer_class() -> type:
    """TRL's trainer, which also takes blank batches (tasks/trainer/even_rows.py), numbers of rows, and weights.

    Without a supervised token blank ones add nothing to its sums; only their tokens must not be counted.
    """
    import torch
    from trl import SFTTrainer

    class EvenSFTTrainer(SFTTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            #: Supervised tokens of each micro-batch since the last log.
            self._num_supervised: list[torch.Tensor] = []

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if self._num_supervised:
                # All processes come here, at the same step, after equally many micro-batches.
                counts = self.accelerator.reduce(torch.stack(self._num_supervised), "sum").tolist()
                weigh(self._metrics["train"], counts, ("entropy", "mean_token_accuracy"))
                self._num_supervised.clear()
            super().log(logs, start_time)

        def get_batch_samples(self, *args: Any) -> Any:
            batches, num_tokens = super().get_batch_samples(*args)
            if batches and WEIGHTS in batches[0]:
                self.num_weighted_tokens = normalise(batches, self.accelerator)
            return batches, num_tokens

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self._num_supervised.append((inputs["labels"][:, 1:] != IGNORED).sum())
            batch = {name: value for name, value in inputs.items() if name not in (BLANK, WEIGHTS, "row")}
            if not is_blank(inputs):
                model = weighted(model, inputs[WEIGHTS]) if WEIGHTS in inputs else model
                return super().compute_loss(model, batch, *args, **kwargs)

            def without_mask(attention_mask: torch.Tensor, **batch: Any) -> Any:
                return model(**batch)

            # TRL takes its count of tokens from the mask; the model needs none for a row without padding.
            uncounted = batch | {"attention_mask": torch.zeros_like(batch["input_ids"])}
            return super().compute_loss(without_mask, uncounted, *args, **kwargs)

    return EvenSFTTrainer


def build(config: SFTSettings, inputs: TrainingInputs, context: StageContext) -> Trainer:
    """The trainer of the base model. Rows: {"row", "input_ids", "labels"}, none longer than max_length."""
    prepare_torch(context)
    from trl import SFTConfig
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model, tokenizer = load_model(config, inputs, context.compute.packing)
    if config.lora:
        model = with_adapter(model, config.lora)

    collate = collate_packed if context.compute.packing else DataCollatorForLanguageModeling(tokenizer.pad_token_id)
    rows = load_rows(inputs.dataset, context, list(COLUMNS))
    collator: Callable[[Sequence[dict[str, Any]]], dict[str, Any]] = RowCollator(collate)
    weights = inputs.weights if isinstance(inputs, SFTInputs) else None  # a dry run has none
    if weights is not None:
        rows, collator = with_weights(rows, weights, config.max_length), WeightedCollator(collator)
    trainer = _trainer_class()(
        model=model,
        args=config_of(
            SFTConfig,
            **trainer_arguments(config, context),
            **budget(config, rows),
            loss_type="nll",
            max_length=None,  # the preflight cut or dropped what is longer
            packing=False,  # TRL's changes which rows a step holds
            padding_free=False,
            shuffle_dataset=False,
            completion_only_loss=None,  # the rows' labels say what is trained
            assistant_only_loss=False,
            router_aux_loss_coef=None,  # as the model's config has it
            chat_template_path=None,
            eos_token=None,
            pad_token=None,
            remove_unused_columns=False,  # TRL would drop the numbers of the rows
        ),
        data_collator=collator,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    even_out(trainer)
    cut_by_tokens(trainer, context.compute)
    shard_trainer(trainer, context.compute)
    if weights is not None:
        trainer.add_callback(pass_over_steps_without_weight(trainer))
    if config.mup_base_width is not None:
        mup.follow(trainer, config.mup_base_width)
    return trainer


def row_losses(model: Any, batch: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[RowLoss]:
    """Of each row of a batch, padded or packed: the summed loss of its supervised tokens."""
    import torch
    from torch.nn.functional import cross_entropy

    from smoltulu.tasks.training.held_out_loss import RowLoss

    arguments = {name: value for name, value in batch.items() if name not in ("labels", "row")}
    logits, labels = model(**arguments, use_cache=False).logits, batch["labels"]
    sums, start = [], 0
    for number, row in enumerate(rows):
        # Packed rows lie in the one row of the batch, padded ones begin a row each.
        line, first = (0, start) if "segments" in batch else (number, 0)
        last = first + len(row["input_ids"])
        said = logits[line, first : last - 1]
        said = said.to(torch.promote_types(said.dtype, torch.float32))
        sums.append(cross_entropy(said, labels[line, first + 1 : last], ignore_index=IGNORED, reduction="sum").double())
        start = last
    counts = [sum(label != IGNORED for label in row["labels"][1:]) for row in rows]
    return [RowLoss(total, count) for total, count in zip(torch.stack(sums).tolist(), counts, strict=True)]


def train_sft(
    config: SFTSettings, inputs: TrainingInputs, context: StageContext
) -> tuple[ModelOutputs, dict[str, float]]:
    """Fine-tune a base model on conversations."""
    trainer = build(config, inputs, context)
    held_out = watch_losses(
        trainer, "sft", config, inputs, context, lambda file: load_rows(file, context, list(COLUMNS)), row_losses
    )
    num_steps = train(trainer, context, config.schedule)
    shown = ("loss", "mean_token_accuracy", "tokens_per_second")
    return finish_watched(held_out, trainer, context, num_steps, shown, config.gate)


sft = Stage("sft", 2, SFTSettings, SFTInputs, ModelOutputs, train_sft, gate_failures, build)
