"""Pair accuracy: how often a reward ranks the chosen answer above the rejected one, and by which margin on average.

The reward is a reward model's score or DPO's implicit reward. Rules (RewardBench v1): chosen > rejected strictly, a tie
is wrong; raw logits; the score head in float32. A pair with a side longer than `max_length` is left out and counted:
cut, it would be ranked by half an answer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smoltulu.tasks.evaluation.sampling import mean_and_stderr
from smoltulu.tasks.models.batches import OnBatch, longest_first, padded
from smoltulu.tasks.models.tokens import pairs as encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("smoltulu")


@dataclass(frozen=True)
class EncodedText:
    """Token ids of prompt and completion together; the first `num_prompt` of them are the prompt.

    `counted`: 1 for each token after the prompt that DPO counts, else 0; None: all of them.
    """

    ids: tuple[int, ...]
    num_prompt: int
    counted: tuple[int, ...] | None = None

    @property
    def num_completion(self) -> int:
        """Completion tokens, the end of the turn included."""
        return len(self.ids) - self.num_prompt

    @property
    def num_counted(self) -> int:
        """Those that DPO counts: not the line's end that ChatML writes after the end of a turn."""
        return self.num_completion if self.counted is None else sum(self.counted)


@dataclass(frozen=True)
class PairAccuracy:
    """Which pairs are ranked right (1.0, else 0.0), their share, and the mean margin (chosen minus rejected).

    Share and margin have their standard error sd/sqrt(n); None for a single pair.
    """

    right: list[float]
    value: float
    stderr: float | None
    margin: float
    margin_stderr: float | None


def rank_pairs(rewards: Sequence[float]) -> PairAccuracy:
    """Accuracy and margin of the rewards of chosen, rejected, chosen, … A tie is wrong.

    Raises:
        ValueError: a reward is NaN or infinite.
    """
    pairs = list(zip(rewards[::2], rewards[1::2], strict=True))
    margins = [chosen - rejected for chosen, rejected in pairs]
    if broken := sum(not math.isfinite(margin) for margin in margins):
        raise ValueError(
            f"{broken} of {len(margins)} pairs have a score that is NaN or infinite: the model is broken; look at the "
            "loss of its training"
        )
    right = [float(chosen > rejected) for chosen, rejected in pairs]
    return PairAccuracy(right, *mean_and_stderr(right), *mean_and_stderr(margins))


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[dict[str, Any]], max_length: int
) -> tuple[list[str], list[EncodedText]]:
    """Encode, as DPO does, the pairs {"id", "prompt", "chosen", "rejected"} (lists of messages) that are not too long.

    Returns:
        their ids, and their texts: chosen, rejected, chosen, …

    Raises:
        ValueError: every pair is too long.
    """
    ids: list[str] = []
    texts: list[EncodedText] = []
    for row, pair in zip(pairs, encoded(tokenizer, pairs, "last"), strict=True):
        if pair.length <= max_length:
            ids.append(str(row["id"]))
            for side, mask in ((pair.chosen_ids, pair.chosen_mask), (pair.rejected_ids, pair.rejected_mask)):
                texts.append(EncodedText((*pair.prompt_ids, *side), len(pair.prompt_ids), tuple(mask)))
    if not ids:
        raise ValueError(
            f"all {len(pairs)} held-out pairs are longer than {max_length} tokens; raise evaluation.max_length "
            "(the model's max_position_embeddings bounds it) or use shorter pairs"
        )
    if num_too_long := len(pairs) - len(ids):
        logger.warning("%s of %s held-out pairs left out: longer than max_length", num_too_long, len(pairs))
    return ids, texts


def reward_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    on_batch: OnBatch = lambda num_done, num_texts: None,
) -> list[float]:
    """Score of each text (token ids): the head in float32 at the last real token.

    The last token is found by length. transformers looks for pad ids, and takes the wrong token where a text ends in
    one. A pad token that is eos is refused all the same: training pooled by it.
    """
    import torch

    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"a reward model needs a pad token of its own; the tokenizer has pad {tokenizer.pad_token!r} and eos "
            f"{tokenizer.eos_token!r}: add one, e.g. <pad>, and train again"
        )
    scores: dict[int, float] = {}
    head = model.score.weight.float()
    for batch in longest_first([len(text) for text in texts], batch_size):
        ids, mask = padded([texts[place] for place in batch], "right", tokenizer.pad_token_id, model.device)
        with torch.inference_mode():
            hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(batch), device=model.device), mask.sum(1) - 1].float()
            scores |= zip(batch, (last @ head.T)[:, 0].tolist(), strict=True)
        on_batch(len(scores), len(texts))
    return [scores[place] for place in range(len(texts))]


def completion_logps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[EncodedText],
    *,
    batch_size: int,
    on_batch: OnBatch = lambda num_done, num_texts: None,
) -> list[float]:
    """Summed log-probability (nats, float32) of each completion given its prompt, eos included."""
    import torch

    logps: dict[int, float] = {}
    for batch in longest_first([len(text.ids) for text in texts], batch_size):
        # Left padding, so that all completions end at the right edge and only their logits are computed.
        ids, mask = padded([texts[place].ids for place in batch], "left", tokenizer.pad_token_id, model.device)
        longest = max(texts[place].num_completion for place in batch)
        with torch.inference_mode():
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=longest + 1,
            ).logits  # (batch, longest + 1, vocabulary); the last one predicts past the end
            for row, place in enumerate(batch):
                count, counted = texts[place].num_completion, texts[place].counted
                # Row by row: a float32 copy of all logits of a batch would be the largest tensor of the stage.
                predicted = torch.log_softmax(logits[row, -count - 1 : -1].float(), dim=-1)
                chosen = predicted.gather(1, ids[row, -count:, None])[:, 0]
                if counted is not None:
                    chosen = chosen[torch.tensor(counted, dtype=torch.bool, device=chosen.device)]
                logps[place] = chosen.sum().item()
        on_batch(len(logps), len(texts))
    return [logps[place] for place in range(len(texts))]


def implicit_reward_accuracy(
    ids: Sequence[str], texts: Sequence[EncodedText], policy: Sequence[float], reference: Sequence[float]
) -> tuple[PairAccuracy, PairAccuracy, list[dict[str, Any]]]:
    """Accuracy and margin by DPO's reward without beta: log pi - log pi_ref over the completion, in nats.

    Args:
        ids, texts: of the pairs, from `encode_pairs`.
        policy, reference: log-probabilities of the completions, in the order of `texts`.

    Returns:
        by the reward per token, by its sum over the completion, and one record per pair.
    """
    counts = [text.num_counted for text in texts]
    sums = [own - other for own, other in zip(policy, reference, strict=True)]
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    per_token, summed = rank_pairs(means), rank_pairs(sums)
    records = [
        {
            "id": pair_id,
            "right": per_token.right[place],
            "right_unnormalised": summed.right[place],
            "chosen": means[2 * place],
            "rejected": means[2 * place + 1],
            "num_chosen_tokens": counts[2 * place],
            "num_rejected_tokens": counts[2 * place + 1],
        }
        for place, pair_id in enumerate(ids)
    ]
    return per_token, summed, records
