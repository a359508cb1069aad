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
from smoltulu.tasks.trainer.even_rows import BLANK, is_blank
from smoltulu.tasks.trainer.means import weigh
from smoltulu.tasks.trainer.packed_attention import segments_of_pairs
from smoltulu.tasks.training.held_out_loss import RowLoss

COLUMNS = ("row", "prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class PairCollator:
    """Tokenised pairs -> a batch of B of them.

    padded    input_ids, attention_mask (2B, T)
    packed    input_ids, position_ids (1, T), segments, last_tokens (2B,) where each side ends, num_tokens () of both
              sides, each with its prompt
    both      row (B,) number of each pair in the rows that the preflight read
    """

    pad_token_id: int
    packing: bool

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if self.packing:
            batch = packed(rows)
        else:
            sides = [{side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")} for row in rows]
            batch = DataCollatorForPreference(pad_token_id=self.pad_token_id)(sides)
        return {**batch, "row": torch.tensor([row["row"] for row in rows])}


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
        "num_tokens": torch.tensor(sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in lengths)),
    }


class PairTrainer(RewardTrainer):
    """TRL's trainer with a loss that is the mean over the pairs of the whole optimizer step, padded or packed.

    TRL averages the means of micro-batches. Where the last of an epoch is short, its pairs weigh more: of three pairs
    cut into 2 + 1 the odd one counts double. TRL also weighs processes alike that have different numbers of pairs.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Pairs of each micro-batch since the last log, those of all processes.
        self._nums_pairs: list[float] = []

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Metrics of all pairs since the last log, each with the same weight."""
        weigh(
            self._metrics["train"], self._nums_pairs, ("accuracy", "margin", "mean_reward"), "min_reward", "max_reward"
        )
        self._nums_pairs.clear()
        super().log(logs, start_time)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], int]:
        """The micro-batches of an optimizer step, and the number of pairs in them, of all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_pairs = sum(_num_pairs(batch) for batch in batches)
        if self.accelerator.num_processes > 1:
            num_pairs = int(self.accelerator.reduce(torch.tensor(num_pairs, device=device), "sum").item())
        return batches, num_pairs

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum over the micro-batch, divided by the pairs of the step (alone: by its own). Outputs: the scores."""
        num_pairs = _num_pairs(inputs)
        scores, num_tokens = self._scores(model, inputs)
        # None in a blank batch: its loss is an empty sum, whose gradient is exactly 0.
        chosen, rejected = (side[:num_pairs] for side in scores.squeeze(-1).chunk(2))
        self._note(chosen, rejected, num_tokens if num_pairs else 0)
        # Gradients of several processes are averaged, not summed.
        num_processes = self.accelerator.num_processes
        loss = -logsigmoid(chosen - rejected).sum() * num_processes
        loss = loss / (num_items_in_batch or num_pairs * num_processes)
        return (loss, SequenceClassifierOutput(logits=scores)) if return_outputs else loss

    def _scores(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of the 2B sides, (2B, 1), chosen ones first, and the number of their tokens."""
        batch = {name: value for name, value in inputs.items() if name not in (BLANK, "row")}
        if "segments" in batch:
            last_tokens, num_tokens = batch.pop("last_tokens"), batch.pop("num_tokens")
            head = self.accelerator.unwrap_model(self.model).score
            return scores_of_tokens(model, head, batch)[0][last_tokens], num_tokens
        return model(**batch, use_cache=False).logits, batch["attention_mask"].sum()

    def row_losses(self, model: Any, inputs: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[RowLoss]:
        """Of each pair of a batch."""
        chosen, rejected = self._scores(model, inputs)[0].squeeze(-1).chunk(2)
        margins = (chosen - rejected).double().tolist()
        losses = (-logsigmoid(chosen - rejected)).double().tolist()
        return [RowLoss(loss, 1, margin > 0) for loss, margin in zip(losses, margins, strict=True)]

    @torch.no_grad()
    def _note(self, chosen: torch.Tensor, rejected: torch.Tensor, num_tokens: Any) -> None:
        """TRL's metrics of a micro-batch of all processes, each pair with the same weight."""
        margins, scores = chosen - rejected, torch.cat([chosen, rejected])
        # A process without scores gives infinite ends, which never win.
        end = scores.new_tensor([math.inf])
        lowest, highest = torch.cat([scores, end]).min(), torch.cat([scores, -end]).max()
        sums = [num_tokens, len(margins), (margins > 0).sum(), margins.sum(), scores.sum()]
        own = [torch.as_tensor(value, dtype=torch.float64, device=scores.device) for value in (*sums, lowest, highest)]
        of_all = self.accelerator.gather(torch.stack(own)[None])
        num_tokens, num_pairs, num_right, margin, reward = of_all[:, :5].sum(dim=0).tolist()
        self._total_train_tokens += int(num_tokens)
        metrics = self._metrics["train"]
        self._nums_pairs.append(num_pairs)
        metrics["num_tokens"] = [self._total_train_tokens]
        metrics["min_reward"].append(of_all[:, 5].min().item())
        metrics["mean_reward"].append(reward / (2 * num_pairs))
        metrics["max_reward"].append(of_all[:, 6].max().item())
        metrics["accuracy"].append(num_right / num_pairs)
        metrics["margin"].append(margin / num_pairs)


def _num_pairs(batch: Mapping[str, Any]) -> int:
    return 0 if is_blank(batch) else len(batch["row"])
