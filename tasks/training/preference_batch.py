"""Tokenised pairs as batches, padded or packed, and the log-probabilities of their completions.

Both layouts give the same sums; a test compares them in float64. Targets are those of the position itself (no shift
left to do), -100 where a token does not count.

    padded    2B rows: the B chosen sides, then the B rejected ones, each after its prompt, padded on the right
    packed    one row, pair by pair: prompt and chosen side, then the rejected side. That side begins with a second
              copy of the prompt's last token and attends to the prompt's tokens before it. The token predicts the
              first one of either completion, so every position has one target, and the rest of the prompt is
              computed once

The last token of a completion predicts nothing and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smoltulu.tasks.models.tokens import IGNORED
from smoltulu.tasks.trainer.fused_head import give_fused_head
from smoltulu.tasks.trainer.packed_attention import segments_of_pairs
from smoltulu.tasks.trainer.waits import PLACES, places_of

__all__ = ["COLUMNS", "REFERENCE_COLUMNS", "PairCollator", "completion_logps", "give_fused_head"]

COLUMNS = ("row", "prompt_ids", "prompt_mask", "chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask")
REFERENCE_COLUMNS = ("reference_chosen", "reference_rejected")
#: What of a batch goes into the model; of padding on the right it needs no mask (tasks/trainer/waits.py).
_MODEL_ARGUMENTS = ("input_ids", "position_ids", "segments", "shift_labels", PLACES)

Pair = dict[str, Any]
Batch = dict[str, Any]


@dataclass(frozen=True)
class PairCollator:
    """Tokenised pairs (`COLUMNS`, and `REFERENCE_COLUMNS` where they are known) -> a batch of B of them.

    The batch, padded or packed:
        input_ids, shift_labels     (2B, T) or (1, T): tokens; what each position predicts, or -100
        places                      of the labels, see tasks/trainer/waits.py
        attention_mask              (2B, T), padded only
        position_ids, segments      (1, T) and who attends to whom, packed only
        pieces                      3B lengths, packed only: of each pair prompt, chosen, rejected
        num_chosen, num_rejected    (B,) tokens that count; those of the prompt in both
        reference_chosen, reference_rejected    (B,) where the pairs have them
        row                         (B,) number of each pair in the rows that the preflight read
        num_tokens                  int: tokens of both sides, each with its prompt, whatever the layout
    """

    pad_token_id: int
    packing: bool

    def __call__(self, pairs: Sequence[Pair]) -> Batch:
        batch = packed(pairs) if self.packing else padded(pairs, self.pad_token_id)
        batch[PLACES] = places_of(batch["shift_labels"])
        for side in ("chosen", "rejected"):
            counted = [sum(pair["prompt_mask"][1:]) + sum(pair[f"{side}_mask"]) for pair in pairs]
            batch[f"num_{side}"] = torch.tensor(counted)
        batch["row"] = torch.tensor([pair["row"] for pair in pairs])
        # Not a tensor: the trainer counts on the CPU, and would wait for the GPU to read one.
        batch["num_tokens"] = sum(num_tokens(pair) for pair in pairs)
        for name in REFERENCE_COLUMNS:
            if name in pairs[0]:
                batch[name] = torch.tensor([pair[name] for pair in pairs], dtype=torch.float32)
        return batch


def num_tokens(pair: Pair) -> int:
    """Tokens of both sides, each with its prompt."""
    return 2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"])


def padded(pairs: Sequence[Pair], pad_token_id: int) -> Batch:
    """{"input_ids", "attention_mask", "shift_labels"}, each (2B, T)."""
    sides = [_side(pair, side) for side in ("chosen", "rejected") for pair in pairs]
    longest = max(len(ids) for ids, _ in sides)

    def filled(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    return {
        "input_ids": filled([ids for ids, _ in sides], pad_token_id),
        "attention_mask": filled([[1] * len(ids) for ids, _ in sides], 0),
        "shift_labels": filled([labels for _, labels in sides], IGNORED),
    }


def packed(pairs: Sequence[Pair]) -> Batch:
    """{"input_ids", "position_ids", "shift_labels"}, each (1, T), "segments" and "pieces"."""
    ids: list[int] = []
    labels: list[int] = []
    pieces: list[int] = []
    for pair in pairs:
        shared = len(pair["prompt_ids"]) - 1
        for side, start in (("chosen", 0), ("rejected", shared)):
            side_ids, side_labels = _side(pair, side)
            ids += side_ids[start:]
            labels += side_labels[start:]
        pieces += [shared, len(pair["chosen_ids"]), len(pair["rejected_ids"])]
    # A completion's tokens but the last, and the prompt's last before them: as many as the completion has.
    segments = segments_of_pairs(pieces[0::3], pieces[1::3], pieces[2::3])
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([segments.position_ids]),
        "shift_labels": torch.tensor([labels]),
        "segments": segments,
        "pieces": pieces,
    }


def completion_logps(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-probabilities of the tokens that count, of the chosen and of the rejected sides: (B,) each.

    `model` has the head of tasks/trainer/fused_head.py, which never holds the logits of a batch.
    """
    arguments = {name: batch[name] for name in _MODEL_ARGUMENTS if name in batch}
    logps = model(**arguments, use_cache=False, fused_lm_head=True).log_probs
    if "pieces" not in batch:
        chosen, rejected = logps.sum(dim=1).chunk(2)
        return chosen, rejected
    sums = torch.stack([piece.sum() for piece in logps[0].split(batch["pieces"])])
    prompt, chosen, rejected = sums.view(-1, 3).unbind(dim=1)
    return prompt + chosen, prompt + rejected


def _side(pair: Pair, side: str) -> tuple[list[int], list[int]]:
    """Tokens that predict something, and what they predict where it counts, of one completion after its prompt."""
    if not pair["prompt_ids"]:
        raise ValueError(
            f"row {pair['row']}: the pair has no prompt token, so nothing predicts how its answers begin; the chat "
            "template must write something before the assistant's answer"
        )
    ids = pair["prompt_ids"] + pair[f"{side}_ids"]
    mask = pair["prompt_mask"] + pair[f"{side}_mask"]
    return ids[:-1], [token if counts else IGNORED for token, counts in zip(ids[1:], mask[1:], strict=True)]
