"""Pair accuracy: how often the chosen answer scores above the rejected one, and by how much on average (the margin), by
a reward model or by DPO's own reward.

Rules (RewardBench v1): chosen > rejected strictly, a tie is wrong; raw logits; the score head in float32. A pair of
which one side is longer than `max_length` is left out and counted: cut, it would be ranked by half an answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltulu.tasks.evaluation.sampling import mean_and_stderr

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnBatch = Callable[[int, int], None]


@dataclass(frozen=True)
class EncodedText:
    """Token ids of prompt and completion together; the first `num_prompt` of them are the prompt."""

    ids: tuple[int, ...]
    num_prompt: int

    @property
    def num_completion(self) -> int:
        """Completion tokens, eos included."""
        return len(self.ids) - self.num_prompt


@dataclass(frozen=True)
class EncodedPair:
    """A preference pair as token ids."""

    id: str
    chosen: EncodedText
    rejected: EncodedText


@dataclass(frozen=True)
class PairAccuracy:
    """Share of pairs ranked right, mean margin (chosen minus rejected), and one record per pair.

    Both with their standard error sd/sqrt(n); none for a single pair.
    """

    value: float
    stderr: float | None
    margin: float
    margin_stderr: float | None
    num_pairs: int
    records: tuple[dict[str, Any], ...]
    details: dict[str, Any] = field(default_factory=dict)


def ranked_right(chosen: Sequence[float], rejected: Sequence[float]) -> list[float]:
    """1.0 where chosen > rejected strictly, else 0.0: a tie is wrong, and so is NaN."""
    return [float(first > second) for first, second in zip(chosen, rejected, strict=True)]


def mean_margin(chosen: Sequence[float], rejected: Sequence[float]) -> tuple[float, float | None]:
    """Mean of chosen - rejected over the pairs, and its standard error.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    margins = [first - second for first, second in zip(chosen, rejected, strict=True)]
    if broken := sum(not math.isfinite(margin) for margin in margins):
        raise ValueError(
            f"{broken} of {len(margins)} pairs have a score that is NaN or infinite: the model is broken; look at the "
            "loss of its training"
        )
    return mean_and_stderr(margins)


def implicit_rewards(
    policy: Sequence[float], reference: Sequence[float], num_tokens: Sequence[int], *, normalised: bool
) -> list[float]:
    """DPO's reward without beta: (log pi - log pi_ref) over the completion, per token if `normalised`."""
    return [
        (own - other) / (count if normalised else 1)
        for own, other, count in zip(policy, reference, num_tokens, strict=True)
    ]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Mapping[str, Any]], max_length: int
) -> tuple[list[EncodedPair], int]:
    """Token ids of pairs {"id", "prompt", "chosen", "rejected"} (lists of messages), and how many were too long.

    Raises:
        ValueError: every pair is too long.
    """
    encoded = [
        EncodedPair(
            str(pair["id"]),
            _encode(tokenizer, pair["prompt"], pair["chosen"]),
            _encode(tokenizer, pair["prompt"], pair["rejected"]),
        )
        for pair in pairs
    ]
    kept = [pair for pair in encoded if max(len(pair.chosen.ids), len(pair.rejected.ids)) <= max_length]
    if not kept:
        raise ValueError(
            f"all {len(encoded)} held-out pairs are longer than {max_length} tokens; raise evaluation.max_length "
            "(the model's max_position_embeddings bounds it) or use shorter pairs"
        )
    return kept, len(encoded) - len(kept)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: list[dict], completion: list[dict]) -> EncodedText:
    whole = tokenizer.apply_chat_template(prompt + completion, tokenize=False)
    start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    # As TRL's DPO trainer splits: the completion is what comes after the prompt's number of tokens.
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    num_prompt = len(tokenizer(start, add_special_tokens=False)["input_ids"])
    assert 0 < num_prompt < len(ids), (num_prompt, len(ids))
    return EncodedText(tuple(ids), num_prompt)


def load_reward_model(folder: Path) -> PreTrainedModel:
    """A sequence-classification model with one score, in float32. ValueError if the folder holds something else."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    architectures = AutoConfig.from_pretrained(str(folder)).architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise ValueError(
            f"{folder.name} holds {', '.join(architectures) or 'an unnamed architecture'}, not a reward model "
            "(…ForSequenceClassification): its score head would be random"
        )
    model = AutoModelForSequenceClassification.from_pretrained(
        str(folder), dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    if model.config.num_labels != 1:
        raise ValueError(f"a reward model gives one score; this one has num_labels {model.config.num_labels}")
    return model


def reward_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    on_batch: OnBatch | None = None,
) -> list[float]:
    """Score of each text (token ids): the head in float32 at the last real token.

    The last token is found by length and not by looking for pad ids, as transformers does, which takes the wrong one
    where a text ends in the pad token. A pad token that is eos is refused all the same: training pooled by it.
    """
    import torch

    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"a reward model needs a pad token of its own; the tokenizer has pad {tokenizer.pad_token!r} and eos "
            f"{tokenizer.eos_token!r}: add one, e.g. <pad>, and train again"
        )
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    scores = [0.0] * len(texts)
    head = model.score.weight.float()
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = len(texts[batch[0]])
        rows = [list(texts[index]) + [tokenizer.pad_token_id] * (width - len(texts[index])) for index in batch]
        lengths = torch.tensor([len(texts[index]) for index in batch], device=model.device)
        mask = (torch.arange(width, device=model.device)[None] < lengths[:, None]).long()
        with torch.inference_mode():
            hidden = model.base_model(
                input_ids=torch.tensor(rows, device=model.device), attention_mask=mask, use_cache=False
            ).last_hidden_state
            last = hidden[torch.arange(len(batch), device=model.device), lengths - 1].float()
            values = (last @ head.T)[:, 0].tolist()
        for index, value in zip(batch, values, strict=True):
            scores[index] = value
        if on_batch is not None:
            on_batch(start + len(batch), len(texts))
    return scores


def reward_model_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Mapping[str, Any]],
    *,
    max_length: int,
    batch_size: int,
    on_batch: OnBatch | None = None,
) -> PairAccuracy:
    """Pair accuracy of a reward model on preference rows."""
    encoded, num_too_long = encode_pairs(tokenizer, pairs, max_length)
    texts = [side.ids for pair in encoded for side in (pair.chosen, pair.rejected)]
    scores = reward_scores(model, tokenizer, texts, batch_size=batch_size, on_batch=on_batch)
    chosen, rejected = scores[::2], scores[1::2]
    right = ranked_right(chosen, rejected)
    value, stderr = mean_and_stderr(right)
    records = tuple(
        {"id": pair.id, "right": mark, "chosen": first, "rejected": second}
        for pair, mark, first, second in zip(encoded, right, chosen, rejected, strict=True)
    )
    details = {
        "num_too_long": num_too_long,
        "num_ties": sum(first == second for first, second in zip(chosen, rejected, strict=True)),
    }
    return PairAccuracy(value, stderr, *mean_margin(chosen, rejected), len(encoded), records, details)


def completion_logps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[EncodedText],
    *,
    batch_size: int,
    on_batch: OnBatch | None = None,
) -> list[float]:
    """Summed log-probability (nats, float32) of each completion given its prompt, eos included."""
    import torch

    order = sorted(range(len(texts)), key=lambda index: -len(texts[index].ids))
    logps = [0.0] * len(texts)
    for start in range(0, len(order), batch_size):
        batch = [texts[index] for index in order[start : start + batch_size]]
        width = len(batch[0].ids)
        # Left padding, so that all completions end at the right edge and only their logits are computed.
        rows = [[tokenizer.pad_token_id] * (width - len(text.ids)) + list(text.ids) for text in batch]
        mask = torch.tensor(
            [[0] * (width - len(text.ids)) + [1] * len(text.ids) for text in batch], device=model.device
        )
        ids = torch.tensor(rows, device=model.device)
        longest = max(text.num_completion for text in batch)
        with torch.inference_mode():
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=longest + 1,
            ).logits  # (batch, longest + 1, vocabulary); the last one predicts past the end
            for place, text in enumerate(batch):
                count = text.num_completion
                # Row by row: a float32 copy of all logits of a batch would be the largest tensor of the stage.
                predicted = torch.log_softmax(logits[place, -count - 1 : -1].float(), dim=-1)
                index = order[start + place]
                logps[index] = predicted.gather(1, ids[place, -count:, None]).sum().item()
        if on_batch is not None:
            on_batch(start + len(batch), len(texts))
    return logps


def implicit_reward_accuracy(
    pairs: Sequence[EncodedPair], policy: Sequence[float], reference: Sequence[float], num_too_long: int = 0
) -> PairAccuracy:
    """Pair accuracy and margin (nats, without beta) of DPO's implicit reward, per token, and summed in `details`.

    Args:
        policy, reference: log-probabilities of chosen, rejected, chosen, … in the order of `pairs`.
    """
    counts = [side.num_completion for pair in pairs for side in (pair.chosen, pair.rejected)]
    per_token = implicit_rewards(policy, reference, counts, normalised=True)
    summed = implicit_rewards(policy, reference, counts, normalised=False)
    right = ranked_right(per_token[::2], per_token[1::2])
    value, stderr = mean_and_stderr(right)
    right_summed = ranked_right(summed[::2], summed[1::2])
    value_summed, stderr_summed = mean_and_stderr(right_summed)
    records = tuple(
        {
            "id": pair.id,
            "right": right[place],
            "right_unnormalised": right_summed[place],
            "chosen": per_token[2 * place],
            "rejected": per_token[2 * place + 1],
            "num_chosen_tokens": pair.chosen.num_completion,
            "num_rejected_tokens": pair.rejected.num_completion,
        }
        for place, pair in enumerate(pairs)
    )
    margin_summed, margin_summed_stderr = mean_margin(summed[::2], summed[1::2])
    details = {
        "accuracy_sum": value_summed,
        "accuracy_sum_stderr": stderr_summed,
        "margin_sum": margin_summed,
        "margin_sum_stderr": margin_summed_stderr,
        "num_too_long": num_too_long,
    }
    return PairAccuracy(value, stderr, *mean_margin(per_token[::2], per_token[1::2]), len(pairs), records, details)
