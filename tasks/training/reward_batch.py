"""Tokenised pairs as batches of the reward model, padded or packed, and the trainer for both.

    padded    2B rows: the B chosen sides, then the B rejected ones, each after its prompt, padded on the right
    packed    one row, pair by pair: prompt, chosen, rejected; both completions attend to the one prompt

A score is read at the last token of a side, so nothing but the layout differs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from smoltulu.tasks.models.classifiers import scores_of_tokens
from smoltulu.tasks.trainer.even_rows import is_blank
from smoltulu.tasks.trainer.packed_attention import segments_of_pairs
from smoltulu.tasks.trainer.waits import sums_over_ranks
from smoltulu.tasks.training.held_out_loss import RowLoss

COLUMNS = ("row", "prompt_ids", "chosen_ids", "rejected_ids")
#: What of a batch goes into the model; of padding on the right it needs no mask (tasks/trainer/waits.py).
_MODEL_ARGUMENTS = ("input_ids", "position_ids", "segments")


@dataclass(frozen=True)
class PairCollator:
    """Tokenised pairs -> a batch of B of them.

    padded    input_ids, attention_mask (2B, T)
    packed    input_ids, position_ids (1, T), segments, last_tokens (2B,) where each side ends
    both      row (B,) number of each pair in the rows that the preflight read; num_tokens, an int: of both sides, each
              with its prompt
    """

    pad_token_id: int
    packing: bool

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if self.packing:
            batch = packed(rows)
        else:
            sides = [{side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")} for row in rows]
            batch = DataCollatorForPreference(pad_token_id=self.pad_token_id)(sides)
        # Not a tensor: the trainer counts on the CPU, and would wait for the GPU to read one.
        num_tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
        return {**batch, "row": torch.tensor([row["row"] for row in rows]), "num_tokens": num_tokens}


def packed(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The packed batch; see `PairCollator`."""
    lengths = [(len(row["prompt_ids"]), len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    segments = segments_of_pairs(*zip(*lengths, strict=True))
    # A pair is two segments: prompt and chosen, rejected.
    ends = [part.query[1] - 1 for part in segments.parts]
    ids = [token for row in rows for name in ("prompt_ids", "chosen_ids", "rejected_ids") for token in row[name]]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([segments.position_ids]),
        "segments": segments,
        "last_tokens": torch.tensor(ends[0::2] + ends[1::2]),
    }


class PairTrainer(RewardTrainer):
    """TRL's trainer with a loss that is the mean over the pairs of the whole optimizer step, padded or packed.

    TRL averages the means of micro-batches. Where the last of an epoch is short, its pairs weigh more: of three pairs
    cut into 2 + 1 the odd one counts double. TRL also weighs processes alike that have different numbers of pairs.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._forget()

    def _forget(self) -> None:
        #: Since the last log, on the device: pairs, right ones, margins and scores, summed; -lowest and highest score.
        self._sums: Any = 0
        self._ends: torch.Tensor | None = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's metrics of all pairs since the last log, of all processes, each with the same weight."""
        if isinstance(self._sums, torch.Tensor):  # all processes come here, at the same step
            ends = self._sums.new_full((2,), -math.inf) if self._ends is None else self._ends
            of_all = self.accelerator.gather(torch.cat([self._sums, ends])[None])
            num_pairs, num_right, margin, score = of_all[:, :4].sum(dim=0).tolist()
            lowest, highest = of_all[:, 4:].amax(dim=0).tolist()
            logs |= {
                "num_tokens": self._total_train_tokens,
                "min_reward": -lowest,
                "mean_reward": score / (2 * num_pairs),
                "max_reward": highest,
                "accuracy": num_right / num_pairs,
                "margin": margin / num_pairs,
            }
            self._forget()
        super().log(logs, start_time)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], int]:
        """The micro-batches of an optimizer step, and the number of pairs in them, of all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_tokens = sum(batch["num_tokens"] for batch in batches if not is_blank(batch))
        num_pairs, num_tokens = sums_over_ranks(self, [sum(map(_num_pairs, batches)), num_tokens])
        self._total_train_tokens += num_tokens
        return batches, num_pairs

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum over the micro-batch, divided by the pairs of the step (alone: by its own). Outputs: the scores."""
        num_pairs = _num_pairs(inputs)
        scores = self._scores(model, inputs)
        # None in a blank batch: its loss is an empty sum, whose gradient is exactly 0.
        chosen, rejected = (side[:num_pairs] for side in scores.squeeze(-1).chunk(2))
        self._note(chosen.detach(), rejected.detach())
        # Gradients of several processes are averaged, not summed.
        num_processes = self.accelerator.num_processes
        loss = -logsigmoid(chosen - rejected).sum() * num_processes
        loss = loss / (num_items_in_batch or num_pairs * num_processes)
        return (loss, SequenceClassifierOutput(logits=scores)) if return_outputs else loss

    def _scores(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Scores of the 2B sides, (2B, 1), chosen ones first."""
        batch = {name: value for name, value in inputs.items() if name in _MODEL_ARGUMENTS}
        if "segments" in batch:
            head = self.accelerator.unwrap_model(self.model).score
            return scores_of_tokens(model, head, batch)[0].index_select(0, inputs["last_tokens"])
        scores: torch.Tensor = model(**batch, use_cache=False).logits
        return scores

    def row_losses(self, model: Any, inputs: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[RowLoss]:
        """Of each pair of a batch."""
        chosen, rejected = self._scores(model, inputs).squeeze(-1).chunk(2)
        margins = (chosen - rejected).double().tolist()
        losses = (-logsigmoid(chosen - rejected)).double().tolist()
        return [RowLoss(loss, 1, margin > 0) for loss, margin in zip(losses, margins, strict=True)]

    @torch.no_grad()
    def _note(self, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        """Add a micro-batch to the sums, on the device."""
        margins, scores = chosen - rejected, torch.cat([chosen, rejected]).double()
        count = torch.full((), len(margins), dtype=torch.float64, device=scores.device)
        self._sums = self._sums + torch.stack(
            [count, (margins > 0).double().sum(), margins.double().sum(), scores.sum()]
        )
        if len(margins):
            ends = torch.stack([-scores.min(), scores.max()])
            self._ends = ends if self._ends is None else torch.maximum(self._ends, ends)


def _num_pairs(batch: Mapping[str, Any]) -> int:
    return 0 if is_blank(batch) else len(batch["row"])
