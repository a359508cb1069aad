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
from smoltulu.tasks.trainer.compiled import compile_layers
from smoltulu.tasks.trainer.even_rows import even_out, is_blank
from smoltulu.tasks.trainer.fused_head import take_places
from smoltulu.tasks.trainer.gate import gate_failures
from smoltulu.tasks.trainer.loop import budget, load_model, load_rows, train, trainer_arguments
from smoltulu.tasks.trainer.packed_attention import segments_of_lengths
from smoltulu.tasks.trainer.prepare import prepare_torch
from smoltulu.tasks.trainer.sharded import shard_trainer
from smoltulu.tasks.trainer.token_budget import cut_by_tokens
from smoltulu.tasks.trainer.waits import PLACES, places_of, sums_over_ranks
from smoltulu.tasks.training.row_weights import (
    WEIGHTS,
    WeightedCollator,
    normalise,
    pass_over_steps_without_weight,
    with_weights,
)
from smoltulu.tasks.training.watched import finish_watched, watch_losses

if TYPE_CHECKING:
    from transformers import Trainer

    from smoltulu.tasks.training.held_out_loss import RowLoss

COLUMNS = ("row", "input_ids", "labels")
#: What of a batch goes into the model; of padding on the right it needs no mask (tasks/trainer/waits.py).
_MODEL_ARGUMENTS = ("input_ids", "position_ids", "segments", PLACES)


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
    """A collator whose batches also have:

    row         (B,) numbers of the rows, among those that the preflight read
    places      of the tokens that predict a supervised one, see tasks/trainer/waits.py
    num_tokens  an int, without padding
    """

    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch

        batch = self.collate(rows)
        shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        more = {"row": torch.tensor([row["row"] for row in rows]), PLACES: places_of(shifted)}
        return {**batch, **more, "num_tokens": sum(len(row["input_ids"]) for row in rows)}


def _trainer_class() -> type:
    """TRL's trainer with its loss and metrics, neither of which waits for the device (tasks/trainer/waits.py).

    TRL's own reads five numbers of every micro-batch, and exchanges four among the processes. Here they are summed
    where they are, and read when they are logged: means over all supervised tokens since the last log, of all
    processes. Takes blank batches (tasks/trainer/even_rows.py), numbers of rows, and weights too.
    """
    import torch
    from accelerate.utils import is_peft_model
    from trl import SFTTrainer

    class EvenSFTTrainer(SFTTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            take_places(self.model.get_base_model() if is_peft_model(self.model) else self.model)
            #: Since the last log, on the device: supervised tokens, entropy, right tokens; with experts their loss too.
            self._sums: Any = 0
            #: Of the step, without blank ones, of all processes.
            self._num_micro_batches = 1

        def _get_num_items_in_batch(self, batches: list[Any], device: Any) -> int | None:
            """Supervised tokens of an optimizer step, of all processes."""
            if not batches:
                return None
            counts = [
                [len(batch[PLACES]), *((0, 0) if is_blank(batch) else (batch["num_tokens"], 1))] for batch in batches
            ]
            sums = sums_over_ranks(self, [sum(column) for column in zip(*counts, strict=True)])
            num_supervised, num_tokens, self._num_micro_batches = sums
            self._total_train_tokens += num_tokens
            if WEIGHTS in batches[0]:
                normalise(batches, self.accelerator)
                self.num_weighted_tokens = num_supervised
            return num_supervised

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: int | None = None
        ) -> torch.Tensor:
            """Sum over the micro-batch, divided by the supervised tokens of the step (alone: by its own)."""
            assert not return_outputs, "no evaluation here"
            batch = {name: inputs[name] for name in _MODEL_ARGUMENTS if name in inputs}
            if self.aux_loss_enabled:
                batch["output_router_logits"] = True
                if "attention_mask" in inputs:  # the experts' loss leaves padding out
                    batch["attention_mask"] = inputs["attention_mask"]
            # Position t predicts the label of t + 1.
            labels = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
            outputs = model(**batch, shift_labels=labels, use_cache=False, fused_lm_head=True)
            losses = -outputs.log_probs
            if WEIGHTS in inputs:
                losses = losses * torch.nn.functional.pad(inputs[WEIGHTS][:, 1:], (0, 1))
            # Gradients of several processes are averaged, not summed.
            num_processes = self.accelerator.num_processes
            count = len(inputs[PLACES]) * num_processes if num_items_in_batch is None else num_items_in_batch
            loss = losses.sum() / max(count, 1) * num_processes
            of_experts = []
            if self.aux_loss_enabled:
                # A mean over the micro-batch, whose mean over those of the step is taken, of all processes. A blank one
                # says nothing of the experts.
                share = 0.0 if is_blank(inputs) else num_processes / max(self._num_micro_batches, 1)
                loss = loss + self.router_aux_loss_coef * outputs.aux_loss * share
                aux_loss = outputs.aux_loss.detach().double()
                of_experts = [aux_loss * (share > 0), torch.full_like(aux_loss, share > 0)]
            supervised = torch.full((), len(inputs[PLACES]), dtype=torch.float64, device=loss.device)
            entropy, right = outputs.entropy.detach().double().sum(), outputs.is_top1.double().sum()
            self._sums = self._sums + torch.stack([supervised, entropy, right, *of_experts])
            return loss

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if isinstance(self._sums, torch.Tensor):
                # All processes come here, at the same step.
                num_supervised, entropy, right, *of_experts = self.accelerator.reduce(self._sums, "sum").tolist()
                logs["entropy"] = entropy / num_supervised if num_supervised else 0.0
                logs["mean_token_accuracy"] = right / num_supervised if num_supervised else 0.0
                logs["num_tokens"] = self._total_train_tokens
                if of_experts:
                    logs["aux_loss"] = of_experts[0] / max(of_experts[1], 1)
                self._sums = 0
            super().log(logs, start_time)

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
    compile_layers(context, trainer.model)
    if weights is not None:
        trainer.add_callback(pass_over_steps_without_weight(trainer))
    if config.mup_base_width is not None:
        mup.follow(trainer, config.mup_base_width)
    return trainer


def row_losses(model: Any, batch: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[RowLoss]:
    """Of each row of a batch, padded or packed: the summed loss of its supervised tokens."""
    import torch

    from smoltulu.tasks.training.held_out_loss import RowLoss

    arguments = {name: batch[name] for name in _MODEL_ARGUMENTS if name in batch}
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    # By the training's own head: logits of every token would take more memory than a step of the training does.
    log_probs = model(**arguments, shift_labels=labels, use_cache=False, fused_lm_head=True).log_probs
    sums, start = [], 0
    for number, row in enumerate(rows):
        # Packed rows lie in the one row of the batch, padded ones begin a row each.
        line, first = (0, start) if "segments" in batch else (number, 0)
        last = first + len(row["input_ids"])
        sums.append(-log_probs[line, first : last - 1].double().sum())
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
