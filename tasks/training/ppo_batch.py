"""Episodes of PPO as batches, and what policy and critic say of each response token.

A batch is padded on the right: prompt, response, padding; no token sees those after it. Position t predicts token
t + 1: there the log-probability of a response token, and the value before it, are read. `shift_labels` marks these
places. What comes out is flat, (N,): the N marked tokens, episode by episode. Prompts, padding and what follows an eos
are in none of it, so no gradient can reach them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from transformers import PreTrainedModel

from smoltulu.tasks.models.batches import longest_first
from smoltulu.tasks.models.classifiers import scores_of_tokens
from smoltulu.tasks.models.tokens import IGNORED, Messages
from smoltulu.tasks.trainer.waits import PLACES, places_of, put
from smoltulu.tasks.training.rewards import VERDICTS, Score
from smoltulu.tasks.training.rollout_log import sample

Batch = dict[str, torch.Tensor]


class Episode(TypedDict, total=False):
    """One rollout and what is known of it; tensors are (T,), one value a response token, on the CPU.

    batch        number of the rollout batch
    row, sample  number of the prompt in the rows, and of the sample; `prompt` names the row where a guard ends training
    ids          of the response, with the token that ended it
    score        reward and verdict; one without a reward is in no loss
    """

    batch: int
    row: int
    sample: int
    prompt: Messages
    prompt_ids: list[int]
    ids: list[int]
    stopped: bool
    text: str
    sampled_logps: list[float]
    score: Score
    logps: torch.Tensor
    reference_logps: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


def num_trained(episode: Episode) -> int:
    """Response tokens that are in a loss: all, or none where the ground truth could not be graded."""
    return 0 if episode["score"].reward is None else len(episode["ids"])


def collate(episodes: Sequence[Episode], pad_token_id: int, device: torch.device) -> Batch:
    """{"input_ids", "attention_mask", "shift_labels"}, each (episodes, tokens of the longest); `places`."""
    longest = max(len(episode["prompt_ids"]) + len(episode["ids"]) for episode in episodes)
    shape = (len(episodes), longest)
    ids, mask = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for place, episode in enumerate(episodes):
        start, end = len(episode["prompt_ids"]), len(episode["prompt_ids"]) + len(episode["ids"])
        ids[place, :end] = torch.tensor(episode["prompt_ids"] + episode["ids"])
        mask[place, :end] = 1
        if num_trained(episode):
            labels[place, start - 1 : end - 1] = ids[place, start:end]
    batch = {"input_ids": ids, "attention_mask": mask, "shift_labels": labels, PLACES: places_of(labels)}
    return {name: put(tensor, device) for name, tensor in batch.items()}


def flat(episodes: Sequence[Episode], name: str, device: torch.device) -> torch.Tensor:
    """A value of every trained token, (N,), in the order of `token_logps`."""
    parts: list[Any] = [torch.as_tensor(episode[name]) for episode in episodes if num_trained(episode)]  # type: ignore[literal-required]
    return put((torch.cat(parts) if parts else torch.zeros(0)).float(), device)


def token_logps(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each marked token and the entropy of its distribution, both (N,), at the temperature.

    `model` has the head of tasks/trainer/fused_head.py at that temperature, which never holds the logits of a batch.
    """
    arguments = {name: batch[name] for name in ("input_ids", "shift_labels", PLACES)}
    made = model(**arguments, use_cache=False, fused_lm_head=True)
    return _at_places(made.log_probs, batch), _at_places(made.entropy, batch)


def token_values(critic: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Value before each marked token, (N,): the score head at the place that predicts the token."""
    values: torch.Tensor = _at_places(_scores(critic, batch), batch)
    return values


def _at_places(of_tokens: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(episodes, T, ...) -> (N, ...): of the marked tokens."""
    return of_tokens.flatten(0, 1).index_select(0, batch[PLACES])


def last_scores(reward_model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Score of each whole text, (episodes,): the head at its last token, as a reward model is trained."""
    last = batch["attention_mask"].sum(dim=1) - 1
    scores: torch.Tensor = _scores(reward_model, batch)[torch.arange(len(last), device=last.device), last]
    return scores


def _scores(classifier: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """(episodes, T)"""
    return scores_of_tokens(classifier, classifier.score, {"input_ids": batch["input_ids"]})[..., 0]


def by_episode(
    episodes: Sequence[Episode], batch_size: int, compute: Callable[[list[Episode]], torch.Tensor]
) -> list[torch.Tensor]:
    """What `compute` says of every episode, in batches of similar length: (T,) each, on the CPU.

    `compute` gives the (N,) values of a batch. Episodes without a reward get none, (0,).
    """
    made: dict[int, torch.Tensor] = {}
    lengths = [len(episode["prompt_ids"]) + len(episode["ids"]) for episode in episodes]
    for places in longest_first(lengths, batch_size):
        batch = [episodes[place] for place in places]
        values = compute(batch).float().cpu()
        made |= zip(places, values.split([num_trained(episode) for episode in batch]), strict=True)
    return [made[place] for place in range(len(episodes))]


def as_sample(episode: Episode, row: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of an episode for a reader. `row`: its prompt's, of the data set."""
    return sample(row, episode["text"], len(episode["ids"]), episode["stopped"], episode["score"])


def rollout_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """What is logged of a rollout batch before any training on it."""
    scores = [one["score"] for one in episodes]
    rewards = [score.reward for score in scores if score.reward is not None]
    shares = {f"verified/{verdict}": sum(score.verdict == verdict for score in scores) for verdict in VERDICTS}
    made = {name: count / len(episodes) for name, count in shares.items()}
    if rewards:
        made["reward"] = math.fsum(rewards) / len(rewards)
        made["reward_std"] = math.sqrt(math.fsum((one - made["reward"]) ** 2 for one in rewards) / len(rewards))
    made["completions/mean_length"] = sum(len(one["ids"]) for one in episodes) / len(episodes)
    made["completions/clipped_ratio"] = sum(not one["stopped"] for one in episodes) / len(episodes)
    graded = [one for one in episodes if num_trained(one)]
    differences = [(torch.tensor(one["sampled_logps"]) - one["logps"]).abs() for one in graded]
    if differences:
        # How far generation rounds otherwise than training: what is trained on was not drawn from another policy.
        made["sampling_difference"] = torch.cat(differences).mean().item()
        # The ratio that importance_sampling_cap cuts off (tasks/generation/importance.py).
        ratios = torch.cat([(one["logps"] - torch.tensor(one["sampled_logps"])).exp() for one in graded])
        made["sampler/ratio_max"] = ratios.max().item()
    return made
